"""Orders: sort, topk, and the order statistics. NaN counts as the largest value, as in torch."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from .promotion import INT64, Array, cast, expand, full, iota, is_float, opmath, select, wrap
from .reductions import reduced_shape
from .registry import lowers


def _sorted(self: Array, dim: int, descending: bool) -> tuple[Array, Array]:
    """The values in order and where each stood; equal values keep their order."""
    if self.ndim == 0:
        return self, full((), 0, INT64)
    dim = wrap(dim, self.ndim)
    positions = iota(self.shape, dim)
    if not descending:
        return tuple(lax.sort((self, positions), dimension=dim, num_keys=1))
    # Reversed before and after: ascending stable order read backwards would otherwise reverse equal values.
    operands = lax.rev(self, (dim,)), lax.rev(positions, (dim,))
    values, indices = lax.sort(operands, dimension=dim, num_keys=1)
    return lax.rev(values, (dim,)), lax.rev(indices, (dim,))


@lowers("aten.sort.default")
def sort(self: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    return _sorted(self, dim, descending)


@lowers("aten.sort.stable")
def sort_stable(
    self: Array, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Array, Array]:
    return _sorted(self, dim, descending)


@lowers("aten.argsort.default")
def argsort(self: Array, dim: int = -1, descending: bool = False) -> Array:
    return _sorted(self, dim, descending)[1]


@lowers("aten.argsort.stable")
def argsort_stable(self: Array, *, stable: bool, dim: int = -1, descending: bool = False) -> Array:
    return _sorted(self, dim, descending)[1]


@lowers("aten.topk.default")
def topk(self: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Array, Array]:
    if self.ndim == 0:
        return self, full((), 0, INT64)
    dim = wrap(dim, self.ndim)
    keys = self
    if not largest:
        keys = lax.neg(self) if is_float(self.dtype) else lax.bitwise_not(self)
        if is_float(self.dtype):  # NaN is the largest value in either direction, so its negative must come last.
            keys = select(lax.ne(self, self), -jnp.inf, keys)
    values, indices = lax.top_k(jnp.moveaxis(keys, dim, -1), k)
    values, indices = jnp.moveaxis(values, -1, dim), cast(jnp.moveaxis(indices, -1, dim), INT64)
    if not largest:
        values = jnp.take_along_axis(self, indices, dim, mode="promise_in_bounds")
    return values, indices


def _order_statistic(self: Array, dim: int, keepdim: bool, rank: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The value at position `rank(number of NaNs)` of the ascending order, and where it stood."""
    if self.ndim == 0:
        return self, full((), 0, INT64)
    dim = wrap(dim, self.ndim)
    values, indices = _sorted(self, dim, False)
    nans = lax.reduce_sum(cast(lax.ne(self, self), INT64), (dim,))
    ranks = jnp.expand_dims(rank(nans), dim)
    chosen = lax.eq(iota(self.shape, dim), expand(ranks, self.shape))
    shape = reduced_shape(self.shape, (dim,), keepdim)
    # One position is chosen in each row, and the others are masked below it, so the maximum reads it.
    position = lax.reduce_max(select(chosen, indices, -1), (dim,))
    value = jnp.take_along_axis(self, jnp.expand_dims(position, dim), dim, mode="promise_in_bounds")
    return lax.reshape(value, shape), lax.reshape(position, shape)


@lowers("aten.kthvalue.default")
def kthvalue(self: Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    return _order_statistic(self, dim, keepdim, lambda nans: jnp.full_like(nans, k - 1))


@lowers("aten.median.dim")
def median_dim(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    extent = self.shape[dim] if self.ndim else 1
    return _order_statistic(self, dim, keepdim, lambda nans: jnp.where(nans > 0, extent - nans, (extent - 1) // 2))


@lowers("aten.nanmedian.dim")
def nanmedian_dim(self: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    extent = self.shape[dim] if self.ndim else 1
    return _order_statistic(self, dim, keepdim, lambda nans: jnp.maximum((extent - nans - 1) // 2, 0))


@lowers("aten.median.default")
def median(self: Array) -> Array:
    return median_dim(lax.reshape(self, (self.size,)), 0)[0]


@lowers("aten.nanmedian.default")
def nanmedian(self: Array) -> Array:
    return nanmedian_dim(lax.reshape(self, (self.size,)), 0)[0]


@lowers("aten.mode.default")
def mode(self: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The most frequent value, the smallest of several, and where it stands last."""
    if self.ndim == 0:
        return self, full((), 0, INT64)
    dim = wrap(dim, self.ndim)
    values, indices = _sorted(self, dim, False)
    position = iota(self.shape, dim)
    before = jnp.roll(values, 1, dim)
    starts = lax.cummax(select((position == 0) | (values != before), position, 0), axis=dim)
    best = jnp.argmax(position - starts, axis=dim, keepdims=True)  # the end of the first of the longest runs
    shape = reduced_shape(self.shape, (dim,), keepdim)
    return tuple(
        lax.reshape(jnp.take_along_axis(array, best, dim, mode="promise_in_bounds"), shape)
        for array in (values, indices)
    )


@lowers("aten.histc.default")
def histc(self: Array, bins: int = 100, min: float = 0, max: float = 0) -> Array:  # noqa: A002 - schema's names
    x = cast(lax.reshape(self, (self.size,)), opmath(self.dtype))
    low, high = (jnp.asarray(bound, x.dtype) for bound in (min, max))
    if min == max and x.size:
        low, high = lax.reduce_min(x, (0,)), lax.reduce_max(x, (0,))
    flat = low == high
    low, high = select(flat, low - 1, low), select(flat, high + 1, high)
    inside = (x >= low) & (x <= high)
    place = lax.min(cast((select(inside, x, low) - low) * bins / (high - low), INT64), INT64.type(bins - 1))
    counts = full((bins,), 0, INT64).at[place].add(cast(inside, INT64), mode="promise_in_bounds")
    return cast(counts, self.dtype)
