"""Normalization layers against torch, forward and backward."""

import jax
import pytest
import torch
from torch import nn

from tests.pytorch.operators.harness import (
    TOLERANCES,
    FunctionalRecorder,
    assert_lowering_matches,
    assert_program_matches,
    check_operator,
    compare,
    to_numpy,
    to_torch,
)
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS


# A layer of one element has a gradient of 0; of roundings that its inverse deviation, 316, magnifies 5e-5 are left.
@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "local_response_norm", "rms_norm"])
def test_operator(name):
    check_operator(f"nn.functional.{name}", samples=6, tolerance={"rtol": 1.3e-5, "atol": 1e-4})


# Both round one float32 result; the gradients of weights, sums of up to 25 such, differ by an ulp of their terms.
@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_sixteen_bits(name):
    check_operator(f"nn.functional.{name}", torch.bfloat16, samples=4, tolerance={"rtol": 1.6e-2, "atol": 2e-2})


BATCH_NORMS = {
    "plain": lambda: nn.BatchNorm2d(3),
    "without weights": lambda: nn.BatchNorm2d(3, affine=False),
    "without running statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "evaluating": lambda: nn.BatchNorm2d(3).eval(),
    "float64": lambda: nn.BatchNorm2d(3, momentum=0.3, eps=1e-3).double(),
    "bfloat16": lambda: nn.BatchNorm2d(3).bfloat16(),
}


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm(kind):
    layer = BATCH_NORMS[kind]()
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    x = (torch.randn(4, 3, 5, 2) * 2 + 1).to(dtype).requires_grad_()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with FunctionalRecorder() as recorder:
        result = layer(x)
        result.backward(torch.randn_like(result))
    calls = {call.name: call for call in recorder.calls}
    # The gradient of a sum over 40 values that nearly cancels, rounded to bfloat16 once or twice.
    compare([calls["aten.native_batch_norm_backward.default"]], tolerance=_tolerance(dtype))

    forward = calls["aten.native_batch_norm.default"]
    arrays = [
        to_numpy(before.get(name, argument)) if isinstance(argument, torch.Tensor) else argument
        for name, argument in zip(["", "", "", "running_mean", "running_var", "", "", ""], forward.args, strict=True)
    ]
    with jax.enable_x64(True):
        output, mean, rstd, *running = LOWERINGS[forward.name](*arrays)
    for ours, theirs in zip((output, mean, rstd), forward.expected, strict=True):
        torch.testing.assert_close(to_torch(ours), theirs, **_tolerance(dtype))
    for ours, name in zip(running, ("running_mean", "running_var"), strict=True):
        if name in before:
            torch.testing.assert_close(to_torch(ours), layer.get_buffer(name), **_tolerance(dtype))
        else:
            assert ours is None


def _tolerance(dtype):
    return {"rtol": 1.6e-2, "atol": 6e-2} if dtype == torch.bfloat16 else TOLERANCES[dtype]


def test_instance_norm():
    layer = nn.InstanceNorm2d(3, affine=True)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert_program_matches(lambda: layer(x).square().sum().backward(), skip=["aten.native_batch_norm.default"])


def test_weight_norm():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert_program_matches(lambda: layer(torch.randn(2, 3)).square().sum().backward())
    assert_lowering_matches("aten._weight_norm_interface.default", torch.randn(3, 4, 2), torch.rand(1, 1, 2), 2)
