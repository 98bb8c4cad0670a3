"""Views as pure functions, and how a write through each reaches the tensor that it is a view of."""

import math
import sys
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import torch
from jax import lax

from .dtypes import jax_dtype
from .promotion import BOOL, INT64, Array, cast, expand, full, iota, select, wrap
from .registry import inverts_view, lowers


def _view(*names: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Registers a view and its copying twin, `aten.slice.Tensor` and `aten.slice_copy.Tensor`."""
    pairs = [name.split(".") for name in names]
    return lowers(*(f"aten.{name}{copy}.{overload}" for name, overload in pairs for copy in ("", "_copy")))


def _without_unknown(count: int, size: Sequence[int]) -> tuple[int, ...]:
    """`size`, an entry of -1 replaced so that `count` elements fit."""
    known = math.prod(extent for extent in size if extent != -1)
    return tuple(count // max(known, 1) if extent == -1 else extent for extent in size)


def reshape(array: Array, size: Sequence[int]) -> Array:
    """`array` with another shape; one entry of `size` may be -1."""
    size = _without_unknown(array.size, size) if -1 in size else tuple(size)
    return array if array.shape == size else lax.reshape(array, size)


# --- same elements, same order ---


@_view("view.default", "_reshape_alias.default")
@lowers("aten._unsafe_view.default", "aten.reshape.default")
def view(self: Array, size: Sequence[int], stride: Sequence[int] | None = None) -> Array:
    return reshape(self, size)


@_view("squeeze.default", "squeeze.dim", "squeeze.dims")
def squeeze(self: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    dropped = {wrap(d, self.ndim) for d in dims}
    return reshape(self, [extent for d, extent in enumerate(self.shape) if d not in dropped or extent != 1])


@_view("unsqueeze.default")
def unsqueeze(self: Array, dim: int) -> Array:
    dim = wrap(dim, self.ndim + 1)
    return reshape(self, (*self.shape[:dim], 1, *self.shape[dim:]))


@lowers("aten.flatten.using_ints")
def flatten(self: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = wrap(start_dim, self.ndim), wrap(end_dim, self.ndim)
    return reshape(self, (*self.shape[:start], math.prod(self.shape[start : end + 1]), *self.shape[end + 1 :]))


@lowers("aten.unflatten.int")
def unflatten(self: Array, dim: int, sizes: Sequence[int]) -> Array:
    dim = wrap(dim, self.ndim)
    return reshape(self, (*self.shape[:dim], *_without_unknown(self.shape[dim], sizes), *self.shape[dim + 1 :]))


@_view("alias.default", "detach.default", "lift_fresh.default")
def alias(self: Array) -> Array:
    return self


@_view("view.dtype")
def view_dtype(self: Array, dtype: torch.dtype) -> Array:
    return _bitcast(self, jax_dtype(dtype))


def _bitcast(array: Array, dtype: jnp.dtype) -> Array:
    ratio = array.dtype.itemsize / dtype.itemsize
    if BOOL in (array.dtype, dtype) and array.dtype != dtype:
        return _bitcast(cast(array, jnp.uint8), dtype) if array.dtype == BOOL else cast(array, BOOL)
    if ratio < 1:
        array = lax.reshape(array, (*array.shape[:-1], int(array.shape[-1] * ratio), int(1 / ratio)))
    result = lax.bitcast_convert_type(array, dtype)
    return lax.reshape(result, (*result.shape[:-2], result.shape[-2] * int(ratio))) if ratio > 1 else result


@inverts_view(
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten._reshape_alias.default",
    "aten.reshape.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh.default",
)
def write_reshaped(parent: Array, child: Array, *arguments: object) -> Array:
    return reshape(child, parent.shape)


@inverts_view("aten.view.dtype")
def write_view_dtype(parent: Array, child: Array, dtype: torch.dtype) -> Array:
    return _bitcast(child, parent.dtype)


# --- same elements, another order ---


@_view("permute.default")
def permute(self: Array, dims: Sequence[int]) -> Array:
    dims = [wrap(dim, self.ndim) for dim in dims]
    return self if dims == sorted(dims) else lax.transpose(self, dims)


@inverts_view("aten.permute.default")
def write_permuted(parent: Array, child: Array, dims: Sequence[int]) -> Array:
    dims = [wrap(dim, parent.ndim) for dim in dims]
    return permute(child, [dims.index(dim) for dim in range(parent.ndim)])


@_view("transpose.int")
@lowers("aten.swapaxes.default", "aten.transpose.default")
def transpose(self: Array, dim0: int, dim1: int) -> Array:
    if self.ndim == 0:
        return self
    dims = list(range(self.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(self, dims)


@_view("t.default")
def t(self: Array) -> Array:
    return transpose(self, 0, 1) if self.ndim == 2 else self


@inverts_view("aten.transpose.int", "aten.swapaxes.default")
def write_transposed(parent: Array, child: Array, dim0: int, dim1: int) -> Array:
    return transpose(child, dim0, dim1)


inverts_view("aten.t.default")(lambda parent, child: t(child))


@lowers("aten.movedim.int", "aten.movedim.intlist")
def movedim(self: Array, source: int | Sequence[int], destination: int | Sequence[int]) -> Array:
    return permute(self, _moved(self.ndim, source, destination))


@inverts_view("aten.movedim.int", "aten.movedim.intlist")
def write_movedim(parent: Array, child: Array, source: int | Sequence[int], destination: int | Sequence[int]) -> Array:
    return write_permuted(parent, child, _moved(parent.ndim, source, destination))


def _moved(ndim: int, source: int | Sequence[int], destination: int | Sequence[int]) -> list[int]:
    sources = [wrap(d, ndim) for d in ([source] if isinstance(source, int) else source)]
    targets = [wrap(d, ndim) for d in ([destination] if isinstance(destination, int) else destination)]
    dims = [d for d in range(ndim) if d not in sources]
    for target, origin in sorted(zip(targets, sources, strict=True)):
        dims.insert(target, origin)
    return dims


# --- repeated elements ---


@_view("expand.default")
def expand_view(self: Array, size: Sequence[int], implicit: bool = False) -> Array:
    lead = len(size) - self.ndim
    return expand(self, [self.shape[d - lead] if extent == -1 else extent for d, extent in enumerate(size)])


@inverts_view("aten.expand.default")
def write_expanded(parent: Array, child: Array, size: Sequence[int], implicit: bool = False) -> Array:
    # torch refuses a write in which one parent element would receive several values, so any of them will do.
    lead = child.ndim - parent.ndim
    limits = [1] * lead + list(parent.shape)
    return lax.reshape(lax.slice(child, [0] * child.ndim, limits), parent.shape)


# --- part of the elements ---


def slice_bounds(extent: int, start: int | None, end: int | None) -> tuple[int, int]:
    """The first position and the one past the last, counted from the front and clamped as torch clamps them."""
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    start = min(max(start + extent if start < 0 else start, 0), extent)
    end = min(max(end + extent if end < 0 else end, start), extent)
    return start, end


@_view("slice.Tensor")
def slice_view(self: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    dim = wrap(dim, self.ndim)
    start, end = slice_bounds(self.shape[dim], start, end)
    if (start, end, step) == (0, self.shape[dim], 1):
        return self
    return lax.slice_in_dim(self, start, end, step, dim)


def write_strided(parent: Array, child: Array, dim: int, start: int, step: int) -> Array:
    """`parent` with every `step`-th position of `dim` from `start` on replaced by `child`."""
    count, extent = child.shape[dim], parent.shape[dim]
    if count == extent:
        return child
    if step == 1:
        return lax.dynamic_update_slice_in_dim(parent, child, start, dim)
    # Spread by padding, and chosen by a mask: XLA fuses both, where a scatter would be a kernel of its own.
    position = lax.sub(iota(parent.shape, dim), INT64.type(start))
    inside = (position >= 0) & (position % step == 0)
    return select(inside, spread(child, parent.shape, dim, start, step), parent)


def spread(child: Array, shape: Sequence[int], dim: int, start: int, step: int) -> Array:
    """Zeros of `shape` with `child` at every `step`-th position of `dim` from `start` on."""
    count = child.shape[dim]
    if count == 0:
        return full(shape, 0, child.dtype)
    padding = [(0, 0, 0)] * child.ndim
    padding[dim] = (start, shape[dim] - start - (count - 1) * step - 1, step - 1)
    return lax.pad(child, child.dtype.type(0), padding)


@inverts_view("aten.slice.Tensor")
def write_slice(
    parent: Array, child: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    dim = wrap(dim, parent.ndim)
    return write_strided(parent, child, dim, slice_bounds(parent.shape[dim], start, end)[0], step)


@lowers("aten.narrow.default", "aten.narrow_copy.default")
def narrow(self: Array, dim: int, start: int, length: int) -> Array:
    start = wrap(start, self.shape[dim])
    return slice_view(self, dim, start, start + length)


@inverts_view("aten.narrow.default")
def write_narrow(parent: Array, child: Array, dim: int, start: int, length: int) -> Array:
    return write_strided(parent, child, wrap(dim, parent.ndim), wrap(start, parent.shape[dim]), 1)


@_view("select.int")
def select_view(self: Array, dim: int, index: int) -> Array:
    dim = wrap(dim, self.ndim)
    index = index + self.shape[dim] if index < 0 else index
    shape = self.shape[:dim] + self.shape[dim + 1 :]
    return lax.reshape(lax.slice_in_dim(self, index, index + 1, 1, dim), shape)


@inverts_view("aten.select.int")
def write_select(parent: Array, child: Array, dim: int, index: int) -> Array:
    dim = wrap(dim, parent.ndim)
    index = index + parent.shape[dim] if index < 0 else index
    return write_strided(parent, unsqueeze(child, dim), dim, index, 1)


@_view("unbind.int")
def unbind(self: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(select_view(self, dim, index) for index in range(self.shape[dim]))


@inverts_view("aten.unbind.int")
def write_unbind(parent: Array, children: Sequence[Array], dim: int = 0) -> Array:
    dim = wrap(dim, parent.ndim)
    return lax.concatenate([unsqueeze(child, dim) for child in children], dim)


@_view("split_with_sizes.default")
def split_with_sizes(self: Array, split_sizes: Sequence[int], dim: int = 0) -> tuple[Array, ...]:
    starts = [sum(split_sizes[:i]) for i in range(len(split_sizes))]
    return tuple(
        lax.slice_in_dim(self, start, start + size, 1, wrap(dim, self.ndim))
        for start, size in zip(starts, split_sizes, strict=True)
    )


@_view("split.Tensor")
@lowers("aten.unsafe_split.Tensor")
def split(self: Array, split_size: int, dim: int = 0) -> tuple[Array, ...]:
    extent = self.shape[dim]
    count = max(1, -(-extent // split_size)) if split_size else 1
    sizes = [split_size] * (count - 1) + [extent - split_size * (count - 1)]
    return split_with_sizes(self, sizes, dim)


@lowers("aten.chunk.default", "aten.unsafe_chunk.default")
def chunk(self: Array, chunks: int, dim: int = 0) -> tuple[Array, ...]:
    size = -(-self.shape[dim] // chunks)
    return split(self, size, dim) if size else split_with_sizes(self, [0] * chunks, dim)


lowers("aten.unsafe_split_with_sizes.default")(split_with_sizes)


@inverts_view("aten.split_with_sizes.default", "aten.split.Tensor", "aten.chunk.default")
def write_split(parent: Array, children: Sequence[Array], sizes: int | Sequence[int], dim: int = 0) -> Array:
    return lax.concatenate(list(children), wrap(dim, parent.ndim))


# --- computed positions ---


@_view("diagonal.default")
def diagonal(self: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return jnp.diagonal(self, offset, dim1, dim2)


@lowers("aten.diag_embed.default")
def diag_embed(self: Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    side = self.shape[-1] + abs(offset)
    shape = list(self.shape[:-1])
    for dim in sorted((wrap(dim1, self.ndim + 1), wrap(dim2, self.ndim + 1))):
        shape.insert(dim, side)
    return write_diagonal(full(shape, 0, self.dtype), self, offset, dim1, dim2)


def write_through(read: Callable[[Array], Array], parent: Array, child: Array) -> Array:
    """`parent` with the elements that `read` selects replaced by `child`; `read` only moves elements."""
    positions = read(lax.reshape(iota((parent.size,), 0), parent.shape))
    flat = lax.reshape(parent, (parent.size,))
    return lax.reshape(flat.at[positions].set(child, mode="promise_in_bounds"), parent.shape)


@inverts_view("aten.diagonal.default")
def write_diagonal(parent: Array, child: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return write_through(lambda array: diagonal(array, offset, dim1, dim2), parent, child)


@_view("unfold.default")
def unfold(self: Array, dimension: int, size: int, step: int) -> Array:
    if self.ndim == 0:
        return full((size,), 0, self.dtype) if size == 0 else lax.broadcast(self, (size,))
    dim = wrap(dimension, self.ndim)
    count = (self.shape[dim] - size) // step + 1
    windows = [lax.slice_in_dim(self, i, i + (count - 1) * step + 1, step, dim) for i in range(size)]
    shape = (*self.shape[:dim], count, *self.shape[dim + 1 :])
    if not windows:
        return full((*shape, 0), 0, self.dtype)
    return lax.concatenate([lax.reshape(window, (*shape, 1)) for window in windows], self.ndim)


@inverts_view("aten.unfold.default")
def write_unfold(parent: Array, child: Array, dimension: int, size: int, step: int) -> Array:
    return write_through(lambda array: unfold(array, dimension, size, step), parent, child)


@_view("as_strided.default")
def as_strided(self: Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Array:
    """`self` stands for its whole storage: contiguous, from offset 0."""
    size, stride, offset = tuple(size), tuple(stride), storage_offset or 0
    if math.prod(size) == 0:
        return full(size, 0, self.dtype)
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if last >= self.size:
        raise NotImplementedError(
            f"as_strided reaches element {last} of a tensor of {self.size}: it looks past the tensor into the storage "
            "behind it, and a compiled program has no storage; apply as_strided to the whole tensor"
        )
    flat = lax.reshape(self, (self.size,))
    # Outermost first: where each stride is the product of the extents inside it, this is a slice and a transpose.
    order = sorted(range(len(size)), key=lambda d: (-stride[d], size[d] == 1))
    extents = [size[d] for d in order]
    if all(size[d] == 1 or stride[d] == math.prod(extents[i + 1 :]) for i, d in enumerate(order)):
        part = lax.slice_in_dim(flat, offset, offset + math.prod(size))
        return permute(lax.reshape(part, extents), [order.index(d) for d in range(len(size))])
    positions = full(size, offset, INT64)
    for dim, step in enumerate(stride):
        positions = lax.add(positions, lax.mul(iota(size, dim), INT64.type(step)))
    return flat.at[positions].get(mode="promise_in_bounds")


@inverts_view("aten.as_strided.default")
def write_as_strided(
    parent: Array, child: Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Array:
    return write_through(lambda array: as_strided(array, size, stride, storage_offset), parent, child)
