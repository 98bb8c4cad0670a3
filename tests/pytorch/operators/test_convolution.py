"""Convolutions and their gradients against torch."""

import pytest
import torch

from tests.pytorch.operators.harness import Call, check_operator, compare

CONVOLUTIONS = [f"nn.functional.conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)]
# (rank, kernel, stride, padding, dilation, transposed, output padding, groups)
GEOMETRIES = [
    (1, 3, 2, 1, 2, False, 0, 2),
    (2, 1, 1, 0, 1, False, 0, 1),
    (2, 1, 2, 0, 1, False, 0, 1),
    (2, 1, 3, 1, 1, False, 0, 4),
    (2, 3, 2, 1, 1, False, 0, 4),
    (2, 2, 3, 0, 2, False, 0, 2),
    (3, 2, 2, 1, 1, False, 0, 1),
    (1, 3, 2, 1, 1, True, 1, 1),
    (2, 1, 2, 0, 1, True, 1, 1),
    (2, 3, 2, 1, 2, True, 1, 2),
    (2, 2, 1, 0, 2, True, 1, 4),
    (3, 2, 3, 1, 1, True, 0, 1),
]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operator(name):
    # Sums of up to 240 products of values up to 9 that nearly cancel leave up to 3e-5 in float32.
    check_operator(name, samples=4, tolerance={"rtol": 1.3e-5, "atol": 1e-4})


def test_sixteen_bits():
    # The result is rounded to bfloat16 before the bias is added and again after: two units of 2**-8 of values up to 9.
    check_operator("nn.functional.conv2d", torch.bfloat16, samples=4, tolerance={"rtol": 1.6e-2, "atol": 8e-2})


def test_geometries():
    calls = []
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for rank, kernel, stride, padding, dilation, transposed, extra, groups in GEOMETRIES:
        x = draw(2, 4, *(7, 6, 5)[:rank])
        weight = draw(*((4, 8 // groups) if transposed else (8, 4 // groups)), *[kernel] * rank)
        geometry = ([stride] * rank, [padding] * rank, [dilation] * rank, transposed, [extra] * rank, groups)
        args = (x, weight, draw(8), *geometry)
        result = torch.ops.aten.convolution.default(*args)
        calls.append(Call("aten.convolution.default", args, {}, result))
        backward = (draw(*result.shape), x, weight, [8], *geometry, [True, True, True])
        gradients = torch.ops.aten.convolution_backward.default(*backward)
        calls.append(Call("aten.convolution_backward.default", backward, {}, gradients))
    compare(calls)


def test_gradients_that_are_not_wanted_are_not_computed():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    args = (torch.randn(1, 3, 3, 3), x, weight, [3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    expected = torch.ops.aten.convolution_backward.default(*args)
    compare([Call("aten.convolution_backward.default", args, {}, expected)])
