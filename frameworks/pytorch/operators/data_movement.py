"""Joins, repetition, padding, and the scatters and gradients that belong to views."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .dtypes import result_dtype
from .promotion import INT64, Array, Number, cast, constant, expand, full, wrap
from .registry import lowers
from .views import (
    reshape,
    slice_bounds,
    spread,
    unfold,
    unsqueeze,
    write_as_strided,
    write_diagonal,
    write_select,
    write_slice,
)

# --- joining ---


@lowers("aten.cat.default", "aten.concat.default")
def concatenate(tensors: Sequence[Array], dim: int = 0) -> Array:
    dtype = result_dtype(*tensors)
    parts = [cast(tensor, dtype) for tensor in tensors if tensor.shape != (0,)]  # torch ignores those of old.
    if not parts:
        return full((0,), 0, dtype)
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, wrap(dim, parts[0].ndim))


@lowers("aten.stack.default")
def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    dtype = result_dtype(*tensors)
    dim = wrap(dim, tensors[0].ndim + 1)
    return lax.concatenate([unsqueeze(cast(tensor, dtype), dim) for tensor in tensors], dim)


@lowers("aten.block_diag.default")
def block_diag(tensors: Sequence[Array]) -> Array:
    dtype = result_dtype(*tensors)
    blocks = [reshape(cast(tensor, dtype), tensor.shape if tensor.ndim == 2 else (1, -1)) for tensor in tensors]
    columns = sum(block.shape[1] for block in blocks)
    rows, left = [], 0
    for block in blocks:
        sides = [(0, 0, 0), (left, columns - left - block.shape[1], 0)]
        rows.append(lax.pad(block, constant(0, dtype), sides))
        left += block.shape[1]
    return lax.concatenate(rows, 0)


# --- repeating and moving ---


@lowers("aten.repeat.default", "aten.tile.default")
def repeat(self: Array, repeats: Sequence[int]) -> Array:
    extents = (1,) * (len(repeats) - self.ndim) + self.shape
    repeats = (1,) * (len(extents) - len(repeats)) + tuple(repeats)
    paired = [x for pair in zip(repeats, extents, strict=True) for x in pair]
    kept = [2 * d + 1 for d in range(len(extents))]
    result = lax.broadcast_in_dim(lax.reshape(self, extents), paired, kept)
    return lax.reshape(result, [count * extent for count, extent in zip(repeats, extents, strict=True)])


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(self: Array, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Array:
    array = reshape(self, (-1,)) if dim is None else self
    dim = wrap(dim or 0, array.ndim)
    shape = (*array.shape[: dim + 1], repeats, *array.shape[dim + 1 :])
    result = lax.broadcast_in_dim(array, shape, [d for d in range(len(shape)) if d != dim + 1])
    return lax.reshape(result, (*array.shape[:dim], array.shape[dim] * repeats, *array.shape[dim + 1 :]))


@lowers("aten.repeat_interleave.Tensor")
def repeated_positions(repeats: Array, *, output_size: int | None = None) -> Array:
    """Each position as often as its entry says; `output_size`, their sum, must be given."""
    if output_size is None:
        raise NotImplementedError(
            "repeat_interleave with a tensor of counts makes a result whose size depends on their values; "
            "pass output_size="
        )
    return jnp.repeat(lax.iota(INT64, repeats.size), repeats, total_repeat_length=output_size)


@lowers("aten.roll.default")
def roll(self: Array, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Array:
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if self.size == 0:
        return self
    if not dims:
        return reshape(roll(reshape(self, (-1,)), shifts, [0]), self.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        extent = self.shape[dim]
        start = -shift % extent
        if start:
            head, tail = (
                lax.slice_in_dim(self, *bounds, 1, wrap(dim, self.ndim)) for bounds in ((start, extent), (0, start))
            )
            self = lax.concatenate([head, tail], wrap(dim, self.ndim))
    return self


@lowers("aten.flip.default")
def flip(self: Array, dims: Sequence[int]) -> Array:
    return lax.rev(self, [wrap(dim, self.ndim) for dim in dims]) if self.ndim else self


@lowers("aten.rot90.default")
def rot90(self: Array, k: int = 1, dims: Sequence[int] = (0, 1)) -> Array:
    return jnp.rot90(self, k, tuple(dims))


# --- padding ---


@lowers("aten.constant_pad_nd.default")
def constant_pad(self: Array, pad: Sequence[int], value: Number = 0) -> Array:
    sides = [(0, 0, 0)] * self.ndim
    for i in range(len(pad) // 2):
        sides[self.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1], 0)
    return lax.pad(self, constant(value, self.dtype), sides)


def _pad_edges(self: Array, padding: Sequence[int], edge: Callable[[Array, int, int, bool], Array]) -> Array:
    """Pads the last dimensions, innermost pair first; `edge(array, dim, width, at_end)` makes one side."""
    for i in range(len(padding) // 2):
        dim = self.ndim - 1 - i
        before, after = padding[2 * i : 2 * i + 2]
        extent = self.shape[dim]
        core = lax.slice_in_dim(self, max(0, -before), extent - max(0, -after), 1, dim)
        parts = [core]
        if before > 0:
            parts.insert(0, edge(self, dim, before, False))
        if after > 0:
            parts.append(edge(self, dim, after, True))
        self = lax.concatenate(parts, dim)
    return self


def _reflected(array: Array, dim: int, width: int, at_end: bool) -> Array:
    extent = array.shape[dim]
    start, end = (extent - 1 - width, extent - 1) if at_end else (1, width + 1)
    return lax.rev(lax.slice_in_dim(array, start, end, 1, dim), (dim,))


def _replicated(array: Array, dim: int, width: int, at_end: bool) -> Array:
    position = array.shape[dim] - 1 if at_end else 0
    line = lax.slice_in_dim(array, position, position + 1, 1, dim)
    return expand(line, [width if d == dim else extent for d, extent in enumerate(array.shape)])


def _transposed(function: Callable[[Array], Array], grad: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The gradient of a linear function of one array."""
    [result] = jax.linear_transpose(function, like)(grad)
    return result


def _register_pad(name: str, edge: Callable[[Array, int, int, bool], Array]) -> None:
    def forward(self, padding):
        return _pad_edges(self, padding, edge)

    def backward(grad_output, self, padding):
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return _transposed(lambda array: _pad_edges(array, padding, edge), grad_output, like)

    for rank in (1, 2, 3):
        lowers(f"aten.{name}{rank}d.default")(forward)
        lowers(f"aten.{name}{rank}d_backward.default")(backward)


_register_pad("reflection_pad", _reflected)
_register_pad("replication_pad", _replicated)


# --- writes into a copy of a view's parent ---


@lowers("aten.select_scatter.default")
def select_scatter(self: Array, src: Array, dim: int, index: int) -> Array:
    return write_select(self, cast(src, self.dtype), dim, index)


@lowers("aten.slice_scatter.default")
def slice_scatter(
    self: Array, src: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    bounds = slice_bounds(self.shape[dim], start, end)
    extents = [len(range(*bounds, step)) if d == wrap(dim, self.ndim) else n for d, n in enumerate(self.shape)]
    return write_slice(self, expand(cast(src, self.dtype), extents), dim, start, end, step)


@lowers("aten.diagonal_scatter.default")
def diagonal_scatter(self: Array, src: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return write_diagonal(self, cast(src, self.dtype), offset, dim1, dim2)


@lowers("aten.as_strided_scatter.default")
def as_strided_scatter(
    self: Array, src: Array, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Array:
    return write_as_strided(self, cast(src, self.dtype), size, stride, storage_offset)


# --- gradients of views ---


@lowers("aten.select_backward.default")
def select_backward(grad_output: Array, input_sizes: Sequence[int], dim: int, index: int) -> Array:
    dim = wrap(dim, len(input_sizes))
    return spread(unsqueeze(grad_output, dim), input_sizes, dim, wrap(index, input_sizes[dim]), 1)


@lowers("aten.slice_backward.default")
def slice_backward(grad_output: Array, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Array:
    dim = wrap(dim, len(input_sizes))
    return spread(grad_output, input_sizes, dim, slice_bounds(input_sizes[dim], start, end)[0], step)


@lowers("aten.diagonal_backward.default")
def diagonal_backward(grad_output: Array, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Array:
    return write_diagonal(full(input_sizes, 0, grad_output.dtype), grad_output, offset, dim1, dim2)


@lowers("aten.unfold_backward.default")
def unfold_backward(grad_in: Array, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Array:
    like = jax.ShapeDtypeStruct(tuple(input_sizes), grad_in.dtype)
    return _transposed(lambda array: unfold(array, dim, size, step), grad_in, like)
