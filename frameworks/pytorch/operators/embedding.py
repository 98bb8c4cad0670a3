"""Table lookups, sums of table rows, and their gradients."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from . import sharding_constraints
from .promotion import Array, cast, constant, full, iota, opmath, select
from .registry import lowers
from .value_checks import require, require_between

SUM, MEAN, MAX = 0, 1, 2
"""torch's codes for what becomes of the rows of a bag."""


def _rows(table: Array, indices: Array) -> Array:
    """`table[indices]`."""
    row = table.shape[1:]
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(indices.ndim, indices.ndim + len(row))),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    starts = lax.expand_dims(indices, (indices.ndim,))
    return lax.gather(table, starts, dimensions, (1, *row), mode=lax.GatherScatterMode.CLIP)


def _accumulate(rows: Array, indices: Array, count: int) -> Array:
    """A table of `count` rows: row i sums the `rows` whose index is i; those with an index out of range are dropped."""
    row = rows.shape[indices.ndim :]
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(indices.ndim, rows.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
    )
    starts = lax.expand_dims(indices, (indices.ndim,))
    table = full((count, *row), 0, rows.dtype)
    return lax.scatter_add(table, starts, rows, dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _over_frequency(rows: Array, indices: Array, count: int) -> Array:
    frequency = _accumulate(full(indices.shape, 1, rows.dtype), indices, count)
    divisor = _rows(frequency, indices)
    return rows / lax.expand_dims(divisor, tuple(range(indices.ndim, rows.ndim)))


@lowers("aten.embedding.default")
def embedding(
    weight: Array, indices: Array, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Array:
    require_between(indices, 0, weight.shape[0] - 1)
    found = _rows(weight, indices)
    return sharding_constraints.rows(found) if indices.ndim > 1 else found


@lowers("aten.embedding_dense_backward.default")
def embedding_backward(
    grad_output: Array, indices: Array, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Array:
    rows = cast(grad_output, opmath(grad_output.dtype))
    if scale_grad_by_freq:
        rows = _over_frequency(rows, indices, num_weights)
    if padding_idx >= 0:
        indices = select(indices == padding_idx, num_weights, indices)
    return cast(_accumulate(rows, indices, num_weights), grad_output.dtype)


@lowers("aten.embedding_renorm.default")
def embedding_renorm(self: Array, indices: Array, max_norm: float, norm_type: float) -> Array:
    wide = cast(self, opmath(self.dtype))
    norms = jnp.linalg.norm(wide, norm_type, axis=1)
    looked_up = _accumulate(full((indices.size,), 1, wide.dtype), lax.reshape(indices, (indices.size,)), self.shape[0])
    factor = select((norms > max_norm) & (looked_up > 0), max_norm / (norms + 1e-7), 1)
    return cast(wide * lax.expand_dims(factor, (1,)), self.dtype)


# --- bags ---


def _bags(indices: Array, offsets: Array) -> Array:
    """Which bag each index belongs to, from where the bags begin."""
    begins = _accumulate(full(offsets.shape, 1, offsets.dtype), offsets, indices.shape[0] + 1)
    return lax.cumsum(lax.slice(begins, (0,), indices.shape)) - 1


def _counted(indices: Array, padding_idx: int) -> Array:
    return indices != padding_idx


@lowers("aten._embedding_bag.default")
def embedding_bag(
    weight: Array,
    indices: Array,
    offsets: Array,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Array, Array, Array, Array]:
    """Sums, means or maxima of bags of rows.

    Returns:
        (bags, features) values, and three index arrays for the gradient: each index's bag, each bag's size and, for
        maxima, each value's row. The first is empty where torch's own kernel does without it.
    """
    require_between(indices, 0, weight.shape[0] - 1)
    require_between(offsets, 0, indices.shape[0])
    if offsets.size:
        require(lax.eq(lax.index_in_dim(offsets, 0, keepdims=False), constant(0, offsets.dtype)))
    count = offsets.shape[0] - include_last_offset
    bags, counted = _bags(indices, offsets), _counted(indices, padding_idx)
    sizes = _accumulate(cast(counted, offsets.dtype), bags, count)
    rows = cast(_rows(weight, indices), opmath(weight.dtype))
    if mode == MAX:
        result, max_indices = _bag_maxima(rows, indices, bags, counted, sizes)
    else:
        if per_sample_weights is not None:
            rows = rows * lax.expand_dims(cast(per_sample_weights, rows.dtype), (1,))
        result = _accumulate(select(lax.expand_dims(counted, (1,)), rows, 0), bags, count)
        if mode == MEAN:
            result = result / lax.expand_dims(cast(lax.max(sizes, constant(1, sizes.dtype)), rows.dtype), (1,))
        else:
            sizes = full((count,), 0, sizes.dtype)  # torch counts only where it divides or compares
        max_indices = sizes
    if mode == SUM and padding_idx < 0 and weight.dtype in (jnp.float32, jnp.float16):
        bags = full((0,), 0, offsets.dtype)
    return cast(result, weight.dtype), cast(bags, offsets.dtype), sizes, max_indices


def _bag_maxima(rows: Array, indices: Array, bags: Array, counted: Array, sizes: Array) -> tuple[Array, Array]:
    """Each bag's largest values, 0 in an empty bag, and the table rows that they came from, the first where equal."""
    count, features = sizes.shape[0], rows.shape[1]
    dropped = select(counted, bags, count)
    lowest = full((count, features), -jnp.inf, rows.dtype)
    largest = lowest.at[dropped].max(rows, mode="drop")
    position = select(rows == _rows(largest, bags), iota(rows.shape, 0, indices.dtype), indices.shape[0])
    first = full((count, features), indices.shape[0], indices.dtype).at[dropped].min(position, mode="drop")
    filled = lax.expand_dims(sizes > 0, (1,))
    return select(filled, largest, 0), select(filled, cast(_rows(indices, first), sizes.dtype), 0)


@lowers("aten._embedding_bag_forward_only.default")
def embedding_bag_forward_only(
    weight: Array, indices: Array, offsets: Array, *options: Any, **named_options: Any
) -> tuple[Array, Array, Array, Array]:
    bagged: Any = embedding_bag(weight, indices, offsets, *options, **named_options)
    sizes = bagged[2]
    missing = offsets.shape[0] - sizes.shape[0]  # torch gives one size for each offset here, the last one included
    return bagged[0], bagged[1], lax.pad(sizes, constant(0, sizes.dtype), [(0, missing, 0)]), bagged[3]


@lowers("aten._embedding_bag_backward.default")
def embedding_bag_backward(
    grad: Array,
    indices: Array,
    offsets: Array,
    offset2bag: Array,
    bag_size: Array,
    maximum_indices: Array,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Array | None,
    padding_idx: int = -1,
) -> Array:
    wide = cast(grad, opmath(grad.dtype))
    if mode == MAX:
        filled = lax.expand_dims(bag_size > 0, (1,))
        columns = iota(maximum_indices.shape, 1, maximum_indices.dtype)
        table = full((num_weights, grad.shape[1]), 0, wide.dtype)
        return cast(table.at[maximum_indices, columns].add(select(filled, wide, 0), mode="drop"), grad.dtype)
    if mode == MEAN:
        wide = wide / lax.expand_dims(cast(lax.max(bag_size, constant(1, bag_size.dtype)), wide.dtype), (1,))
    rows = _rows(wide, _bags(indices, offsets))
    if per_sample_weights is not None:
        rows = rows * lax.expand_dims(cast(per_sample_weights, rows.dtype), (1,))
    if scale_grad_by_freq:
        rows = _over_frequency(rows, indices, num_weights)
    kept = select(_counted(indices, padding_idx), indices, num_weights)
    return cast(_accumulate(rows, kept, num_weights), grad.dtype)


@lowers("aten._embedding_bag_per_sample_weights_backward.default")
def embedding_bag_weights_backward(
    grad: Array,
    weight: Array,
    indices: Array,
    offsets: Array,
    offset2bag: Array,
    mode: int,
    padding_idx: int = -1,
) -> Array:
    wide = opmath(grad.dtype)
    products = cast(_rows(grad, _bags(indices, offsets)), wide) * cast(_rows(weight, indices), wide)
    return cast(select(_counted(indices, padding_idx), lax.reduce_sum(products, (1,)), 0), grad.dtype)
