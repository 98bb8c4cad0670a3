"""Interpolation and sliding blocks against torch, forward and backward."""

import pytest
import torch

from tests.pytorch.operators.harness import assert_program_matches, check_operator

MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic", "area")
interpolate = torch.nn.functional.interpolate


@pytest.mark.parametrize("mode", MODES)
def test_operator(mode):
    check_operator(f"nn.functional.interpolate:{mode}", samples=4)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [2.0, 0.6])
def test_gradient_for_a_scale_factor(mode, scale):
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    assert_program_matches(lambda x: interpolate(x, scale_factor=scale, mode=mode).square().sum().backward(), x)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3, 4), (11, 9)])
def test_antialiasing(mode, size):
    x = torch.randn(2, 3, 8, 7, requires_grad=True)
    assert_program_matches(lambda x: interpolate(x, size=size, mode=mode, antialias=True).square().sum().backward(), x)


def test_sliding_blocks():
    check_operator("nn.functional.unfold", samples=4)
    columns = torch.randn(2, 12, 6, requires_grad=True)
    fold = torch.nn.Fold((5, 6), (2, 2), padding=1, stride=(3, 2), dilation=2)
    blocks = torch.nn.Unfold((2, 2), padding=1, stride=(3, 2), dilation=2)(torch.randn(2, 3, 5, 6))
    assert_program_matches(lambda x: fold(x).square().sum().backward(), columns[..., :1].expand(*blocks.shape))


@pytest.mark.parametrize("name", ["pixel_shuffle", "pixel_unshuffle", "channel_shuffle"])
def test_shuffling(name):
    check_operator(f"nn.functional.{name}", samples=4)
