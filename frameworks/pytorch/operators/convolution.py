"""Convolutions of any rank, and their gradients."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jax import lax

from trainingcompiler.targets.target import current as current_target

from .matmul import product
from .promotion import Array, cast, constant, opmath
from .registry import lowers

Sizes = Sequence[int]
Edges = Sequence[tuple[int, int]]


def convolution_precision() -> lax.Precision:
    """How exactly float32 convolutions are computed: on a GPU as torch computes them there, in TF32 unless
    `torch.backends.cudnn.allow_tf32` forbids it. XLA:CPU has one precision.
    """
    return lax.Precision.DEFAULT if _is_for_cpu() or torch.backends.cudnn.allow_tf32 else lax.Precision.HIGHEST


def _is_for_cpu() -> bool:
    target = current_target()
    return target is None or target.platform == "cpu"


@lowers("aten.convolution.default")
def convolution(
    input: Array,
    weight: Array,
    bias: Array | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> Array:
    rank = input.ndim - 2
    stride, padding, dilation, output_padding = (
        _per_axis(x, rank) for x in (stride, padding, dilation, output_padding)
    )
    if transposed:
        sizes = [
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, k, s, p, d, extra in zip(
                input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
            )
        ]
        result = _spread(input, weight, sizes, stride, padding, dilation, groups)
    else:
        result = _correlate(input, weight, stride, padding, dilation, groups)
    if bias is not None:  # before rounding to 16 bits, as oneDNN does
        result = lax.add(result, lax.broadcast_in_dim(cast(bias, result.dtype), result.shape, (1,)))
    return cast(result, input.dtype)


@lowers("aten.convolution_backward.default")
def convolution_backward(
    grad_output: Array,
    input: Array,
    weight: Array,
    bias_sizes: Sizes | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Array | None, Array | None, Array | None]:
    rank = input.ndim - 2
    stride, padding, dilation = (_per_axis(x, rank) for x in (stride, padding, dilation))
    geometry = (stride, padding, dilation, groups)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        if transposed:
            grad_input = _correlate(grad_output, weight, *geometry)
            if grad_input.shape != input.shape:  # output padding as long as a stride reaches one window further
                grad_input = lax.slice(grad_input, (0,) * input.ndim, input.shape)
        else:
            grad_input = _spread(grad_output, weight, input.shape[2:], *geometry)
    if output_mask[1]:
        # A transposed convolution is the gradient of a plain one, so its input and output change places.
        larger, strided = (grad_output, input) if transposed else (input, grad_output)
        grad_weight = _weight_gradient(larger, strided, weight.shape[2:], *geometry)
    if output_mask[2]:
        wide = cast(grad_output, opmath(grad_output.dtype))
        grad_bias = cast(lax.reduce_sum(wide, (0, *range(2, wide.ndim))), grad_output.dtype)
    return (
        None if grad_input is None else cast(grad_input, input.dtype),
        None if grad_weight is None else cast(grad_weight, weight.dtype),
        grad_bias,
    )


def _per_axis(values: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _convolve(left: Array, right: Array, dimensions: list[Sequence[int]], **geometry: Any) -> Array:
    return lax.conv_general_dilated(
        left,
        right,
        dimension_numbers=lax.ConvDimensionNumbers(*dimensions),
        precision=convolution_precision(),
        preferred_element_type=opmath(left.dtype),
        **geometry,
    )


def _is_product(kernel: Sequence[int], padding: Sequence[int], groups: int) -> bool:
    """Whether a convolution is computed as a matrix product, which XLA:CPU runs twice as fast.

    For a GPU, XLA 0.11 ends the process over some of them ("Check failed: subdim_size_accumulator == dim_size", in its
    fusion of products), and cuDNN is as fast.
    """
    return math.prod(kernel) == 1 and not any(padding) and groups == 1 and _is_for_cpu()


def _is_depthwise(weight: Array, groups: int) -> bool:
    return groups > 1 and weight.shape[:2] == (groups, 1)


def _correlate(input: Array, weight: Array, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Array:
    """(N, C, ...) with (O, C / groups, ...) -> (N, O, ...), in the dtype that sums are formed in."""
    axes = tuple(range(2, input.ndim))
    if _is_product(weight.shape[2:], padding, groups):
        matrix = lax.reshape(weight, weight.shape[:2])
        if any(s != 1 for s in stride):
            input = lax.slice(input, (0,) * input.ndim, input.shape, (1, 1, *stride))
        result = cast(product(input, matrix, ((1,), (1,))), opmath(input.dtype))
        return lax.transpose(result, (0, input.ndim - 1, *range(1, input.ndim - 1)))
    edges = [(p, p) for p in padding]

    def whole(input: Array, weight: Array) -> Array:
        return _convolve(
            input,
            weight,
            [(0, 1, *axes)] * 3,
            window_strides=stride,
            padding=edges,
            rhs_dilation=dilation,
            feature_group_count=groups,
        )

    if not _is_depthwise(weight, groups):
        return whole(input, weight)
    taps = partial(_depthwise, stride=stride, edges=edges, gaps=(1,) * len(axes), dilation=dilation)
    return lax.platform_dependent(input, weight, cpu=taps, default=whole)


def _spread(
    output: Array, weight: Array, sizes: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Array:
    """The transpose of `_correlate`: (N, O, ...) with (O, C / groups, ...) -> (N, C, *sizes), likewise."""
    axes = tuple(range(2, output.ndim))
    kernel = weight.shape[2:]
    edges = []
    for size, strided, k, s, p, d in zip(sizes, output.shape[2:], kernel, stride, padding, dilation, strict=True):
        low = d * (k - 1) - p
        edges.append((low, size + d * (k - 1) - low - (strided - 1) * s - 1))

    def whole(output: Array, weight: Array) -> Array:
        if groups > 1:  # XLA wants the groups among the features that come out.
            weight = lax.reshape(weight, (groups, weight.shape[0] // groups, *weight.shape[1:]))
            weight = lax.transpose(weight, (1, 0, 2, *range(3, weight.ndim)))
            weight = lax.reshape(weight, (weight.shape[0], groups * weight.shape[2], *kernel))
        return _convolve(
            output,
            weight,
            [(0, 1, *axes), (1, 0, *axes), (0, 1, *axes)],
            window_strides=(1,) * len(axes),
            padding=edges,
            lhs_dilation=stride,
            rhs_dilation=dilation,
            feature_group_count=groups,
        )

    flipped = lax.rev(weight, axes)
    if not _is_depthwise(weight, groups):
        return whole(output, flipped)
    taps = partial(_depthwise, stride=(1,) * len(axes), edges=edges, gaps=stride, dilation=dilation)
    return lax.platform_dependent(output, flipped, cpu=taps, default=whole)


def _weight_gradient(
    input: Array, output: Array, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Array:
    """(N, C, ...) with (N, O, ...) -> (O, C / groups, *kernel): each tap sums one shifted product."""
    axes = tuple(range(2, input.ndim))
    if _is_product(kernel, padding, groups):
        ends = [(size - 1) * s + 1 for size, s in zip(output.shape[2:], stride, strict=True)]
        input = lax.slice(input, (0,) * input.ndim, (*input.shape[:2], *ends), (1, 1, *stride))
        summed = (0, *axes)
        matrix = cast(product(output, input, (summed, summed)), opmath(input.dtype))
        return lax.reshape(matrix, matrix.shape + tuple(kernel))
    edges = []
    for size, strided, k, s, p, d in zip(
        input.shape[2:], output.shape[2:], kernel, stride, padding, dilation, strict=True
    ):
        edges.append((p, (strided - 1) * s + 1 + d * (k - 1) - size - p))

    def whole(input: Array, output: Array) -> Array:
        return _convolve(
            input,
            output,
            [(1, 0, *axes), (1, 0, *axes), (1, 0, *axes)],
            window_strides=dilation,
            padding=edges,
            rhs_dilation=stride,
            batch_group_count=groups,
        )

    if groups == 1:
        return whole(input, output)
    taps = partial(
        _grouped_weight_gradient, kernel=kernel, stride=stride, edges=edges, dilation=dilation, groups=groups
    )
    return lax.platform_dependent(input, output, cpu=taps, default=whole)


# --- groups on XLA:CPU, whose own grouped convolutions are 20 to 300 times slower than these sums over taps ---


def _taps(
    image: Array, kernel: Sizes, stride: Sizes, edges: Edges, gaps: Sizes, dilation: Sizes
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Each kernel position, and what it sees of the padded image."""
    padding = [(low, high, gap - 1) for (low, high), gap in zip(edges, gaps, strict=True)]
    image = lax.pad(image, constant(0, image.dtype), [(0, 0, 0), (0, 0, 0), *padding])
    reach = [
        (size - d * (k - 1) - 1) // s * s + 1
        for size, k, s, d in zip(image.shape[2:], kernel, stride, dilation, strict=True)
    ]
    for tap in itertools.product(*map(range, kernel)):
        start = [t * d for t, d in zip(tap, dilation, strict=True)]
        stop = [begin + length for begin, length in zip(start, reach, strict=True)]
        yield tap, lax.slice(image, (0, 0, *start), (*image.shape[:2], *stop), (1, 1, *stride))


def _depthwise(image: Array, weight: Array, *, stride: Sizes, edges: Edges, gaps: Sizes, dilation: Sizes) -> Array:
    """One filter for each channel: (N, C, ...) with (C, 1, ...) -> (N, C, ...)."""
    wide = opmath(image.dtype)
    total: Any = constant(0, wide)
    for tap, seen in _taps(cast(image, wide), weight.shape[2:], stride, edges, gaps, dilation):
        factor = cast(weight[(slice(None), 0, *tap)], wide)
        total = total + seen * lax.broadcast_in_dim(factor, seen.shape, (1,))
    return total


def _grouped_weight_gradient(
    input: Array, output: Array, *, kernel: Sizes, stride: Sizes, edges: Edges, dilation: Sizes, groups: int
) -> Array:
    def split(array: Array) -> Array:
        batch, channels, *space = array.shape
        return lax.reshape(array, (batch, groups, channels // groups, math.prod(space)))

    output, gaps, sums = split(output), (1,) * len(kernel), []
    for _, seen in _taps(input, kernel, stride, edges, gaps, dilation):
        products = product(output, split(seen), ((3,), (3,)), ((0, 1), (0, 1)))
        sums.append(lax.expand_dims(lax.reduce_sum(products, (0,)), (3,)))
    stacked = cast(lax.concatenate(sums, 3), opmath(input.dtype))
    return lax.reshape(stacked, (groups * stacked.shape[1], stacked.shape[2], *kernel))
