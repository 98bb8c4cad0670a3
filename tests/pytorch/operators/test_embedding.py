"""Embeddings and bags of them against torch, forward and backward."""

import itertools

import pytest
import torch
from torch import nn

from tests.pytorch.operators.harness import assert_lowering_matches, assert_program_matches, check_operator


@pytest.mark.parametrize("name", ["nn.functional.embedding", "nn.functional.embedding_bag"])
def test_operator(name):
    check_operator(name, samples=12)


def test_sixteen_bit_gradients_are_summed_in_float32():
    # torch adds up to 5 rows in bfloat16, half a unit of 2**-8 wrong each time, on values up to 8.
    check_operator("nn.functional.embedding", torch.bfloat16, samples=4, tolerance={"rtol": 3.2e-2, "atol": 5e-2})


@pytest.mark.parametrize("by_frequency", [False, True])
def test_padding_and_frequency(by_frequency):
    layer = nn.Embedding(6, 3, padding_idx=1, scale_grad_by_freq=by_frequency)
    indices = torch.tensor([[1, 0, 5], [5, 5, 2]])
    assert_program_matches(lambda: layer(indices).square().sum().backward())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode):
    indices, offsets = torch.tensor([4, 1, 1, 3, 0, 5]), torch.tensor([0, 2, 2, 5])
    for padding, last in itertools.product((None, 1), (False, True)):
        bag = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding, include_last_offset=last)
        starts = torch.cat([offsets, torch.tensor([6])]) if last else offsets
        assert_program_matches(lambda bag=bag, starts=starts: bag(indices, starts).square().sum().backward())


def test_bag_weights():
    bag, indices = nn.EmbeddingBag(6, 3, mode="sum"), torch.tensor([[4, 1], [1, 3]])
    weights = torch.rand(2, 2, requires_grad=True)
    assert_program_matches(lambda: bag(indices, per_sample_weights=weights).square().sum().backward())


def test_bags_without_gradients():
    bag = nn.EmbeddingBag(6, 3).requires_grad_(False)
    assert_program_matches(lambda: bag(torch.tensor([4, 1, 1]), torch.tensor([0, 1])))


def test_rows_longer_than_the_largest_norm_are_shortened():
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert_lowering_matches("aten.embedding_renorm.default", table, torch.tensor([0, 2, 2, 5]), 1.0, 2.0)
