"""Fused optimizer updates and gradient scaling.

Each reproduces torch's own single-tensor Python implementation, operation by operation: what is a double-precision
number on torch's host (step counts, bias corrections, rates) is a 0-d float64 array here, and every operation on a
parameter rounds to the parameter's dtype. Hyperparameters are Python floats or 0-d arrays; a 0-d array counts as
different from 0.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trainingcompiler.targets.target import current as current_target

from . import value_checks
from .promotion import Array, cast, constant, is_number, opmath, select
from .registry import lowers

Hyper = float | Array
Arrays = Sequence[Array]

_FLOAT64 = jnp.dtype("float64")


def _host(value: Hyper) -> Hyper:
    """What `value.item()` would be on torch's host."""
    return value if is_number(value) else cast(value, _FLOAT64)


def _is_zero(value: Hyper) -> bool:
    return is_number(value) and value == 0


def _rounded(function: Callable[..., Array], first: Array, *operands: Hyper | Array) -> Array:
    """`function` in the dtype torch computes in for `first`, rounded to the dtype of `first`."""
    wide = opmath(first.dtype)
    return cast(function(*(cast(operand, wide) for operand in (first, *operands))), first.dtype)


def _add(x: Array, y: Array, alpha: Hyper) -> Array:
    return _rounded(lambda x, y, alpha: x + alpha * y, x, y, alpha)


def _addcmul(x: Array, y: Array, z: Array, value: Hyper) -> Array:
    return _rounded(lambda x, y, z, value: x + value * y * z, x, y, z, value)


def _addcdiv(x: Array, y: Array, z: Array, value: Hyper) -> Array:
    return _rounded(lambda x, y, z, value: x + value * y / z, x, y, z, value)


def _scale(x: Array, factor: Hyper) -> Array:
    return _rounded(lax.mul, x, factor)


def _lerp(x: Array, end: Array, weight: Hyper) -> Array:
    def near(x: Array, end: Array, weight: Array) -> Array:
        return x + weight * (end - x)

    def far(x: Array, end: Array, weight: Array) -> Array:
        return end - (end - x) * (1 - weight)

    # torch takes the other of two equal formulas from a weight of one half on; a traced weight is 1 - beta1, below it.
    return _rounded(far if is_number(weight) and weight >= 0.5 else near, x, end, weight)


def _power(base: Hyper, exponent: Array) -> Array:
    return lax.pow(cast(base, _FLOAT64), exponent)


def _root(x: Array) -> Array:
    return _rounded(lax.sqrt, x)


def _denominator(square: Array, eps: float, correction: Hyper = 1.0) -> Array:
    root = _root(square)
    if not (is_number(correction) and correction == 1):
        root = _rounded(lax.div, root, correction)
    return _rounded(lax.add, root, eps)


def _unscaled(grads: Arrays, grad_scale: Array | None) -> list[Array]:
    if grad_scale is None:
        return list(grads)
    return [_rounded(lax.div, grad, lax.reshape(grad_scale, ())) for grad in grads]


def _unless(found_inf: Array | None, updated: tuple[Arrays, ...], before: tuple[Arrays, ...]) -> tuple[Arrays, ...]:
    """What the step leaves behind: everything as it was where a gradient was not finite."""
    if found_inf is None:
        return updated
    skip = lax.reshape(found_inf, ()) == 1
    return tuple(
        [lax.select(skip, old, new) for old, new in zip(olds, news, strict=True)]
        for olds, news in zip(before, updated, strict=True)
    )


def _order(found_inf: Array | None) -> tuple[bool, Array | None]:
    """Whether parameters are computed from the averages that have been stored, and whether these are stored at all.

    XLA for a CPU computes each of the three of Adam in a loop of its own. If two of them read an old average, it copies
    all of it first: 15% of a step of an MLP. So the new ones are stored, and what is computed next reads those.

    Returns:
        Whether it is so, and whether what has been stated so far holds, which selects new or old values here in place
        of at the step's end; None if there is nothing to ask.
    """
    target, conditions = current_target(), value_checks.stated()
    in_order = found_inf is None and (target is None or target.platform == "cpu")
    return in_order, conditions.all() if in_order and conditions else None


def _held(holds: Array | None, new: Array, old: Array) -> Array:
    return new if holds is None else lax.select(lax.broadcast(holds, old.shape), new, old)


def _keep(holds: Array | None, *values: Array | None) -> None:
    """Notes that values have been selected already, and need not be at the step's end."""
    conditions = value_checks.stated()
    for value in values:
        if holds is not None and conditions is not None and value is not None:
            conditions.keep(value)


def _directed(grad: Array, param: Array, maximize: bool, weight_decay: Hyper) -> Array:
    """The gradient to descend, with the penalty on the parameters' size."""
    grad = -grad if maximize else grad
    return grad if _is_zero(weight_decay) else _add(grad, param, _host(weight_decay))


def _adam(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_sqs: Arrays,
    max_exp_avg_sqs: Arrays,
    state_steps: Arrays,
    *,
    lr: Hyper,
    beta1: Hyper,
    beta2: Hyper,
    weight_decay: Hyper,
    eps: Hyper,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Array | None = None,
    found_inf: Array | None = None,
    decoupled: bool,
) -> tuple[Arrays, ...]:
    before = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    grads = _unscaled(grads, grad_scale)
    updated: tuple[list[Array], ...] = ([], list(grads), [], [], [])
    numbers = tuple(jnp.asarray(_host(value), _FLOAT64) for value in (lr, beta1, beta2, weight_decay, eps))
    maxima = max_exp_avg_sqs if amsgrad else [None] * len(params)
    in_order, holds = _order(found_inf)
    for state in zip(params, grads, exp_avgs, exp_avg_sqs, maxima, state_steps, strict=True):
        param, average, square, largest = _adam_one(
            *state,
            *numbers,
            holds,
            maximize=maximize,
            decoupled=decoupled,
            decays=not _is_zero(weight_decay),
            in_order=in_order,
        )
        _keep(holds, param, average, square, largest)
        updated[0].append(param)
        updated[2].append(average)
        updated[3].append(square)
        if amsgrad:
            updated[4].append(largest)
    return _unless(found_inf, updated, before if amsgrad else (*before[:4], []))


@partial(jax.jit, static_argnames=("maximize", "decoupled", "decays", "in_order"))
def _adam_one(
    param: Array,
    grad: Array,
    average: Array,
    square: Array,
    largest: Array | None,
    count: Array,
    lr: Array,
    beta1: Array,
    beta2: Array,
    weight_decay: Array,
    eps: Array,
    holds: Array | None,
    *,
    maximize: bool,
    decoupled: bool,
    decays: bool,
    in_order: bool,
) -> tuple[Array, Array, Array, Array | None]:
    """One parameter's update; under `jit`, so that parameters of one shape are traced and lowered once.

    GPT-2 small's 148 parameters: 4,163 equations instead of 10,083, and half of the whole step's lowering time.
    `holds` and `in_order` are what `_order` returns; the others are those of `torch.optim.Adam`.
    """
    before = param, average, square, largest
    if decoupled and decays:
        param = _scale(param, 1 - lr * weight_decay)
    grad = _directed(grad, param, maximize, weight_decay if decays and not decoupled else 0.0)
    average = _lerp(average, grad, 1 - beta1)
    square = _addcmul(_scale(square, beta2), grad, grad, 1 - beta2)
    step = cast(count, _FLOAT64)
    step_size = lr / (1 - _power(beta1, step))
    correction = lax.sqrt(1 - _power(beta2, step))
    average, square = _held(holds, average, before[1]), _held(holds, square, before[2])
    if largest is not None:
        largest = _held(holds, lax.max(largest, square), before[3])
    if in_order:
        average, square, largest = lax.optimization_barrier((average, square, largest))
    denominator = _denominator(square if largest is None else largest, eps, correction)
    return _held(holds, _addcdiv(param, average, denominator, -step_size), before[0]), average, square, largest


@lowers("aten._fused_adam.default", "aten._fused_adam.tensor_lr")
def fused_adam(*state: Arrays, **options: Any) -> tuple[Arrays, ...]:
    return _adam(*state, **options, decoupled=False)


@lowers("aten._fused_adamw.default", "aten._fused_adamw.tensor_lr")
def fused_adamw(*state: Arrays, **options: Any) -> tuple[Arrays, ...]:
    return _adam(*state, **options, decoupled=True)


@lowers("aten._fused_sgd.default", "aten._fused_sgd.tensor_lr")
def fused_sgd(
    params: Arrays,
    grads: Arrays,
    momentum_buffer_list: Arrays,
    *,
    weight_decay: Hyper,
    momentum: Hyper,
    lr: Hyper,
    dampening: Hyper,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: Array | None = None,
    found_inf: Array | None = None,
) -> tuple[Arrays, ...]:
    before = (params, grads, momentum_buffer_list)
    lr, momentum, dampening = _host(lr), _host(momentum), _host(dampening)
    grads = _unscaled(grads, grad_scale)
    updated: tuple[list[Array], ...] = ([], list(grads), [])
    in_order, holds = _order(found_inf)
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        grad = _directed(grad, param, maximize, weight_decay)
        if momentum_buffer_list:
            buffer = grad
            if not is_first_step:  # Before the first step the buffer's values are undefined.
                buffer = _add(_scale(momentum_buffer_list[index], momentum), grad, 1 - dampening)
            buffer = _held(holds, buffer, momentum_buffer_list[index])
            if in_order:
                (buffer,) = lax.optimization_barrier((buffer,))
            grad = _add(grad, buffer, momentum) if nesterov else buffer
            updated[2].append(buffer)
            _keep(holds, buffer)
        updated[0].append(_held(holds, _add(param, grad, -lr), param))
        _keep(holds, updated[0][-1])
    return _unless(found_inf, updated, before)


@lowers("aten._fused_adagrad.default")
def fused_adagrad(
    params: Arrays,
    grads: Arrays,
    state_sums: Arrays,
    state_steps: Arrays,
    *,
    lr: Hyper,
    lr_decay: Hyper,
    weight_decay: Hyper,
    eps: Hyper,
    maximize: bool,
    grad_scale: Array | None = None,
    found_inf: Array | None = None,
) -> tuple[Arrays, ...]:
    before = (params, grads, state_sums, state_steps)
    lr, lr_decay, eps = _host(lr), _host(lr_decay), _host(eps)
    grads = _unscaled(grads, grad_scale)
    updated: tuple[list[Array], ...] = ([], list(grads), [], list(state_steps))
    for param, grad, total, count in zip(params, grads, state_sums, state_steps, strict=True):
        grad = _directed(grad, param, maximize, weight_decay)
        rate = lr / (1 + (cast(count, _FLOAT64) - 1) * lr_decay)
        total = _addcmul(total, grad, grad, 1.0)
        updated[0].append(_addcdiv(param, grad, _denominator(total, eps), -rate))
        updated[2].append(total)
    return _unless(found_inf, updated, before)


@lowers("aten._fused_adagrad.tensor_lr")
def fused_adagrad_tensor_lr(*state: Arrays, **options: Any) -> tuple[Arrays, ...]:
    return fused_adagrad(*state, **options)[:3]  # This overload does not say that it returns the step counts.


# --- gradient scaling ---


@lowers("aten._amp_foreach_non_finite_check_and_unscale.default")
def check_and_unscale(self: Arrays, found_inf: Array, inv_scale: Array) -> tuple[list[Array], Array]:
    for grad in self:
        finite = lax.reduce_and(lax.is_finite(grad), tuple(range(grad.ndim)))
        found_inf = select(finite, found_inf, constant(1, found_inf.dtype))
    return [_rounded(lambda x, scale: x * lax.reshape(scale, ()), grad, inv_scale) for grad in self], found_inf


@lowers("aten._amp_update_scale.default")
def update_scale(
    self: Array,
    growth_tracker: Array,
    found_inf: Array,
    scale_growth_factor: float,
    scale_backoff_factor: float,
    growth_interval: int,
) -> tuple[Array, Array]:
    overflowed = lax.reshape(found_inf, self.shape) != 0
    successes = lax.reshape(growth_tracker, self.shape) + constant(1, growth_tracker.dtype)
    due = successes == growth_interval
    grown = self * constant(scale_growth_factor, self.dtype)
    grown = select(due & (grown < math.inf), grown, self)
    scale = select(overflowed, self * constant(scale_backoff_factor, self.dtype), grown)
    return scale, lax.reshape(select(overflowed | due, 0, successes), growth_tracker.shape)
