"""Reductions over dimensions, softmax, and running sums. Sixteen-bit floats are accumulated in float32."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import torch
from jax import lax

from .dtypes import jax_dtype, result_dtype
from .promotion import (
    BOOL,
    FLOAT32,
    INT64,
    Array,
    Number,
    aligned,
    cast,
    constant,
    expand,
    float_dtype,
    full,
    iota,
    opmath,
    select,
    size_of,
    wrap,
    wrap_all,
)
from .registry import lowers
from .views import diagonal, reshape

Dims = int | Sequence[int] | None


def reduced_shape(shape: Sequence[int], dims: Sequence[int], keepdim: bool = True) -> tuple[int, ...]:
    """`shape` with `dims` reduced to 1, or dropped."""
    return tuple(1 if d in dims else extent for d, extent in enumerate(shape) if keepdim or d not in dims)


def _kept(reduced: Array, shape: Sequence[int], dims: Sequence[int], keepdim: bool) -> Array:
    return lax.reshape(reduced, reduced_shape(shape, dims)) if keepdim and dims else reduced


def _reduce(function: Callable[..., Array], array: Array, dims: Dims, keepdim: bool = False) -> Array:
    dims = wrap_all(dims, array.ndim)
    return _kept(function(array, dims), array.shape, dims, keepdim) if dims else array


def _sum_dtype(self: Array, dtype: torch.dtype | None) -> jnp.dtype:
    if dtype is not None:
        return jax_dtype(dtype)
    return self.dtype if jnp.issubdtype(self.dtype, jnp.inexact) else INT64


# --- sums and products ---


@lowers("aten.sum.dim_IntList")
def sum_dims(self: Array, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Array:
    target = _sum_dtype(self, dtype)
    function = lax.reduce_or if target == BOOL else lax.reduce_sum
    return cast(_reduce(function, cast(self, opmath(target)), dim, keepdim), target)


@lowers("aten.sum.default")
def sum_all(self: Array, *, dtype: torch.dtype | None = None) -> Array:
    return sum_dims(self, dtype=dtype)


@lowers("aten.trace.default")
def trace(self: Array) -> Array:
    return sum_all(diagonal(self))


@lowers("aten.nansum.default")
def nansum(self: Array, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Array:
    return sum_dims(select(lax.ne(self, self), 0, self), dim, keepdim, dtype=dtype)


@lowers("aten.mean.dim")
def mean_dims(self: Array, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Array:
    target = jax_dtype(dtype) if dtype else self.dtype
    return cast(_mean(cast(self, opmath(target)), dim, keepdim), target)


def _mean(x: Array, dim: Dims, keepdim: bool) -> Array:
    count = size_of(x.shape, wrap_all(dim, x.ndim))
    return lax.div(_reduce(lax.reduce_sum, x, dim, keepdim), constant(count, x.dtype))


@lowers("aten.mean.default")
def mean_all(self: Array, *, dtype: torch.dtype | None = None) -> Array:
    return mean_dims(self, dtype=dtype)


@lowers("aten.prod.dim_int")
def product_dim(self: Array, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Array:
    target = _sum_dtype(self, dtype)
    function = lax.reduce_and if target == BOOL else lax.reduce_prod
    return cast(_reduce(function, cast(self, opmath(target)), dim, keepdim), target)


@lowers("aten.prod.default")
def product_all(self: Array, *, dtype: torch.dtype | None = None) -> Array:
    return product_dim(self, dtype=dtype)


@lowers("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")
def count_nonzero(self: Array, dim: Dims = None) -> Array:
    return _reduce(lax.reduce_sum, cast(cast(self, BOOL), INT64), dim)


@lowers("aten.any.default", "aten.any.dim", "aten.any.dims")
def any_true(self: Array, dim: Dims = None, keepdim: bool = False) -> Array:
    return _as_truth(_reduce(lax.reduce_or, cast(self, BOOL), dim, keepdim), self)


@lowers("aten.all.default", "aten.all.dim", "aten.all.dims")
def all_true(self: Array, dim: Dims = None, keepdim: bool = False) -> Array:
    return _as_truth(_reduce(lax.reduce_and, cast(self, BOOL), dim, keepdim), self)


def _as_truth(result: Array, self: Array) -> Array:
    return cast(result, self.dtype) if self.dtype == jnp.uint8 else result  # torch keeps uint8, its older bool.


# --- extremes ---


@lowers("aten.amax.default", "aten.max.default")
def amax(self: Array, dim: Dims = (), keepdim: bool = False) -> Array:
    return _reduce(lax.reduce_max, self, dim, keepdim)


@lowers("aten.amin.default", "aten.min.default")
def amin(self: Array, dim: Dims = (), keepdim: bool = False) -> Array:
    return _reduce(lax.reduce_min, self, dim, keepdim)


@lowers("aten.aminmax.default")
def aminmax(self: Array, *, dim: int | None = None, keepdim: bool = False) -> tuple[Array, Array]:
    return amin(self, dim, keepdim), amax(self, dim, keepdim)


def _argument(function: Callable[..., Array], self: Array, dim: int | None, keepdim: bool) -> Array:
    """The first position of the extreme; NaN is one, as in torch."""
    if self.ndim == 0:
        return full((), 0, INT64)
    if dim is None:
        position = function(lax.reshape(self, (self.size,)), 0, INT64)
        return lax.reshape(position, (1,) * self.ndim) if keepdim else position
    dim = wrap(dim, self.ndim)
    return _kept(function(self, dim, INT64), self.shape, (dim,), keepdim)


@lowers("aten.argmax.default")
def argmax(self: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return _argument(lax.argmax, self, dim, keepdim)


@lowers("aten.argmin.default")
def argmin(self: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return _argument(lax.argmin, self, dim, keepdim)


@lowers("aten.max.dim")
def max_dim(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return amax(self, dim, keepdim), argmax(self, dim, keepdim)


@lowers("aten.min.dim")
def min_dim(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return amin(self, dim, keepdim), argmin(self, dim, keepdim)


@lowers("aten.value_selecting_reduction_backward.default")
def value_selecting_reduction_backward(
    grad: Array, dim: int, indices: Array, sizes: Sequence[int], keepdim: bool
) -> Array:
    if not sizes:
        return grad
    dim = wrap(dim, len(sizes))
    row = reduced_shape(sizes, (dim,))
    chosen = lax.eq(iota(sizes, dim), expand(lax.reshape(indices, row), sizes))
    return select(chosen, expand(lax.reshape(grad, row), sizes), 0)


# --- variance ---


def _variance(self: Array, dim: Dims, correction: Number | None, keepdim: bool) -> tuple[Array, Array]:
    """The variance and the mean, in opmath."""
    x = cast(self, opmath(self.dtype))
    dims = wrap_all(dim, x.ndim)
    mean = _mean(x, dims, True)
    deviation = lax.sub(x, expand(mean, x.shape))
    total = _reduce(lax.reduce_sum, lax.mul(deviation, deviation), dims, keepdim)
    freedom = max(0.0, size_of(x.shape, dims) - (1 if correction is None else correction))
    return lax.div(total, constant(freedom, x.dtype)), reshape(mean, total.shape)


@lowers("aten.var.correction")
def variance(self: Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False) -> Array:
    return cast(_variance(self, dim, correction, keepdim)[0], self.dtype)


@lowers("aten.std.correction")
def deviation(self: Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False) -> Array:
    return cast(lax.sqrt(_variance(self, dim, correction, keepdim)[0]), self.dtype)


@lowers("aten.var_mean.correction")
def variance_mean(
    self: Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False
) -> tuple[Array, Array]:
    variance, mean = _variance(self, dim, correction, keepdim)
    return cast(variance, self.dtype), cast(mean, self.dtype)


@lowers("aten.std_mean.correction")
def deviation_mean(
    self: Array, dim: Dims = None, *, correction: Number | None = None, keepdim: bool = False
) -> tuple[Array, Array]:
    variance, mean = _variance(self, dim, correction, keepdim)
    return cast(lax.sqrt(variance), self.dtype), cast(mean, self.dtype)


# --- norms ---


@lowers("aten.linalg_vector_norm.default")
def vector_norm(
    self: Array, ord: Number = 2, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Array:
    target = jax_dtype(dtype) if dtype else self.dtype
    x = lax.abs(cast(self, opmath(target)))
    if ord == 2:
        result = lax.sqrt(_reduce(lax.reduce_sum, lax.mul(x, x), dim, keepdim))
    elif ord == 1:
        result = _reduce(lax.reduce_sum, x, dim, keepdim)
    elif ord == 0:
        result = _reduce(lax.reduce_sum, cast(lax.ne(x, constant(0, x.dtype)), x.dtype), dim, keepdim)
    elif math.isinf(ord):
        result = _reduce(lax.reduce_max if ord > 0 else lax.reduce_min, x, dim, keepdim)
    else:
        total = _reduce(lax.reduce_sum, lax.pow(x, constant(ord, x.dtype)), dim, keepdim)
        result = lax.pow(total, constant(1 / ord, x.dtype))
    return cast(result, target)


@lowers(*(f"aten.norm.{kind}" for kind in ("Scalar", "ScalarOpt_dtype", "ScalarOpt_dim", "ScalarOpt_dim_dtype")))
def norm(
    self: Array, p: Number | None = 2, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Array:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


@lowers("aten.dist.default")
def dist(self: Array, other: Array, p: Number = 2) -> Array:
    return vector_norm(lax.sub(*aligned(result_dtype(self, other), self, other)), p)


@lowers("aten.renorm.default")
def renorm(self: Array, p: Number, dim: int, maxnorm: Number) -> Array:
    others = [d for d in range(self.ndim) if d != wrap(dim, self.ndim)]
    x = cast(self, opmath(self.dtype))
    norms = vector_norm(x, p, others, True)
    factor = select(norms > maxnorm, maxnorm / (norms + 1e-7), 1)
    return cast(lax.mul(x, expand(factor, x.shape)), self.dtype)


# --- softmax ---


def _shifted(x: Array, dim: int) -> Array:
    """`x` less its maximum."""
    return lax.sub(x, expand(_reduce(lax.reduce_max, x, dim, True), x.shape))


@lowers("aten._softmax.default")
def softmax(self: Array, dim: int, half_to_float: bool) -> Array:
    target = FLOAT32 if half_to_float else self.dtype
    x = cast(self, opmath(self.dtype))
    if x.ndim == 0:
        return full((), 1, target)
    exponentials = lax.exp(_shifted(x, dim))
    total = _reduce(lax.reduce_sum, exponentials, dim, True)
    return cast(lax.div(exponentials, expand(total, x.shape)), target)


@lowers("aten._log_softmax.default")
def log_softmax(self: Array, dim: int, half_to_float: bool) -> Array:
    target = FLOAT32 if half_to_float else self.dtype
    x = cast(self, opmath(self.dtype))
    if x.ndim == 0:
        return full((), 0, target)
    shifted = _shifted(x, dim)
    total = _reduce(lax.reduce_sum, lax.exp(shifted), dim, True)
    return cast(lax.sub(shifted, expand(lax.log(total), x.shape)), target)


@lowers("aten._softmax_backward_data.default")
def softmax_backward(grad_output: Array, output: Array, dim: int, input_dtype: torch.dtype) -> Array:
    working = opmath(output.dtype)
    grad, output = cast(grad_output, working), cast(output, working)
    weighted = lax.mul(grad, output)
    total = expand(_reduce(lax.reduce_sum, weighted, dim, True), weighted.shape)
    return cast(lax.sub(weighted, lax.mul(output, total)), jax_dtype(input_dtype))


@lowers("aten._log_softmax_backward_data.default")
def log_softmax_backward(grad_output: Array, output: Array, dim: int, input_dtype: torch.dtype) -> Array:
    working = opmath(output.dtype)
    grad, output = cast(grad_output, working), cast(output, working)
    total = expand(_reduce(lax.reduce_sum, grad, dim, True), grad.shape)
    return cast(lax.sub(grad, lax.mul(lax.exp(output), total)), jax_dtype(input_dtype))


@lowers("aten.logsumexp.default")
def logsumexp(self: Array, dim: Dims, keepdim: bool = False) -> Array:
    target = float_dtype(self)
    x = cast(self, opmath(target))
    dims = wrap_all(dim, x.ndim)
    highest = _reduce(lax.reduce_max, x, dims, True)
    highest = select(lax.eq(lax.abs(highest), constant(math.inf, x.dtype)), 0, highest)
    total = _reduce(lax.reduce_sum, lax.exp(lax.sub(x, expand(highest, x.shape))), dims, keepdim)
    return cast(lax.add(lax.log(total), reshape(highest, total.shape)), target)


# --- running reductions ---


def _running(function: Callable[..., Array], self: Array, dim: int, target: jnp.dtype) -> Array:
    if self.ndim == 0:
        return cast(self, target)
    return cast(function(cast(self, opmath(target)), axis=wrap(dim, self.ndim)), target)


@lowers("aten.cumsum.default")
def cumsum(self: Array, dim: int, *, dtype: torch.dtype | None = None) -> Array:
    return _running(lax.cumsum, self, dim, _sum_dtype(self, dtype))


@lowers("aten.cumprod.default")
def cumprod(self: Array, dim: int, *, dtype: torch.dtype | None = None) -> Array:
    return _running(lax.cumprod, self, dim, _sum_dtype(self, dtype))


@lowers("aten.logcumsumexp.default", "aten._logcumsumexp.default")
def logcumsumexp(self: Array, dim: int) -> Array:
    return _running(lax.cumlogsumexp, self, dim, self.dtype)


def _running_extreme(function: Callable[..., Array], self: Array, dim: int) -> tuple[Array, Array]:
    """The extreme so far, and its last position so far."""
    if self.ndim == 0:
        return self, full((), 0, INT64)
    dim = wrap(dim, self.ndim)
    values = cast(function(cast(self, jnp.uint8) if self.dtype == BOOL else self, axis=dim), self.dtype)
    renewed = lax.eq(self, values) | lax.ne(self, self)
    positions = select(renewed, iota(self.shape, dim), 0)
    return values, lax.cummax(positions, axis=dim)


@lowers("aten.cummax.default")
def cummax(self: Array, dim: int) -> tuple[Array, Array]:
    return _running_extreme(lax.cummax, self, dim)


@lowers("aten.cummin.default")
def cummin(self: Array, dim: int) -> tuple[Array, Array]:
    return _running_extreme(lax.cummin, self, dim)
