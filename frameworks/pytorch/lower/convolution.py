"""Convolutions of any rank, and their gradients."""

import math

import torch
from jax import lax

from .matmul import product
from .operands import cast, opmath
from .registry import lowers


def convolution_precision() -> lax.Precision:
    """How exactly float32 convolutions are computed: TF32 where `torch.backends.cudnn.allow_tf32` permits it."""
    return lax.Precision.DEFAULT if torch.backends.cudnn.allow_tf32 else lax.Precision.HIGHEST


@lowers("aten.convolution.default")
def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
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
    return result if bias is None else result + lax.expand_dims(bias, (0, *range(2, input.ndim)))


@lowers("aten.convolution_backward.default")
def convolution_backward(
    grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
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
    return grad_input, grad_weight, grad_bias


def _per_axis(values, rank):
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _convolve(left, right, dimensions, **geometry):
    return lax.conv_general_dilated(
        left,
        right,
        dimension_numbers=lax.ConvDimensionNumbers(*dimensions),
        precision=convolution_precision(),
        **geometry,
    )


def _is_pointwise(kernel, padding, groups):
    return math.prod(kernel) == 1 and not any(padding) and groups == 1


def _correlate(input, weight, stride, padding, dilation, groups):
    """(N, C, ...) with (O, C / groups, ...) -> (N, O, ...)."""
    axes = tuple(range(2, input.ndim))
    if _is_pointwise(weight.shape[2:], padding, groups):
        # As a matrix product, which XLA:CPU runs twice as fast as the same convolution.
        matrix = lax.reshape(weight, weight.shape[:2])
        if any(s != 1 for s in stride):
            input = lax.slice(input, (0,) * input.ndim, input.shape, (1, 1, *stride))
        result = product(input, matrix, ((1,), (1,))).astype(input.dtype)
        return lax.transpose(result, (0, input.ndim - 1, *range(1, input.ndim - 1)))
    return _convolve(
        input,
        weight,
        [(0, 1, *axes)] * 3,
        window_strides=stride,
        padding=[(p, p) for p in padding],
        rhs_dilation=dilation,
        feature_group_count=groups,
    )


def _spread(output, weight, sizes, stride, padding, dilation, groups):
    """The transpose of `_correlate`: (N, O, ...) with (O, C / groups, ...) -> (N, C, *sizes)."""
    axes = tuple(range(2, output.ndim))
    kernel = weight.shape[2:]
    if groups > 1:
        # XLA wants the groups on the side of the features that come out.
        weight = lax.reshape(weight, (groups, weight.shape[0] // groups, *weight.shape[1:]))
        weight = lax.transpose(weight, (1, 0, 2, *range(3, weight.ndim)))
        weight = lax.reshape(weight, (weight.shape[0], groups * weight.shape[2], *kernel))
    edges = []
    for size, strided, k, s, p, d in zip(sizes, output.shape[2:], kernel, stride, padding, dilation, strict=True):
        low = d * (k - 1) - p
        edges.append((low, size + d * (k - 1) - low - (strided - 1) * s - 1))
    return _convolve(
        output,
        lax.rev(weight, axes),
        [(0, 1, *axes), (1, 0, *axes), (0, 1, *axes)],
        window_strides=(1,) * len(axes),
        padding=edges,
        lhs_dilation=stride,
        rhs_dilation=dilation,
        feature_group_count=groups,
    )


def _weight_gradient(input, output, kernel, stride, padding, dilation, groups):
    """(N, C, ...) with (N, O, ...) -> (O, C / groups, *kernel): each tap sums one shifted product."""
    axes = tuple(range(2, input.ndim))
    if _is_pointwise(kernel, padding, groups):
        ends = [(size - 1) * s + 1 for size, s in zip(output.shape[2:], stride, strict=True)]
        input = lax.slice(input, (0,) * input.ndim, (*input.shape[:2], *ends), (1, 1, *stride))
        summed = (0, *axes)
        matrix = product(output, input, (summed, summed)).astype(input.dtype)
        return lax.reshape(matrix, matrix.shape + kernel)
    edges = []
    for size, strided, k, s, p, d in zip(
        input.shape[2:], output.shape[2:], kernel, stride, padding, dilation, strict=True
    ):
        edges.append((p, (strided - 1) * s + 1 + d * (k - 1) - size - p))
    return _convolve(
        input,
        output,
        [(1, 0, *axes), (1, 0, *axes), (1, 0, *axes)],
        window_strides=dilation,
        padding=edges,
        rhs_dilation=stride,
        batch_group_count=groups,
    )
