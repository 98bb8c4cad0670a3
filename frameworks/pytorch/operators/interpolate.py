"""Interpolation, pixel shuffling and sliding blocks."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax

from .promotion import Array, cast, constant, opmath
from .registry import lowers

Scale = float | None


# --- nearest ---


def _nearest_positions(size: int, out: int, scale: Scale, exact: bool) -> np.ndarray:
    """The input position that each output position repeats; in float32, as torch computes it."""
    step = np.float32(1 / scale if scale else size / out)
    offset = np.float32(0.5 if exact else 0)
    return np.minimum(np.floor((np.arange(out, dtype=np.float32) + offset) * step).astype(np.int64), size - 1)


def _take(array: Array, positions: np.ndarray, axis: int) -> Array:
    size = array.shape[axis]
    factor = len(positions) // size
    if factor and np.array_equal(positions, np.arange(len(positions)) // factor):
        shape = array.shape[: axis + 1] + (factor,) + array.shape[axis + 1 :]
        repeated = lax.broadcast_in_dim(array, shape, [d for d in range(len(shape)) if d != axis + 1])
        return lax.reshape(repeated, array.shape[:axis] + (len(positions),) + array.shape[axis + 1 :])
    return array.at[(slice(None),) * axis + (positions,)].get(mode="clip")


def _nearest(self: Array, output_size: Sequence[int], scales: Sequence[Scale], exact: bool) -> Array:
    for axis, (out, scale) in enumerate(zip(output_size, scales, strict=True), 2):
        self = _take(self, _nearest_positions(self.shape[axis], out, scale, exact), axis)
    return self


def _scales(scales: Sequence[Scale], rank: int) -> tuple[Scale, ...]:
    return tuple(scales) + (None,) * (rank - len(scales))


def transposed(function: Callable[[Array], Array], shape: Sequence[int], grad: Array) -> Array:
    """The gradient of a linear function of an array of `shape`, summed in float32 or wider."""
    wide = opmath(grad.dtype)
    (result,) = jax.linear_transpose(function, jax.ShapeDtypeStruct(tuple(shape), wide))(cast(grad, wide))
    return cast(result, grad.dtype)


def _lower_nearest(name: str, rank: int, exact: bool) -> None:
    @lowers(f"aten.{name}{rank}d.default")
    def nearest(self: Array, output_size: Sequence[int], *scales: Scale) -> Array:
        return _nearest(self, output_size, _scales(scales, rank), exact)

    @lowers(f"aten.{name}{rank}d_backward.default")
    def nearest_backward(
        grad_output: Array, output_size: Sequence[int], input_size: Sequence[int], *scales: Scale
    ) -> Array:
        return transposed(lambda x: _nearest(x, output_size, _scales(scales, rank), exact), input_size, grad_output)


for _rank in (1, 2, 3):
    _lower_nearest("upsample_nearest", _rank, exact=False)
    _lower_nearest("_upsample_nearest_exact", _rank, exact=True)


# --- linear and cubic: one matrix for each axis ---


def _tent(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0)


def _cubic(sharpness: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys' cubic convolution kernel."""

    def kernel(distance: np.ndarray) -> np.ndarray:
        x = np.abs(distance)
        near = ((sharpness + 2) * x - (sharpness + 3)) * x * x + 1
        far = sharpness * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    return kernel


def _interpolation(size: int, out: int, scale: Scale, align_corners: bool, kernel: Callable, radius: int) -> np.ndarray:
    """The (out, size) weights of each input in each output; what falls beyond an edge is the edge's."""
    if align_corners:
        centres = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0)
    else:
        centres = (np.arange(out) + 0.5) * (1 / scale if scale else size / out) - 0.5
        if radius == 1:
            centres = np.maximum(centres, 0)
    weights = np.zeros((out, size))
    first = np.floor(centres).astype(np.int64)
    for tap in range(1 - radius, 1 + radius):
        position = first + tap
        np.add.at(weights, (np.arange(out), np.clip(position, 0, size - 1)), kernel(position - centres))
    return weights


def _antialiased(size: int, out: int, scale: Scale, align_corners: bool, kernel: Callable, radius: int) -> np.ndarray:
    """Like `_interpolation`, the kernel widened to cover every input when shrinking, and normalized."""
    if not align_corners:
        step = 1 / scale if scale else size / out
    elif out > 1:
        step = (size - 1) / (out - 1)
    else:
        step = 0
    stretch = max(step, 1)
    centres = step * (np.arange(out)[:, None] + 0.5)
    positions = np.arange(size)[None] + 0.5
    first = np.maximum((centres - radius * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + radius * stretch + 0.5).astype(np.int64), size)
    inside = (positions > first) & (positions < last)
    weights = np.where(inside, kernel((positions - centres) / stretch), 0)
    return weights / weights.sum(1, keepdims=True)


def _contract(array: Array, matrices: Sequence[np.ndarray]) -> Array:
    """Applies one (out, in) matrix to each of the axes after the second."""
    for axis, matrix in enumerate(matrices, 2):
        result = lax.dot_general(
            array, matrix.astype(array.dtype), (((axis,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        last = result.ndim - 1
        array = lax.transpose(result, (*range(axis), last, *range(axis, last)))
    return array


def _lower_interpolation(name: str, rank: int, weights: Callable, kernel: Callable, radius: int) -> None:
    def matrices(
        input_size: Sequence[int], output_size: Sequence[int], align_corners: bool, scales: Sequence[Scale]
    ) -> list[np.ndarray]:
        axes = zip(input_size[2:], output_size, _scales(scales, rank), strict=True)
        return [weights(size, out, scale, align_corners, kernel, radius) for size, out, scale in axes]

    @lowers(f"aten.{name}.default")
    def interpolate(self: Array, output_size: Sequence[int], align_corners: bool, *scales: Scale) -> Array:
        wide = cast(self, opmath(self.dtype))
        return cast(_contract(wide, matrices(self.shape, output_size, align_corners, scales)), self.dtype)

    @lowers(f"aten.{name}_backward.default")
    def interpolate_backward(
        grad_output: Array,
        output_size: Sequence[int],
        input_size: Sequence[int],
        align_corners: bool,
        *scales: Scale,
    ) -> Array:
        backwards = [matrix.T for matrix in matrices(input_size, output_size, align_corners, scales)]
        return cast(_contract(cast(grad_output, opmath(grad_output.dtype)), backwards), grad_output.dtype)


_lower_interpolation("upsample_linear1d", 1, _interpolation, _tent, 1)
_lower_interpolation("upsample_bilinear2d", 2, _interpolation, _tent, 1)
_lower_interpolation("upsample_trilinear3d", 3, _interpolation, _tent, 1)
_lower_interpolation("upsample_bicubic2d", 2, _interpolation, _cubic(-0.75), 2)
_lower_interpolation("_upsample_bilinear2d_aa", 2, _antialiased, _tent, 1)
_lower_interpolation("_upsample_bicubic2d_aa", 2, _antialiased, _cubic(-0.5), 2)


# --- pixels and channels ---


@lowers("aten.pixel_shuffle.default")
def pixel_shuffle(self: Array, upscale_factor: int) -> Array:
    *batch, channels, height, width = self.shape
    r, n = upscale_factor, len(batch)
    split = lax.reshape(self, (*batch, channels // (r * r), r, r, height, width))
    woven = lax.transpose(split, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return lax.reshape(woven, (*batch, channels // (r * r), height * r, width * r))


@lowers("aten.pixel_unshuffle.default")
def pixel_unshuffle(self: Array, downscale_factor: int) -> Array:
    *batch, channels, height, width = self.shape
    r, n = downscale_factor, len(batch)
    split = lax.reshape(self, (*batch, channels, height // r, r, width // r, r))
    unwoven = lax.transpose(split, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return lax.reshape(unwoven, (*batch, channels * r * r, height // r, width // r))


@lowers("aten.channel_shuffle.default")
def channel_shuffle(self: Array, groups: int) -> Array:
    batch, channels, *rest = self.shape
    split = lax.reshape(self, (batch, groups, channels // groups, *rest))
    return lax.reshape(lax.transpose(split, (0, 2, 1, *range(3, split.ndim))), self.shape)


# --- sliding blocks ---


def _blocks(
    image: Array, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Array:
    """(N, C, H, W) -> (N, C * kernel size, number of blocks)."""
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = (_pair(x) for x in (kernel, dilation, padding, stride))
    image = lax.pad(image, constant(0, image.dtype), [(0, 0, 0), (0, 0, 0), (ph, ph, 0), (pw, pw, 0)])
    batch, channels, height, width = image.shape
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    taps = [
        lax.slice(
            image,
            (0, 0, i * dh, j * dw),
            (batch, channels, i * dh + (rows - 1) * sh + 1, j * dw + (columns - 1) * sw + 1),
            (1, 1, sh, sw),
        )
        for i in range(kh)
        for j in range(kw)
    ]
    stacked = lax.concatenate([lax.expand_dims(tap, (2,)) for tap in taps], 2)
    return lax.reshape(stacked, (batch, channels * kh * kw, rows * columns))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return (values[0], values[-1])


@lowers("aten.im2col.default")
def im2col(
    self: Array, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Array:
    image = self if self.ndim == 4 else lax.expand_dims(self, (0,))
    columns = _blocks(image, kernel_size, dilation, padding, stride)
    return columns if self.ndim == 4 else lax.squeeze(columns, (0,))


@lowers("aten.col2im.default")
def col2im(
    self: Array,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Array:
    columns = self if self.ndim == 3 else lax.expand_dims(self, (0,))
    channels = columns.shape[1] // math.prod(_pair(kernel_size))
    image = transposed(
        lambda x: _blocks(x, kernel_size, dilation, padding, stride),
        (columns.shape[0], channels, *_pair(output_size)),
        columns,
    )
    return image if self.ndim == 3 else lax.squeeze(image, (0,))
