"""Reads and writes at positions given by tensors: index, gather, scatter and their kin.

Positions are wrapped where negative, as torch wraps them. XLA is promised that they are in bounds, and the program
checks it.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from .dtypes import result_dtype
from .promotion import (
    BOOL,
    INT32,
    INT64,
    Array,
    Number,
    Operand,
    cast,
    constant,
    expand,
    full,
    iota,
    is_number,
    opmath,
    select,
    wrap,
)
from .registry import lowers
from .value_checks import require_between
from .views import reshape

IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def in_bounds(index: Array, extent: int) -> Array:
    """`index` with negative positions counted from the end, in 32 bits where `extent` allows."""
    require_between(index, -extent, extent - 1)
    index = cast(index, INT32 if extent < 2**31 else INT64)
    return select(index < 0, lax.add(index, constant(extent, index.dtype)), index)


def _scatter_sum(array: Array, indices: Array, updates: Array, numbers: lax.ScatterDimensionNumbers, **mode) -> Array:
    """`lax.scatter_add`, 16-bit floats added up in float32: more exact, and faster than 16-bit atomics."""
    if array.dtype == BOOL:
        return lax.scatter_max(array, indices, updates, numbers, **mode)
    working = opmath(array.dtype)
    return cast(lax.scatter_add(cast(array, working), indices, cast(updates, working), numbers, **mode), array.dtype)


# --- index: one index array for each of some dimensions, together ---


class _Positions:
    """Index arrays for some dimensions of a shape, laid out as `lax.gather` and `lax.scatter` want them."""

    def __init__(self, shape: Sequence[int], indices: Sequence[Array | None]) -> None:
        self.dims = [dim for dim, index in enumerate(indices) if index is not None]
        arrays = [in_bounds(indices[dim], shape[dim]) for dim in self.dims]
        widest = INT64 if any(array.dtype == INT64 for array in arrays) else INT32
        self.extents = np.broadcast_shapes(*(array.shape for array in arrays))
        rest = [dim for dim in range(len(shape)) if dim not in self.dims]
        adjacent = self.dims[-1] - self.dims[0] == len(self.dims) - 1
        # Index arrays next to each other leave their dimensions in place, others come first.
        self.at = self.dims[0] if adjacent else 0
        self.columns = lax.concatenate(
            [lax.reshape(expand(cast(array, widest), self.extents), (*self.extents, 1)) for array in arrays],
            len(self.extents),
        )
        self.window = tuple(place if place < self.at else place + len(self.extents) for place in range(len(rest)))
        self.slice_sizes = [1 if dim in self.dims else extent for dim, extent in enumerate(shape)]
        kept = [shape[dim] for dim in rest]
        self.shape = (*kept[: self.at], *self.extents, *kept[self.at :])

    def gather(self, array: Array) -> Array:
        numbers = lax.GatherDimensionNumbers(
            offset_dims=self.window, collapsed_slice_dims=tuple(self.dims), start_index_map=tuple(self.dims)
        )
        return lax.gather(array, self.columns, numbers, self.slice_sizes, mode=IN_BOUNDS)

    def scatter(self, scatter: Callable[..., Array], array: Array, updates: Array) -> Array:
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=self.window,
            inserted_window_dims=tuple(self.dims),
            scatter_dims_to_operand_dims=tuple(self.dims),
        )
        return scatter(array, self.columns, expand(updates, self.shape), numbers, mode=IN_BOUNDS)


def _refuse_masks(indices: Sequence[Array | None]) -> None:
    if any(index is not None and index.dtype in (BOOL, jnp.uint8) for index in indices):
        raise NotImplementedError(
            "a boolean mask selects a number of elements that depends on its values, and a compiled program needs "
            "fixed shapes; use torch.where or masked_fill, or integer indices"
        )


@lowers("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(self: Array, indices: Sequence[Array | None]) -> Array:
    _refuse_masks(indices)
    return _Positions(self.shape, indices).gather(self)


@lowers(*(f"aten.{name}.default" for name in ("index_put", "_unsafe_index_put", "_index_put_impl")))
def index_put(
    self: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False, unsafe: bool = False
) -> Array:
    masks = [index for index in indices if index is not None and index.dtype in (BOOL, jnp.uint8)]
    if masks:
        return _mask_put(self, indices, values, accumulate)
    scatter = _scatter_sum if accumulate else lax.scatter
    return _Positions(self.shape, indices).scatter(scatter, self, cast(values, self.dtype))


def _mask_put(self: Array, indices: Sequence[Array | None], values: Array, accumulate: bool) -> Array:
    """Writes through one mask; possible where each selected position receives the same values."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    dim, mask = given[0], cast(indices[given[0]], BOOL)
    # In torch the mask's dimensions become one, the selected positions; here they stay.
    extents = (1,) * (self.ndim - mask.ndim + 1 - values.ndim) + values.shape
    if len(given) > 1 or extents[dim] != 1:
        _refuse_masks(indices)
    values = reshape(cast(values, self.dtype), (*extents[:dim], *[1] * mask.ndim, *extents[dim + 1 :]))
    mask = reshape(mask, (*mask.shape, *[1] * (self.ndim - dim - mask.ndim)))
    return select(mask, lax.add(self, expand(values, self.shape)) if accumulate else values, self)


@lowers("aten.take.default")
def take(self: Array, index: Array) -> Array:
    return _Positions((self.size,), [index]).gather(reshape(self, (-1,)))


@lowers("aten.put.default")
def put(self: Array, index: Array, source: Array, accumulate: bool = False) -> Array:
    positions = _Positions((self.size,), [reshape(index, (-1,))])
    scatter = _scatter_sum if accumulate else lax.scatter
    return reshape(positions.scatter(scatter, reshape(self, (-1,)), reshape(source, (-1,))), self.shape)


@lowers("aten.masked_scatter.default")
def masked_scatter(self: Array, mask: Array, source: Array) -> Array:
    shape = np.broadcast_shapes(self.shape, mask.shape)
    if source.size == 0:
        return expand(self, shape)
    mask = expand(mask, shape)
    order = lax.cumsum(cast(reshape(mask, (-1,)), INT64), axis=0)
    chosen = _Positions((source.size,), [lax.max(order - 1, INT64.type(0))]).gather(reshape(source, (-1,)))
    return select(mask, reshape(chosen, shape), expand(self, shape))


@lowers("aten.masked_scatter_backward.default")
def masked_scatter_backward(grad_output: Array, mask: Array, sizes: Sequence[int]) -> Array:
    mask = reshape(expand(mask, grad_output.shape), (-1,))
    order = lax.cumsum(cast(mask, INT64), axis=0)
    positions = select(mask, order - 1, math.prod(sizes))  # Past the end: dropped.
    flat = full((math.prod(sizes),), 0, grad_output.dtype)
    return reshape(flat.at[positions].set(reshape(grad_output, (-1,)), mode="drop"), sizes)


@lowers("aten.fill_diagonal.default")
def fill_diagonal(self: Array, fill_value: Number, wrap: bool = False) -> Array:
    places = [iota(self.shape, dim) for dim in range(self.ndim)]
    if wrap and self.ndim == 2:
        places[0] = places[0] % (self.shape[1] + 1)
    on = functools.reduce(lax.bitwise_and, (lax.eq(places[0], place) for place in places[1:]))
    return select(on, fill_value, self)


@lowers("aten.nonzero_static.default")
def nonzero_static(self: Array, *, size: int, fill_value: int = -1) -> Array:
    if self.ndim == 0 or self.size == 0:
        return full((size, self.ndim), fill_value, INT64)
    return jnp.stack(jnp.nonzero(self, size=size, fill_value=fill_value), axis=-1)


# --- index_*: one index vector for one dimension ---


def _along(self: Array, dim: int, index: Array) -> tuple[Array, _Positions]:
    """`self` with at least one dimension, and the positions of a vector index along `dim`."""
    array = self if self.ndim else lax.reshape(self, (1,))
    indices = [None] * wrap(dim, self.ndim) + [reshape(index, (-1,))]
    return array, _Positions(array.shape, indices)


def _write_along(scatter: Callable[..., Array], self: Array, dim: int, index: Array, source: Array) -> Array:
    array, positions = _along(self, dim, index)
    source = cast(source, self.dtype)
    if source.ndim == 0 and array.ndim == 1:
        source = lax.reshape(source, (1,))
    return lax.reshape(positions.scatter(scatter, array, source), self.shape)


@lowers("aten.index_select.default")
def index_select(self: Array, dim: int, index: Array) -> Array:
    array, positions = _along(self, dim, index)
    result = positions.gather(array)
    return result if self.ndim else lax.reshape(result, ())


@lowers("aten.index_add.default")
def index_add(self: Array, dim: int, index: Array, source: Array, *, alpha: Number = 1) -> Array:
    if self.dtype == BOOL:
        source = source if alpha else full(source.shape, False, BOOL)
    elif alpha != 1:
        source = lax.mul(source, constant(alpha, source.dtype))
    return _write_along(_scatter_sum, self, dim, index, source)


@lowers("aten.index_copy.default")
def index_copy(self: Array, dim: int, index: Array, source: Array) -> Array:
    return _write_along(lax.scatter, self, dim, index, source)


@lowers("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(self: Array, dim: int, index: Array, value: Operand) -> Array:
    return _write_along(lax.scatter, self, dim, index, cast(value, self.dtype))


@lowers("aten.index_reduce.default")
def index_reduce(
    self: Array, dim: int, index: Array, source: Array, reduce: str, *, include_self: bool = True
) -> Array:
    return _reduced(
        reduce, include_self, self, source, lambda scatter, array, s: _write_along(scatter, array, dim, index, s)
    )


# --- gather and scatter: one index for each element ---


def _vector(array: Array) -> Array:
    return array if array.ndim else lax.reshape(array, (1,))


def _others(ndim: int, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d != dim)


def _within(array: Array, shape: Sequence[int], dim: int) -> Array:
    """The part of `array` that an index of `shape` can name: its leading corner in all dimensions but `dim`."""
    limits = [extent if d == dim else shape[d] for d, extent in enumerate(array.shape)]
    return array if tuple(limits) == array.shape else lax.slice(array, [0] * array.ndim, limits)


@lowers("aten.gather.default")
def gather(self: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    shape, self, index, dim = index.shape, _vector(self), _vector(index), wrap(dim, self.ndim)
    if index.size == 0:
        return full(shape, 0, self.dtype)
    others = _others(self.ndim, dim)
    columns = lax.reshape(in_bounds(index, self.shape[dim]), (*index.shape, 1))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(dim,),
        start_index_map=(dim,),
        operand_batching_dims=others,
        start_indices_batching_dims=others,
    )
    result = lax.gather(_within(self, index.shape, dim), columns, numbers, [1] * self.ndim, mode=IN_BOUNDS)
    return lax.reshape(result, shape)


def _scatter(scatter: Callable[..., Array], self: Array, dim: int, index: Array, source: Array) -> Array:
    shape, dim = self.shape, wrap(dim, self.ndim)
    self, index, source = _vector(self), _vector(index), _vector(source)
    if index.size == 0:
        return lax.reshape(self, shape)
    others = _others(self.ndim, dim)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(dim,),
        scatter_dims_to_operand_dims=(dim,),
        operand_batching_dims=others,
        scatter_indices_batching_dims=others,
    )
    columns = lax.reshape(in_bounds(index, self.shape[dim]), (*index.shape, 1))
    part, source = _within(self, index.shape, dim), lax.slice(source, [0] * source.ndim, index.shape)
    written = scatter(part, columns, source, numbers, mode=IN_BOUNDS)
    if part.shape != self.shape:
        written = lax.dynamic_update_slice(self, written, [0] * self.ndim)
    return lax.reshape(written, shape)


def _source(self: Array, index: Array, src: Operand) -> Array:
    return full(index.shape, src, self.dtype) if is_number(src) else src


@lowers("aten.scatter.src", "aten.scatter.value")
def scatter(self: Array, dim: int, index: Array, src: Operand) -> Array:
    return _scatter(lax.scatter, self, dim, index, _source(self, index, src))


@lowers("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter_with(self: Array, dim: int, index: Array, src: Operand, *, reduce: str) -> Array:
    operation = {"add": _scatter_sum, "multiply": lax.scatter_mul}[reduce]
    return _scatter(operation, self, dim, index, _source(self, index, src))


@lowers("aten.scatter_add.default")
def scatter_add(self: Array, dim: int, index: Array, src: Array) -> Array:
    return _scatter(_scatter_sum, self, dim, index, src)


@lowers("aten.scatter_reduce.two")
def scatter_reduce(self: Array, dim: int, index: Array, src: Array, reduce: str, *, include_self: bool = True) -> Array:
    return _reduced(reduce, include_self, self, src, lambda scatter, array, s: _scatter(scatter, array, dim, index, s))


def _reduced(
    reduce: str, include_self: bool, self: Array, source: Array, write: Callable[[Callable, Array, Array], Array]
) -> Array:
    """A reducing scatter; `write(scatter, array, source)` puts `source` at the positions."""
    lowest, highest = _limits(self.dtype)
    operation, identity = {
        "sum": (_scatter_sum, 0),
        "mean": (_scatter_sum, 0),
        "prod": (lax.scatter_min if self.dtype == BOOL else lax.scatter_mul, 1),
        "amax": (lax.scatter_max, lowest),
        "amin": (lax.scatter_min, highest),
    }[reduce]
    base = self if include_self else write(lax.scatter, self, full(source.shape, identity, self.dtype))
    result = write(operation, base, source)
    if reduce != "mean":
        return result
    counts = write(
        _scatter_sum, full(self.shape, 1 if include_self else 0, self.dtype), full(source.shape, 1, self.dtype)
    )
    counts = lax.max(counts, cast(1, self.dtype))
    return lax.div(result, counts) if jnp.issubdtype(self.dtype, jnp.inexact) else jnp.floor_divide(result, counts)


def _limits(dtype: jnp.dtype) -> tuple[Number, Number]:
    if jnp.issubdtype(dtype, jnp.inexact):
        return -math.inf, math.inf
    if dtype == BOOL:
        return False, True
    return int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)


# --- searching a sorted sequence ---


@lowers("aten.searchsorted.Tensor", "aten.searchsorted.Scalar")
def searchsorted(
    sorted_sequence: Array,
    self: Operand,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    values = cast(self, result_dtype(sorted_sequence, self))
    sequence = cast(sorted_sequence if sorter is None else gather(sorted_sequence, -1, sorter), values.dtype)
    search = jnp.vectorize(
        lambda row, value: jnp.searchsorted(row, value, side="right" if right or side == "right" else "left"),
        signature="(n),(m)->(m)",
    )
    found = search(sequence, _vector(values) if sequence.ndim == 1 else values)
    return cast(lax.reshape(found, values.shape), jnp.dtype("int32") if out_int32 else INT64)


@lowers("aten.bucketize.Tensor", "aten.bucketize.Scalar")
def bucketize(self: Operand, boundaries: Array, *, out_int32: bool = False, right: bool = False) -> Array:
    values = reshape(cast(self, result_dtype(boundaries, self)), (-1,))
    found = searchsorted(boundaries, values, out_int32=out_int32, right=right)
    return reshape(found, () if is_number(self) else self.shape)
