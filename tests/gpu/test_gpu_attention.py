"""Attention for GPUs: what goes to cuDNN, and that it means there what it means in torch.

cuDNN does not run here. JAX's own implementation of the same call stands in for it, in the same layout, with the same
meaning of masks and scales.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from tests.pytorch.operators.harness import to_numpy
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS, attention
from trainingcompiler.targets.target import Target, compiling_for

H200 = Target.gpu("h200")
FORWARD = LOWERINGS["aten._scaled_dot_product_flash_attention_for_cpu.default"]
BACKWARD = LOWERINGS["aten._scaled_dot_product_flash_attention_for_cpu_backward.default"]
# Both sides round scores, weights and results to bfloat16, at different places.
TOLERANCE = {"rtol": 3e-2, "atol": 3e-2}


def heads(count, length, width=8, dtype=torch.bfloat16):
    return torch.randn(2, count, length, width).to(dtype).requires_grad_()


def masked() -> torch.Tensor:
    mask = torch.rand(2, 1, 6, 4) < 0.6
    mask[0, 0, 1] = False  # a query with every key masked
    mask[0, 0, 2] = True
    return mask


@pytest.fixture(autouse=True)
def _same_inputs(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "_IMPLEMENTATION", "xla")


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(4, 6), (4, 6), (4, 6)], {"is_causal": True}),
        ([(4, 6), (4, 4), (4, 4)], {}),
        ([(4, 6), (4, 4), (4, 4)], {"scale": 0.3}),
        ([(4, 6), (2, 6), (2, 6)], {"is_causal": True, "enable_gqa": True}),
        ([(4, 6), (4, 4), (4, 4)], {"attn_mask": masked}),
        ([(4, 7), (4, 7), (4, 7)], {"is_causal": True}),
        ([(4, 5), (4, 4), (4, 4)], {"scale": 0.3}),
        ([(4, 6), (2, 3), (2, 3)], {"enable_gqa": True}),
    ],
)
@pytest.mark.exhaustive(but=["shapes0-options0", "shapes3-options3", "shapes6-options6"])
def test_means_what_torch_means(shapes, options):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    arrays = [heads(*shape) for shape in shapes]
    expected = attend(*arrays, **options)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, arrays, grad)

    passed = {"attn_mask": None, "scale": options.get("scale")}
    if "attn_mask" in options:
        passed["attn_mask"] = options["attn_mask"].numpy()
    query, key, value = map(to_numpy, arrays)
    causal = options.get("is_causal", False)
    with compiling_for(H200):
        assert attention._fused_applies(query, key, value, passed["attn_mask"], causal)
        out, logsumexp = FORWARD(query, key, value, 0.0, causal, **passed)
        computed = BACKWARD(to_numpy(grad), query, key, value, out, logsumexp, 0.0, causal, **passed)
    assert logsumexp.dtype == np.float32 and logsumexp.shape == query.shape[:3]
    for ours, theirs in zip([out, *computed], [expected, *gradients], strict=True):
        assert ours.dtype == query.dtype
        np.testing.assert_allclose(np.asarray(ours, np.float32), to_numpy(theirs).astype(np.float32), **TOLERANCE)


def test_what_cudnn_does_not_take_is_computed_by_us():
    def applies(query, key, mask=None, is_causal=False, target=H200):
        with compiling_for(target):
            return attention._fused_applies(*map(to_numpy, (query, key, key)), mask, is_causal)

    assert applies(heads(4, 6), heads(4, 4))
    assert not applies(heads(4, 6), heads(4, 4), target=Target.local())
    assert not applies(heads(4, 6, dtype=torch.float32), heads(4, 4, dtype=torch.float32))
    assert not applies(heads(4, 6, 12), heads(4, 4, 12))  # not a multiple of 8
    assert not applies(heads(4, 6, 136), heads(4, 4, 136))  # too wide
    assert not applies(heads(4, 6), heads(4, 4), is_causal=True)  # which corner?
    assert not applies(heads(4, 6), heads(4, 4), mask=np.zeros((6, 4), np.float32))
    assert not applies(heads(4, 5), heads(4, 4), mask=np.ones((5, 4), bool))  # odd
