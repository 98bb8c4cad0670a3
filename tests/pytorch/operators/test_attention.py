"""Attention against torch, forward and backward."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from tests.pytorch.operators.harness import assert_lowering_matches, assert_program_matches, check_operator

# Both sides sum in float32 in their own order, and torch's kernel takes its exponentials from a polynomial.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def heads(count, length, requires_grad=True, dtype=torch.float32):
    return torch.randn(2, count, length, 8).to(dtype).requires_grad_(requires_grad)


def test_operator():
    check_operator("nn.functional.scaled_dot_product_attention", samples=12, tolerance=TOLERANCE)


def test_sixteen_bits():
    # Scores' gradients are rounded to bfloat16 before the products, at different places: 2**-8 of values up to 9.
    check_operator(
        "nn.functional.scaled_dot_product_attention",
        torch.bfloat16,
        samples=4,
        tolerance={"rtol": 3e-2, "atol": 6e-2},
    )


@pytest.mark.parametrize("key_length", [4, 6])
def test_causal_with_few_key_heads(key_length):
    def program(query, key, value):
        attend(query, key, value, is_causal=True, enable_gqa=True).square().sum().backward()

    assert_program_matches(program, heads(4, 5), heads(2, key_length), heads(2, key_length))


def test_row_with_every_key_masked():
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    mask[2, 3:] = False

    def program(query, key, value):
        attend(query, key, value, attn_mask=mask, scale=0.3).square().sum().backward()

    assert_program_matches(program, heads(2, 4), heads(2, 6), heads(2, 6))


def test_softmax_of_nothing_is_zero():
    scores = torch.randn(3, 4)
    scores[1] = -torch.inf
    assert_lowering_matches("aten._safe_softmax.default", scores, -1)
    assert_lowering_matches("aten._safe_softmax.default", scores.bfloat16(), 1, torch.float32)
