"""Normalization over batches, groups, layers and weights.

Statistics are computed in two passes (mean, then centred squares) in float32 or wider. Of a 16-bit input with float32
weights torch saves them in float32, but says 16 bits when traced without data: here they are what torch computes.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from .promotion import Array, cast, expand, full, opmath
from .registry import lowers

Mask = Sequence[bool]


def _wide(*arrays: Array | None) -> list[Array | None]:
    return [None if array is None else cast(array, opmath(array.dtype)) for array in arrays]


def _saved_dtype(input: Array, weight: Array | None) -> jnp.dtype:
    """The dtype torch saves statistics in: that of the weights, which autocast leaves wide (fake tensors say else)."""
    return input.dtype if weight is None else weight.dtype


def _moments(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """Mean and biased variance over `axes`, which are kept with size 1."""
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    count = math.prod(x.shape[axis] for axis in axes)
    mean = lax.reshape(lax.reduce_sum(x, axes), kept) / count
    centred = x - mean
    return mean, lax.reshape(lax.reduce_sum(centred * centred, axes), kept) / count


def _normalization_gradient(grad: Array, normalized: Array, rstd: Array, axes: Sequence[int]) -> Array:
    """The gradient of `(x - mean(x)) * rstd(x)` over `axes`, given `grad` of its result, `normalized`."""
    kept = [1 if axis in axes else size for axis, size in enumerate(grad.shape)]
    count = math.prod(grad.shape[axis] for axis in axes)
    mean = lax.reshape(lax.reduce_sum(grad, axes), kept) / count
    slope = lax.reshape(lax.reduce_sum(grad * normalized, axes), kept) / count
    return (grad - mean - normalized * slope) * rstd


# --- batch ---


def _channels(vector: Array, ndim: int) -> Array:
    """(C,) -> (1, C, 1, ...)."""
    return lax.expand_dims(vector, (0, *range(2, ndim)))


def _batch_axes(x: Array) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


@lowers(
    "aten.native_batch_norm.default",
    "aten._native_batch_norm_legit.default",
    "aten._native_batch_norm_legit_functional.default",
)
def batch_norm(
    input: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Batch normalization with its side effect as results.

    Returns:
        The output, the batch's mean and inverse deviation (empty where `training` is false), and the new running
        mean and variance (None where there are none), which torch writes in place though no schema says so.
    """
    x, scale, shift = _wide(input, weight, bias)
    axes = _batch_axes(x)
    if training:
        mean, var = _moments(x, axes)
        rstd = lax.rsqrt(var + eps)
        saved = [cast(lax.squeeze(statistic, axes), _saved_dtype(input, weight)) for statistic in (mean, rstd)]
        count = math.prod(x.shape[axis] for axis in axes)
        unbiased = lax.squeeze(var, axes) * (count / max(count - 1, 1))
        running_mean = _moved(running_mean, lax.squeeze(mean, axes), momentum)
        running_var = _moved(running_var, unbiased, momentum)
    else:
        mean, rstd = _running(running_mean, running_var, eps, x)
        saved = [full((0,), 0, _saved_dtype(input, weight))] * 2
    factor = rstd if scale is None else rstd * _channels(scale, x.ndim)
    result = (x - mean) * factor
    if shift is not None:
        result = result + _channels(shift, x.ndim)
    return cast(result, input.dtype), *saved, running_mean, running_var


def _moved(running: Array | None, batch: Array, momentum: float) -> Array | None:
    if running is None:
        return None
    wide = opmath(running.dtype)
    return cast((1 - momentum) * cast(running, wide) + momentum * cast(batch, wide), running.dtype)


def _running(mean: Array, var: Array, eps: float, x: Array) -> tuple[Array, Array]:
    return _channels(cast(mean, x.dtype), x.ndim), _channels(lax.rsqrt(cast(var, x.dtype) + eps), x.ndim)


@lowers("aten._native_batch_norm_legit.no_stats")
def batch_norm_without_statistics(
    input: Array, weight: Array | None, bias: Array | None, training: bool, momentum: float, eps: float
) -> tuple[Array, Array, Array]:
    return batch_norm(input, weight, bias, None, None, training, momentum, eps)[:3]


@lowers("aten.native_batch_norm_backward.default")
def batch_norm_backward(
    grad_out: Array,
    input: Array,
    weight: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    save_mean: Array | None,
    save_invstd: Array | None,
    train: bool,
    eps: float,
    output_mask: Mask,
) -> tuple[Array | None, ...]:
    x, grad, scale = _wide(input, grad_out, weight)
    axes = _batch_axes(x)
    if not train:
        mean, rstd = _running(running_mean, running_var, eps, x)
    else:
        mean, rstd = (_channels(cast(statistic, x.dtype), x.ndim) for statistic in (save_mean, save_invstd))
    normalized = (x - mean) * rstd
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad if scale is None else grad * _channels(scale, x.ndim)
        gradient = _normalization_gradient(scaled, normalized, rstd, axes) if train else scaled * rstd
        grad_input = cast(gradient, input.dtype)
    if output_mask[1]:
        grad_weight = cast(lax.reduce_sum(grad * normalized, axes), weight.dtype)
    if output_mask[2]:
        grad_bias = cast(lax.reduce_sum(grad, axes), input.dtype if weight is None else weight.dtype)
    return grad_input, grad_weight, grad_bias


# --- layer ---


@lowers("aten.native_layer_norm.default")
def layer_norm(
    input: Array, normalized_shape: Sequence[int], weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    x, scale, shift = _wide(input, weight, bias)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    mean, var = _moments(x, axes)
    rstd = lax.rsqrt(var + eps)
    result = (x - mean) * rstd
    if scale is not None:
        result = result * expand(scale, x.shape)
    if shift is not None:
        result = result + expand(shift, x.shape)
    saved = _saved_dtype(input, weight)
    return cast(result, input.dtype), cast(mean, saved), cast(rstd, saved)


@lowers("aten.native_layer_norm_backward.default")
def layer_norm_backward(
    grad_out: Array,
    input: Array,
    normalized_shape: Sequence[int],
    mean: Array,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    output_mask: Mask,
) -> tuple[Array | None, ...]:
    x, grad, scale = _wide(input, grad_out, weight)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    outer = tuple(range(x.ndim - len(normalized_shape)))
    normalized, rstd = _normalized(x, mean, rstd)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad if scale is None else grad * expand(scale, x.shape)
        grad_input = cast(_normalization_gradient(scaled, normalized, rstd, axes), input.dtype)
    if output_mask[1]:
        grad_weight = cast(lax.reduce_sum(grad * normalized, outer), weight.dtype)
    if output_mask[2]:
        grad_bias = cast(lax.reduce_sum(grad, outer), bias.dtype)
    return grad_input, grad_weight, grad_bias


def _normalized(x: Array, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """`(x - mean) * rstd` and `rstd`."""
    rstd = cast(rstd, x.dtype)
    return (x - cast(mean, x.dtype)) * rstd, rstd


# --- group ---


@lowers("aten.native_group_norm.default")
def group_norm(
    input: Array, weight: Array | None, bias: Array | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Array, Array, Array]:
    x, scale, shift = _wide(input, weight, bias)
    x = lax.reshape(x, (N, group, C // group, HxW))
    mean, var = _moments(x, (2, 3))
    rstd = lax.rsqrt(var + eps)
    result = lax.reshape((x - mean) * rstd, input.shape)
    if scale is not None:
        result = result * _channels(scale, input.ndim)
    if shift is not None:
        result = result + _channels(shift, input.ndim)
    saved = [cast(lax.squeeze(statistic, (2, 3)), _saved_dtype(input, weight)) for statistic in (mean, rstd)]
    return cast(result, input.dtype), *saved


@lowers("aten.native_group_norm_backward.default")
def group_norm_backward(
    grad_out: Array,
    input: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Mask,
) -> tuple[Array | None, ...]:
    x, grad, scale = _wide(input, grad_out, weight)
    grouped = (N, group, C // group, HxW)
    mean, rstd = lax.expand_dims(mean, (2, 3)), lax.expand_dims(rstd, (2, 3))
    normalized, rstd = _normalized(lax.reshape(x, grouped), mean, rstd)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad if scale is None else grad * _channels(scale, x.ndim)
        gradient = _normalization_gradient(lax.reshape(scaled, grouped), normalized, rstd, (2, 3))
        grad_input = cast(lax.reshape(gradient, input.shape), input.dtype)
    axes = _batch_axes(x)
    dtype = input.dtype if weight is None else weight.dtype
    if output_mask[1]:
        grad_weight = cast(lax.reduce_sum(grad * lax.reshape(normalized, x.shape), axes), dtype)
    if output_mask[2]:
        grad_bias = cast(lax.reduce_sum(grad, axes), dtype)
    return grad_input, grad_weight, grad_bias


# --- weights ---


def _slice_axes(v: Array, dim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(v.ndim) if axis != dim % v.ndim)


@lowers("aten._weight_norm_interface.default")
def weight_norm(v: Array, g: Array, dim: int = 0) -> tuple[Array, Array]:
    (wide,) = _wide(v)
    squares = lax.reduce_sum(wide * wide, _slice_axes(v, dim))
    norms = lax.reshape(lax.sqrt(squares), g.shape)
    return cast(wide * (cast(g, wide.dtype) / norms), v.dtype), norms


@lowers("aten._weight_norm_interface_backward.default")
def weight_norm_backward(
    grad_w: Array, saved_v: Array, saved_g: Array, saved_norms: Array, dim: int
) -> tuple[Array, Array]:
    grad, v, g, norms = _wide(grad_w, saved_v, saved_g, saved_norms)
    along = lax.reshape(lax.reduce_sum(grad * v, _slice_axes(v, dim)), g.shape)
    grad_v = g / norms * (grad - v * (along / (norms * norms)))
    return cast(grad_v, saved_v.dtype), cast(along / norms, saved_g.dtype)
