"""Loss functions that reach the graph whole, and pairwise distances."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from .dtypes import result_dtype
from .promotion import INT32, Array, aligned, cast, constant, expand, full, iota, opmath, select
from .registry import lowers
from .value_checks import require_between

NONE, MEAN, SUM = 0, 1, 2
"""torch's reduction codes."""


def _reduced(loss: Array, reduction: int, dtype: jnp.dtype) -> Array:
    if reduction != NONE:
        total = lax.reduce_sum(loss, tuple(range(loss.ndim)))
        count = loss.size
        loss = total if reduction == SUM else total / constant(count, total.dtype)
    return cast(loss, dtype)


def _spread(grad_output: Array, shape: tuple[int, ...], reduction: int, dtype: jnp.dtype) -> Array:
    """The gradient of each element's loss, for the gradient of the reduced loss."""
    grad = cast(grad_output, dtype)
    if reduction == MEAN:
        grad = grad / constant(math.prod(shape), dtype)
    return expand(grad, shape)


# --- pointwise losses: one function of (input, target) each, and its derivative ---


def _squared_error(x: Array, y: Array) -> Array:
    return lax.square(x - y)


def _squared_error_slope(x: Array, y: Array) -> Array:
    return 2 * (x - y)


def _smooth_l1(x: Array, y: Array, beta: float = 1.0) -> Array:
    distance = lax.abs(x - y)
    if beta == 0:
        return distance
    return select(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


def _smooth_l1_slope(x: Array, y: Array, beta: float) -> Array:
    difference = x - y
    if beta == 0:
        return lax.sign(difference)
    return select(lax.abs(difference) < beta, difference / beta, lax.sign(difference))


def _huber(x: Array, y: Array, delta: float = 1.0) -> Array:
    distance = lax.abs(x - y)
    return select(distance <= delta, 0.5 * distance * distance, delta * (distance - 0.5 * delta))


def _huber_slope(x: Array, y: Array, delta: float) -> Array:
    return lax.clamp(constant(-delta, x.dtype), x - y, constant(delta, x.dtype))


def _soft_margin(x: Array, y: Array) -> Array:
    return lax.log1p(lax.exp(-x * y))


def _soft_margin_slope(x: Array, y: Array) -> Array:
    return -y * lax.logistic(-x * y)


def _lower_pointwise(name: str, value: Callable[..., Array], slope: Callable[..., Array]) -> None:
    @lowers(f"aten.{name}.default")
    def loss(self: Array, target: Array, reduction: int = MEAN, *shape: float, **named_shape: float) -> Array:
        dtype = result_dtype(self, target)
        size = jnp.broadcast_shapes(self.shape, target.shape)
        x, y = (expand(operand, size) for operand in aligned(opmath(dtype), self, target))
        return _reduced(value(x, y, *shape, **named_shape), reduction, dtype)

    @lowers(f"aten.{name}_backward.default")
    def gradient(grad_output: Array, self: Array, target: Array, reduction: int, *shape: float) -> Array:
        dtype = result_dtype(self, target)
        size = jnp.broadcast_shapes(self.shape, target.shape)
        x, y = (expand(operand, size) for operand in aligned(opmath(dtype), self, target))
        return cast(slope(x, y, *shape) * _spread(grad_output, size, reduction, x.dtype), dtype)


_lower_pointwise("mse_loss", _squared_error, _squared_error_slope)
_lower_pointwise("smooth_l1_loss", _smooth_l1, _smooth_l1_slope)
_lower_pointwise("huber_loss", _huber, _huber_slope)
_lower_pointwise("soft_margin_loss", _soft_margin, _soft_margin_slope)


@lowers("aten.binary_cross_entropy.default")
def binary_cross_entropy(self: Array, target: Array, weight: Array | None = None, reduction: int = MEAN) -> Array:
    wide = opmath(self.dtype)
    x, y = cast(self, wide), cast(target, wide)
    floor = constant(-100, wide)  # torch bounds the logarithms, so that a wrong certainty costs a finite amount
    require_between(x, 0, 1)
    loss = (y - 1) * lax.max(lax.log1p(-x), floor) - y * lax.max(lax.log(x), floor)
    if weight is not None:
        loss = loss * expand(cast(weight, wide), loss.shape)
    return _reduced(loss, reduction, self.dtype)


@lowers("aten.binary_cross_entropy_backward.default")
def binary_cross_entropy_backward(
    grad_output: Array, self: Array, target: Array, weight: Array | None = None, reduction: int = MEAN
) -> Array:
    wide = opmath(self.dtype)
    x, y = cast(self, wide), cast(target, wide)
    grad = (x - y) / lax.max((1 - x) * x, constant(1e-12, wide))
    if weight is not None:
        grad = grad * expand(cast(weight, wide), grad.shape)
    return cast(grad * _spread(grad_output, self.shape, reduction, wide), self.dtype)


@lowers("aten.binary_cross_entropy_with_logits.default")
def binary_cross_entropy_with_logits(
    self: Array,
    target: Array,
    weight: Array | None = None,
    pos_weight: Array | None = None,
    reduction: int = MEAN,
) -> Array:
    dtype = result_dtype(*(x for x in (self, target, weight, pos_weight) if x is not None))
    wide = opmath(dtype)
    x, y = cast(self, wide), cast(target, wide)
    softplus = lax.log1p(lax.exp(-lax.abs(x))) + lax.max(-x, constant(0, wide))
    if pos_weight is not None:
        softplus = softplus * ((expand(cast(pos_weight, wide), y.shape) - 1) * y + 1)
    loss = (1 - y) * x + softplus
    if weight is not None:
        loss = loss * expand(cast(weight, wide), loss.shape)
    return _reduced(loss, reduction, dtype)


# --- negative log-likelihood ---


def _class_axis(scores: Array) -> int:
    return min(scores.ndim - 1, 1)


def _target_weights(scores: Array, target: Array, weight: Array | None, ignore_index: int) -> Array:
    """Each target's class weight, 0 where it is to be ignored."""
    wide = opmath(scores.dtype)
    counted = lax.ne(target, constant(ignore_index, target.dtype))
    if weight is None:
        return cast(counted, wide)
    weights = weight.at[target].get(mode="clip")
    return select(counted, cast(weights, wide), 0)


def _pick(scores: Array, target: Array) -> Array:
    """The score of each target's class, where `target` lacks the class axis of `scores`."""
    axis = _class_axis(scores)
    return lax.squeeze(jnp.take_along_axis(scores, lax.expand_dims(target, (axis,)), axis, mode="clip"), (axis,))


@lowers("aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default")
def nll_loss(
    self: Array, target: Array, weight: Array | None, reduction: int, ignore_index: int
) -> tuple[Array, Array]:
    classes, ignored = self.shape[_class_axis(self)], constant(ignore_index, target.dtype)
    require_between(select(lax.eq(target, ignored), constant(0, target.dtype), target), 0, classes - 1)
    weights = _target_weights(self, target, weight, ignore_index)
    picked = cast(_pick(self, target), weights.dtype)
    losses = select(weights == 0, constant(0, weights.dtype), -picked * weights)
    if reduction == NONE and self.ndim > 1:
        return cast(losses, self.dtype), full((), 0, self.dtype)
    axes = tuple(range(losses.ndim))
    total, total_weight = lax.reduce_sum(losses, axes), lax.reduce_sum(weights, axes)
    loss = total / total_weight if reduction == MEAN else total
    return cast(loss, self.dtype), cast(total_weight, self.dtype)


@lowers("aten.nll_loss_backward.default", "aten.nll_loss2d_backward.default")
def nll_loss_backward(
    grad_output: Array,
    self: Array,
    target: Array,
    weight: Array | None,
    reduction: int,
    ignore_index: int,
    total_weight: Array,
) -> Array:
    weights = _target_weights(self, target, weight, ignore_index)
    grad = cast(grad_output, weights.dtype)
    if reduction == MEAN:
        # Counted again rather than taken from `total_weight`, which torch rounds to the dtype of the scores.
        grad = grad / lax.reduce_sum(weights, tuple(range(weights.ndim)))
    axis = _class_axis(self)
    columns = [lax.expand_dims(array, (axis,)) for array in (target, select(weights == 0, 0.0, -weights * grad))]
    target, grads = (expand(column, self.shape) for column in columns)
    # A comparison with every class, not a scatter: XLA fuses it into the softmax gradient that follows.
    chosen = lax.eq(iota(self.shape, axis, target.dtype), target)
    return cast(select(chosen, grads, 0), self.dtype)


# --- margins between classes ---


def _matrix_shape(scores: Array) -> tuple[int, int]:
    """(samples, classes) of scores that may lack the samples, or both."""
    return (1,) * (2 - scores.ndim) + scores.shape


def _margins(self: Array, target: Array, margin: float, weight: Array | None) -> tuple[Array, Array, Array]:
    """Of (N, C) scores: how far each class violates the target's margin, its weight, and which is the target's own."""
    wide = opmath(self.dtype)
    x = cast(lax.reshape(self, _matrix_shape(self)), wide)
    target = lax.reshape(target, (x.shape[0], 1))
    require_between(target, 0, x.shape[1] - 1)
    own = lax.eq(iota(x.shape, 1, target.dtype), expand(target, x.shape))
    score = lax.reduce_sum(select(own, x, 0), (1,))
    violated = lax.max(x - lax.expand_dims(score, (1,)) + margin, constant(0, wide))
    weights = full(x.shape, 1 / x.shape[1], wide)
    if weight is not None:
        weights = weights * expand(cast(weight.at[target].get(mode="clip"), wide), x.shape)
    return select(own, 0, violated), weights, own


@lowers("aten.multi_margin_loss.default")
def multi_margin_loss(
    self: Array, target: Array, p: int = 1, margin: float = 1, weight: Array | None = None, reduction: int = MEAN
) -> Array:
    violated, weights, _ = _margins(self, target, margin, weight)
    losses = lax.reduce_sum(lax.integer_pow(violated, p) * weights, (1,))
    return _reduced(lax.reshape(losses, target.shape), reduction, self.dtype)


@lowers("aten.multi_margin_loss_backward.default")
def multi_margin_loss_backward(
    grad_output: Array,
    self: Array,
    target: Array,
    p: int,
    margin: float,
    weight: Array | None = None,
    reduction: int = MEAN,
) -> Array:
    violated, weights, own = _margins(self, target, margin, weight)
    slope = select(violated > 0, weights if p == 1 else 2 * violated * weights, 0)
    slope = select(own, -lax.expand_dims(lax.reduce_sum(slope, (1,)), (1,)), slope)
    grad = _spread(grad_output, target.shape, reduction, slope.dtype)
    return cast(lax.reshape(slope * lax.reshape(grad, (slope.shape[0], 1)), self.shape), self.dtype)


def _listed(labels: Array) -> Array:
    """Which of (N, C) labels count: those before the first negative one."""
    return lax.cumsum(cast(labels < 0, INT32), axis=1) == 0


def _label_margins(self: Array, target: Array, is_target: Array) -> Array:
    """Of (N, C) scores: by how much each class (the last axis of three) violates the margin of each listed label."""
    shape = _matrix_shape(self)
    x = cast(lax.reshape(self, shape), opmath(self.dtype))
    labels = lax.reshape(target, shape)
    scores = jnp.take_along_axis(x, labels, 1, mode="clip")
    violated = lax.max(1 - lax.expand_dims(scores, (2,)) + lax.expand_dims(x, (1,)), constant(0, x.dtype))
    others = lax.reshape(is_target, shape) == 0
    return select(lax.expand_dims(_listed(labels), (2,)) & lax.expand_dims(others, (1,)), violated, 0)


@lowers("aten.multilabel_margin_loss_forward.default")
def multilabel_margin_loss(self: Array, target: Array, reduction: int) -> tuple[Array, Array]:
    shape = _matrix_shape(self)
    labels = lax.reshape(target, shape)
    hits = lax.expand_dims(labels, (2,)) == iota((shape[1],), 0, labels.dtype)
    is_target = lax.reduce_or(hits & lax.expand_dims(_listed(labels), (2,)), (1,))
    is_target = lax.reshape(cast(is_target, self.dtype), self.shape)
    losses = lax.reduce_sum(_label_margins(self, target, is_target), (1, 2)) / shape[1]
    return _reduced(lax.reshape(losses, target.shape[:-1]), reduction, self.dtype), is_target


@lowers("aten.multilabel_margin_loss_backward.default")
def multilabel_margin_loss_backward(
    grad_output: Array, self: Array, target: Array, reduction: int, is_target: Array
) -> Array:
    violated = _label_margins(self, target, is_target)
    slope = cast(violated > 0, violated.dtype) / violated.shape[1]
    toward = lax.reduce_sum(slope, (1,))
    labels = lax.max(lax.reshape(target, toward.shape), constant(0, target.dtype))
    grad = toward.at[iota(toward.shape, 0), labels].add(-lax.reduce_sum(slope, (2,)), mode="clip")
    sample_grad = _spread(grad_output, target.shape[:-1], reduction, grad.dtype)
    return cast(lax.reshape(grad * lax.reshape(sample_grad, (grad.shape[0], 1)), self.shape), self.dtype)


# --- distances ---


def _differences(x1: Array, x2: Array) -> Array:
    """(..., P, M) and (..., R, M) -> (..., P, R, M)."""
    return lax.expand_dims(x1, (x1.ndim - 1,)) - lax.expand_dims(x2, (x2.ndim - 2,))


def _length(difference: Array, p: float) -> Array:
    """The p-norm of the last axis."""
    size = lax.abs(difference)
    axis = (size.ndim - 1,)
    if p == 0:
        return lax.reduce_sum(cast(size != 0, size.dtype), axis)
    if p == math.inf:
        return lax.reduce_max(size, axis)
    if p == 1:
        return lax.reduce_sum(size, axis)
    if p == 2:
        return lax.sqrt(lax.reduce_sum(size * size, axis))
    return lax.pow(lax.reduce_sum(lax.pow(size, constant(p, size.dtype)), axis), constant(1 / p, size.dtype))


def _length_slope(difference: Array, length: Array, p: float) -> Array:
    """How the p-norm of the last axis changes with each element."""
    length = lax.expand_dims(length, (length.ndim,))
    sign, size = lax.sign(difference), lax.abs(difference)
    if p == math.inf:
        return select(size == length, sign, 0)
    if p == 1:
        return sign
    ratio = select(length == 0, 0, size / length)
    slope = sign * (ratio if p == 2 else lax.pow(ratio, constant(p - 1, size.dtype)))
    return select((difference == 0) | (length == 0), 0, slope)


@lowers("aten._cdist_forward.default")
def cdist(x1: Array, x2: Array, p: float, compute_mode: int | None) -> Array:
    return _length(_differences(x1, x2), p)


@lowers("aten._cdist_backward.default")
def cdist_backward(grad: Array, x1: Array, x2: Array, p: float, cdist: Array) -> Array:
    if p == 0 or grad.size == 0:
        return lax.full_like(x1, 0)
    difference = _differences(x1, x2)
    slope = _length_slope(difference, cdist, p)
    return lax.reduce_sum(lax.expand_dims(grad, (grad.ndim,)) * slope, (difference.ndim - 2,))


def _pairs(self: Array) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(self.shape[0], 1)


@lowers("aten._pdist_forward.default")
def pdist(self: Array, p: float = 2) -> Array:
    first, second = _pairs(self)
    return _length(self[first] - self[second], p)


@lowers("aten._pdist_backward.default")
def pdist_backward(grad: Array, self: Array, p: float, pdist: Array) -> Array:
    if p == 0 or grad.size == 0 or self.size == 0:
        return lax.full_like(self, 0)
    first, second = _pairs(self)
    pulls = lax.expand_dims(grad, (1,)) * _length_slope(self[first] - self[second], pdist, p)
    return jnp.zeros_like(self).at[first].add(pulls).at[second].add(-pulls)
