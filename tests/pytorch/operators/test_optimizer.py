"""Fused updates against torch's own single-tensor optimizers, over several steps."""

import jax
import numpy as np
import pytest
import torch

from tests.pytorch.operators.harness import to_numpy, to_torch
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS

STEPS = 3
SHAPES = ((3,), (4, 5))
# Same operations in the same order: what remains are single roundings that XLA:CPU saves by fused multiply-adds.
TOLERANCES = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},
    torch.float64: {"rtol": 1e-14, "atol": 1e-15},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6},
}


def train(optimizer, options, dtype, step):
    """Steps a torch optimizer and a fused lowering side by side on the same gradients.

    Args:
        optimizer: torch's class.
        options: its arguments.
        dtype: of the parameters.
        step: `(params, grads, state or None, step count) -> (params, state)`, calling the lowering.

    Returns:
        torch's optimizer and the lowering's last state.
    """
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]
    ours = [to_numpy(param.detach().clone()) for param in params]
    theirs = optimizer(params, **options, foreach=False, fused=False)
    kept = None
    for count in range(1, STEPS + 1):
        grads = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        theirs.step()
        ours, kept = step(ours, [to_numpy(grad) for grad in grads], kept, np.float32(count))
        for mine, param in zip(ours, params, strict=True):
            torch.testing.assert_close(to_torch(mine), param.detach(), **TOLERANCES[dtype])
    return theirs, kept


def lowered(name, *args, traced=(), **kwargs):
    """Calls a lowering under jit; the keyword arguments named in `traced` become 0-d float64 arrays."""
    static = {key: value for key, value in kwargs.items() if key not in traced}
    dynamic = {key: np.float64(kwargs[key]) for key in traced}
    with jax.enable_x64(True):
        results = jax.jit(lambda args, dynamic: LOWERINGS[name](*args, **static, **dynamic))(args, dynamic)
    return jax.tree.map(np.asarray, results)


def adam_step(name, amsgrad, **hyper):
    def step(params, grads, kept, count):
        averages, squares, maxima = kept or [[np.zeros_like(p) for p in params] for _ in range(3)]
        results = lowered(
            name,
            params,
            grads,
            averages,
            squares,
            maxima if amsgrad else [],
            [count] * len(params),
            amsgrad=amsgrad,
            **hyper,
        )
        return results[0], (results[2], results[3], results[4])

    return step


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("traced", [(), ("lr", "beta1", "beta2", "weight_decay", "eps")])
def test_adamw(dtype, traced):
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    hyper = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "maximize": False}
    step = adam_step("aten._fused_adamw.default", False, **hyper, traced=traced)
    optimizer, (averages, squares, _) = train(torch.optim.AdamW, options, dtype, step)
    for param, average, square in zip(optimizer.param_groups[0]["params"], averages, squares, strict=True):
        torch.testing.assert_close(to_torch(average), optimizer.state[param]["exp_avg"], **TOLERANCES[dtype])
        torch.testing.assert_close(to_torch(square), optimizer.state[param]["exp_avg_sq"], **TOLERANCES[dtype])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam(amsgrad):
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": True}
    hyper = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "maximize": True}
    step = adam_step("aten._fused_adam.tensor_lr", amsgrad, **hyper, traced=("lr",))
    train(torch.optim.Adam, options, torch.float32, step)


@pytest.mark.parametrize("traced", [(), ("lr", "momentum", "weight_decay", "dampening")])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "maximize"),
    [(0.0, 0.0, False, True), (0.9, 0.3, False, False), (0.9, 0.0, True, False)],
)
def test_sgd(momentum, dampening, nesterov, maximize, traced):
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "maximize": maximize}
    options |= {"lr": 0.1, "weight_decay": 0.01}

    def step(params, grads, kept, count):
        buffers = [np.full_like(p, np.nan) for p in params] if kept is None else kept
        results = lowered(
            "aten._fused_sgd.default",
            params,
            grads,
            buffers if momentum else [],
            **options,
            is_first_step=kept is None and momentum != 0,
            traced=traced,
        )
        return results[0], results[2]

    train(torch.optim.SGD, options, torch.float32, step)


@pytest.mark.parametrize("traced", [(), ("lr", "lr_decay", "weight_decay", "eps")])
def test_adagrad(traced):
    options = {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "eps": 1e-8, "maximize": False}

    def step(params, grads, kept, count):
        sums = kept or [np.zeros_like(p) for p in params]
        counts = [count] * len(params)
        results = lowered("aten._fused_adagrad.default", params, grads, sums, counts, **options, traced=traced)
        return results[0], results[2]

    train(torch.optim.Adagrad, options, torch.float32, step)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_scaled_gradients(found):
    param, grad = np.ones((2, 2), np.float32), np.full((2, 2), 8.0, np.float32)
    zero, scale, found_inf = np.zeros((2, 2), np.float32), np.array([4.0], np.float32), np.array([found], np.float32)
    hyper = {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "maximize": False}
    results = lowered(
        "aten._fused_sgd.default",
        [param],
        [grad],
        [zero],
        **hyper,
        is_first_step=False,
        grad_scale=scale,
        found_inf=found_inf,
    )
    expected = (1.0, 8.0, 0.0) if found else (0.0, 2.0, 2.0)
    for [result], value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, np.full((2, 2), value, np.float32))


def test_unscaling_finds_what_is_not_finite():
    grads = [np.array([2.0, 4.0], np.float32), np.array([[1.0]], np.float32)]
    args = np.zeros(1, np.float32), np.array([0.5], np.float32)
    unscaled, found = lowered("aten._amp_foreach_non_finite_check_and_unscale.default", grads, *args)
    np.testing.assert_array_equal(unscaled[0], [1.0, 2.0])
    assert found == 0
    grads[1][0, 0] = np.inf
    assert lowered("aten._amp_foreach_non_finite_check_and_unscale.default", grads, *args)[1] == 1


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("tracker", [0, 1])
def test_scale_grows_and_backs_off(found, tracker):
    scale, growth, overflow = torch.tensor([8.0]), torch.tensor([tracker], dtype=torch.int32), torch.tensor([found])
    hyper = {"scale_growth_factor": 2.0, "scale_backoff_factor": 0.5, "growth_interval": 2}
    ours = lowered("aten._amp_update_scale.default", *(to_numpy(t.clone()) for t in (scale, growth, overflow)), **hyper)
    torch._amp_update_scale_(scale, growth, overflow, 2.0, 0.5, 2)
    np.testing.assert_array_equal(ours[0], scale)
    np.testing.assert_array_equal(ours[1], growth)
    assert ours[1].dtype == np.int32
