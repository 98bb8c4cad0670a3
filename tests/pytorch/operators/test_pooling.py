"""Pooling against torch, forward and backward."""

import pytest
import torch

from tests.pytorch.operators.harness import assert_lowering_matches, assert_program_matches, check_operator

POOLS = [
    *(
        f"nn.functional.{kind}_pool{rank}d"
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
        for rank in (1, 2, 3)
    ),
    "nn.functional.max_unpool2d",
]


@pytest.mark.parametrize("name", POOLS)
def test_operator(name):
    check_operator(name, samples=4)


@pytest.mark.parametrize("name", ["nn.functional.max_pool2d", "nn.functional.avg_pool2d"])
def test_sixteen_bits(name):
    check_operator(name, torch.bfloat16, samples=3)


@pytest.mark.parametrize("kernel", [3, 7])
def test_maximum_picks_the_element_that_torch_picks(kernel):
    # Both searches, of all taps at once and axis by axis, among ties, infinities and NaN.
    x = torch.randint(0, 3, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0] = -torch.inf
    x[0, 1, 4:6, 4:6] = torch.nan
    args = ([kernel, kernel], [2, 2], [1, 1], [1, 1], True)
    assert_lowering_matches("aten.max_pool2d_with_indices.default", x, *args)


def test_overlapping_windows_add_their_gradients():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    pool = torch.nn.MaxPool2d(3, stride=1, padding=1)
    assert_program_matches(lambda x: (pool(x) * torch.randn(2, 3, 9, 9)).sum().backward(), x)


def test_uneven_adaptive_windows():
    x = torch.randn(2, 3, 11, 7, requires_grad=True)
    assert_program_matches(lambda x: torch.nn.AdaptiveAvgPool2d((4, 7))(x).square().sum().backward(), x)
    assert_program_matches(lambda x: torch.nn.AdaptiveMaxPool2d((4, 3))(x).square().sum().backward(), x)
