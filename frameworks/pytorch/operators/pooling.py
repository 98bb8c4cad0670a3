"""Maximum and average pooling over sliding and adaptive windows of one to three dimensions, and their gradients."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from .interpolate import transposed
from .promotion import INT32, INT64, Array, Number, cast, constant, full, iota, is_float, opmath
from .registry import lowers

Sizes = Sequence[int]

_UNROLLED_TAPS = 36
"""Windows up to this size are searched in one pass, larger ones axis by axis, in fewer but slower operations."""


def _per_axis(values: Sizes, rank: int, default: Sizes = ()) -> tuple[int, ...]:
    values = tuple(values) or tuple(default)
    return values * rank if len(values) == 1 else values


def _window_count(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - ((count - 1) * stride >= size + padding)  # The last window must begin inside the input.


def _adaptive_bounds(size: int, count: int) -> list[tuple[int, int]]:
    """Where each of `count` windows over `size` positions begins and ends; they may overlap."""
    return [(index * size // count, -(-(index + 1) * size // count)) for index in range(count)]


# --- maximum ---


def _adaptive_taps(size: int, count: int) -> np.ndarray:
    """(longest window, count) positions that each window sees; `size`, past the edge, once it has ended."""
    bounds = _adaptive_bounds(size, count)
    longest = max(end - begin for begin, end in bounds)
    return np.array([[b + tap if b + tap < e else size for b, e in bounds] for tap in range(longest)])


def _sample(array: Array, positions: np.ndarray, axis: int) -> Array:
    steps = np.diff(positions)
    if len(set(steps.tolist())) <= 1 and (not len(steps) or steps[0] > 0):
        stride = int(steps[0]) if len(steps) else 1
        return lax.slice_in_dim(array, int(positions[0]), int(positions[-1]) + 1, stride, axis)
    return jnp.take(array, positions, axis)


def _search(values: Array, indices: Array, taps: dict[int, np.ndarray]) -> tuple[Array, Array]:
    """The largest value of each window and its index; the first of equal ones, the last NaN.

    Args:
        values: Array to search.
        indices: What identifies each value; not negative.
        taps: For each axis to search along, (window size, number of windows) positions; past an edge is allowed.
    """
    lowest = -math.inf if is_float(values.dtype) else int(jnp.iinfo(values.dtype).min)
    padding = [(0, 0, 0)] * values.ndim
    for axis, positions in taps.items():
        low, high = max(0, -int(positions.min())), max(0, int(positions.max()) + 1 - values.shape[axis])
        padding[axis] = (low, high, 0)
    padded = any(low or high for low, high, _ in padding)
    if padded:
        values = lax.pad(values, constant(lowest, values.dtype), padding)
        indices = lax.pad(indices, constant(-1, indices.dtype), padding)
    best = None
    for tap in itertools.product(*(range(len(positions)) for positions in taps.values())):
        value, index = values, indices
        for offset, (axis, positions) in zip(tap, taps.items(), strict=True):
            inside = positions[offset] + padding[axis][0]
            value, index = _sample(value, inside, axis), _sample(index, inside, axis)
        if best is None:
            best, best_index = value, index
            continue
        better = lax.gt(value, best)
        if is_float(value.dtype):
            better = lax.bitwise_or(better, lax.ne(value, value))
        if padded:  # An edge gives way even to -inf.
            better = lax.bitwise_or(better, lax.lt(best_index, constant(0, INT32)))
        best, best_index = lax.select(better, value, best), lax.select(better, index, best_index)
    return best, best_index


def _pool_maximum(self: Array, taps: list[np.ndarray]) -> tuple[Array, Array]:
    """Maxima over windows of the last axes, and their positions in the flattened axes."""
    first = self.ndim - len(taps)
    plane = self.shape[first:]
    position = lax.broadcast_in_dim(
        lax.reshape(lax.iota(INT32, math.prod(plane)), plane), self.shape, range(first, self.ndim)
    )
    axes = dict(enumerate(taps, first))
    if math.prod(len(positions) for positions in taps) <= _UNROLLED_TAPS:
        values, indices = _search(self, position, axes)
    else:
        values, indices = self, position
        for axis, positions in reversed(axes.items()):
            values, indices = _search(values, indices, {axis: positions})
    return values, cast(indices, INT64)


def _scatter_to(grad: Array, indices: Array, shape: Sizes, rank: int, accumulate: bool) -> Array:
    """Puts each element of `grad` at its index in the flattened last `rank` axes of an array of zeros."""
    planes, size = math.prod(shape[: len(shape) - rank]), math.prod(shape[len(shape) - rank :])
    values = lax.reshape(cast(grad, opmath(grad.dtype)), (planes, grad.size // max(planes, 1)))
    columns = lax.reshape(indices, values.shape)
    target = full((planes, size), 0, values.dtype).at[iota(columns.shape, 0, columns.dtype), columns]
    placed = target.add(values, mode="drop") if accumulate else target.set(values, mode="drop")
    return cast(lax.reshape(placed, tuple(shape)), grad.dtype)


def _lower_maximum(rank: int) -> None:
    @lowers(f"aten.max_pool{rank}d_with_indices.default")
    def max_pool(
        self: Array,
        kernel_size: Sizes,
        stride: Sizes = (),
        padding: Sizes = (0,),
        dilation: Sizes = (1,),
        ceil_mode: bool = False,
    ) -> tuple[Array, Array]:
        kernels = _per_axis(kernel_size, rank)
        strides = _per_axis(stride, rank, kernels)
        taps = []
        for size, k, s, p, d in zip(
            self.shape[-rank:], kernels, strides, _per_axis(padding, rank), _per_axis(dilation, rank), strict=True
        ):
            count = _window_count(size, k, s, p, d, ceil_mode)
            taps.append(np.arange(k)[:, None] * d + np.arange(count) * s - p)
        return _pool_maximum(self, taps)

    @lowers(f"aten.max_pool{rank}d_with_indices_backward.default")
    def max_pool_backward(
        grad_output: Array,
        self: Array,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        ceil_mode: bool,
        indices: Array,
    ) -> Array:
        return _scatter_to(grad_output, indices, self.shape, rank, accumulate=True)

    @lowers(f"aten.adaptive_max_pool{rank}d.default")
    def adaptive_max_pool(self: Array, output_size: Sizes) -> tuple[Array, Array]:
        counts = _per_axis(output_size, rank)
        return _pool_maximum(self, [_adaptive_taps(*pair) for pair in zip(self.shape[-rank:], counts, strict=True)])

    @lowers(f"aten.adaptive_max_pool{rank}d_backward.default")
    def adaptive_max_pool_backward(grad_output: Array, self: Array, indices: Array) -> Array:
        return _scatter_to(grad_output, indices, self.shape, rank, accumulate=True)

    @lowers(f"aten.max_unpool{rank}d.default")
    def max_unpool(self: Array, indices: Array, output_size: Sizes, *geometry: Sizes) -> Array:
        return _scatter_to(self, indices, self.shape[:-rank] + tuple(output_size), rank, accumulate=False)


for _rank in (2, 3):
    _lower_maximum(_rank)


# --- average ---


def _average(
    x: Array,
    kernels: Sizes,
    strides: Sizes,
    paddings: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: Number | None,
) -> Array:
    """Averages over windows of the last axes; linear in `x`."""
    rank = len(kernels)
    edges, divisor = [], np.ones((), x.dtype)
    for size, k, s, p in zip(x.shape[-rank:], kernels, strides, paddings, strict=True):
        count = _window_count(size, k, s, p, 1, ceil_mode)
        begin = np.arange(count) * s - p
        end = np.minimum(begin + k, size + p)  # torch: padding counts, what a rounded-up window sees beyond it does not
        seen = end - begin if count_include_pad else np.minimum(end, size) - np.maximum(begin, 0)
        divisor = divisor[..., None] * seen.astype(x.dtype)
        edges.append((p, (count - 1) * s + k - size - p))
    leading = (1,) * (x.ndim - rank)
    total = lax.reduce_window(
        x,
        constant(0, x.dtype),
        lax.add,
        leading + tuple(kernels),
        leading + tuple(strides),
        [(0, 0)] * len(leading) + edges,
    )
    if divisor_override is not None:
        divisor = constant(divisor_override, x.dtype)
    elif (divisor == divisor.flat[0]).all():
        divisor = divisor.flat[0]
    return total / divisor


def _lower_average(rank: int) -> None:
    @lowers(f"aten.avg_pool{rank}d.default")
    def avg_pool(
        self: Array,
        kernel_size: Sizes,
        stride: Sizes = (),
        padding: Sizes = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Number | None = None,
    ) -> Array:
        kernels = _per_axis(kernel_size, rank)
        geometry = (kernels, _per_axis(stride, rank, kernels), _per_axis(padding, rank))
        wide = cast(self, opmath(self.dtype))
        return cast(_average(wide, *geometry, ceil_mode, count_include_pad, divisor_override), self.dtype)

    @lowers(f"aten.avg_pool{rank}d_backward.default")
    def avg_pool_backward(
        grad_output: Array,
        self: Array,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: Number | None,
    ) -> Array:
        kernels = _per_axis(kernel_size, rank)
        geometry = (kernels, _per_axis(stride, rank, kernels), _per_axis(padding, rank))
        return transposed(
            lambda x: _average(x, *geometry, ceil_mode, count_include_pad, divisor_override), self.shape, grad_output
        )

    @lowers(f"aten._adaptive_avg_pool{rank}d.default")
    def adaptive_avg_pool(self: Array, output_size: Sizes) -> Array:
        return cast(_adaptive_average(cast(self, opmath(self.dtype)), _per_axis(output_size, rank)), self.dtype)

    @lowers(f"aten._adaptive_avg_pool{rank}d_backward.default")
    def adaptive_avg_pool_backward(grad_output: Array, self: Array) -> Array:
        counts = grad_output.shape[-rank:]
        return transposed(lambda x: _adaptive_average(x, counts), self.shape, grad_output)


for _rank in (2, 3):
    _lower_average(_rank)


def _adaptive_average(x: Array, counts: Sizes) -> Array:
    """Averages over adaptive windows of the last axes; linear in `x`."""
    for axis, count in enumerate(counts, x.ndim - len(counts)):
        size = x.shape[axis]
        if size % count == 0:
            split = lax.reshape(x, x.shape[:axis] + (count, size // count) + x.shape[axis + 1 :])
            x = lax.reduce_sum(split, (axis + 1,)) / constant(size // count, x.dtype)
            continue
        means = []
        for begin, end in _adaptive_bounds(size, count):
            window = lax.reduce_sum(lax.slice_in_dim(x, begin, end, axis=axis), (axis,))
            means.append(lax.expand_dims(window / constant(end - begin, x.dtype), (axis,)))
        x = lax.concatenate(means, axis)
    return x


# --- maximum over windows at random places ---


def _fractional_starts(samples: Array, size: int, kernel: int, count: int) -> Array:
    """Where the windows of each plane begin, (N, C) samples -> (N, C, count)."""
    last = full((*samples.shape, 1), size - kernel, INT64)
    if count == 1:
        return last
    alpha = constant((size - kernel) / (count - 1), samples.dtype)
    sample = lax.expand_dims(samples, (2,))
    steps = lax.expand_dims(lax.iota(samples.dtype, count - 1), (0, 1))
    return lax.concatenate([cast((steps + sample) * alpha, INT64) - cast(sample * alpha, INT64), last], 2)


def _lower_fractional(rank: int) -> None:
    @lowers(f"aten.fractional_max_pool{rank}d.default")
    def fractional_max_pool(
        self: Array, kernel_size: Sizes, output_size: Sizes, random_samples: Array
    ) -> tuple[Array, Array]:
        image = self if self.ndim == rank + 2 else lax.expand_dims(self, (0,))
        sizes = image.shape[2:]
        kernels, counts = _per_axis(kernel_size, rank), _per_axis(output_size, rank)
        # The samples of two dimensions are those of the columns, then of the rows; of three, in their order.
        order = (1, 0) if rank == 2 else (0, 1, 2)
        places = full((1,) * (2 + 2 * rank), 0, INT64)
        for axis, (size, kernel, count) in enumerate(zip(sizes, kernels, counts, strict=True)):
            starts = _fractional_starts(random_samples[:, :, order[axis]], size, kernel, count)
            taps = lax.expand_dims(starts, (3,)) + lax.iota(INT64, kernel)
            shape = [1] * (2 + 2 * rank)
            shape[:2], shape[2 + axis], shape[2 + rank + axis] = starts.shape[:2], count, kernel
            places = places * constant(size, INT64) + lax.reshape(taps, shape)
        places = lax.reshape(places, (*places.shape[: 2 + rank], math.prod(kernels)))
        planes = lax.reshape(image, (*image.shape[:2], math.prod(sizes)))
        flat = lax.reshape(places, (*places.shape[:2], math.prod(places.shape[2:])))
        values = lax.reshape(jnp.take_along_axis(planes, flat, 2, mode="promise_in_bounds"), places.shape)
        best = jnp.argmax(values, axis=-1, keepdims=True)
        results = (jnp.take_along_axis(array, best, -1, mode="promise_in_bounds")[..., 0] for array in (values, places))
        return tuple(result if self.ndim == rank + 2 else lax.squeeze(result, (0,)) for result in results)

    @lowers(f"aten.fractional_max_pool{rank}d_backward.default")
    def fractional_max_pool_backward(
        grad_output: Array, self: Array, kernel_size: Sizes, output_size: Sizes, indices: Array
    ) -> Array:
        return _scatter_to(grad_output, indices, self.shape, rank, accumulate=True)


for _rank in (2, 3):
    _lower_fractional(_rank)
