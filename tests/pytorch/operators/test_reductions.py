"""Reductions, softmax, running sums and orders against torch, forward and backward."""

import math

import pytest
import torch

from tests.pytorch.operators.harness import assert_lowering_matches, assert_program_matches, check_operators

REDUCTIONS = """
    sum nansum mean nanmean prod amax amin aminmax argmax argmin any all count_nonzero max:reduction_no_dim
    max:reduction_with_dim min:reduction_no_dim min:reduction_with_dim logsumexp sum_to_size trace
"""
MOMENTS = """
    var std var_mean std_mean var:unbiased std_mean:unbiased linalg.vector_norm norm norm:inf renorm dist cov
    nn.functional.normalize
"""
SOFTMAX = """
    softmax softmax:with_dtype log_softmax log_softmax:with_dtype nn.functional.softmin _softmax_backward_data
"""
RUNNING = "cumsum cumprod logcumsumexp cummax cummin cumulative_trapezoid diff"
ORDERS = "sort argsort msort topk kthvalue median nanmedian quantile"


@pytest.mark.parametrize("names", [REDUCTIONS, MOMENTS, SOFTMAX, RUNNING, ORDERS])
def test_float32(names):
    check_operators(names, torch.float32, samples=5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers(dtype):
    check_operators("sum prod any all amax amin count_nonzero cumsum cummax", dtype)


def test_bfloat16():
    check_operators("sum mean prod amax var softmax logsumexp linalg.vector_norm cumsum", torch.bfloat16)


def test_log_softmax_in_bfloat16():
    # torch rounds max + log(sum) to the sum's own magnitude before it subtracts; near zero that leaves an error of one
    # unit of the larger number, 2**-8.
    values = torch.randn(8, 5).mul(3).bfloat16()
    assert_lowering_matches("aten._log_softmax.default", values, 1, False, tolerance={"rtol": 1.6e-2, "atol": 8e-3})


def test_sum_of_bfloat16_does_not_saturate():
    # Added up in bfloat16, a thousand ones stop at 256.
    assert_lowering_matches("aten.sum.default", torch.ones(1000, dtype=torch.bfloat16))


VALUES = torch.tensor([[3.0, math.nan, 1.0, 1.0], [2.0, 5.0, -math.inf, 2.0], [math.inf, 0.0, 0.0, -0.0]])


@pytest.mark.parametrize("descending", [False, True])
def test_stable_sort_keeps_ties_and_puts_nan_on_top(descending):
    assert_lowering_matches("aten.sort.stable", VALUES, stable=True, dim=1, descending=descending)
    integers = torch.tensor([[2, 1, 2, 1, 0], [1, 1, 1, 1, 1]])
    assert_lowering_matches("aten.sort.stable", integers, stable=True, dim=-1, descending=descending)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("values", [torch.randn(4, 9), torch.randperm(36).reshape(4, 9) - 18])
def test_topk(largest, values):
    assert_lowering_matches("aten.topk.default", values, 3, 0, largest)
    assert_lowering_matches("aten.topk.default", values, 5, -1, largest)


@pytest.mark.parametrize("largest", [False, True])
def test_topk_takes_nan_for_the_largest(largest):
    assert_lowering_matches("aten.topk.default", torch.tensor([3.0, math.nan, 1.0, -2.0]), 4, 0, largest)


@pytest.mark.parametrize("name", ["max.dim", "min.dim", "cummax.default", "cummin.default", "median.dim"])
def test_positions_with_nan_and_ties(name):
    assert_lowering_matches(f"aten.{name}", VALUES, 1)


@pytest.mark.parametrize("name", ["argmax", "argmin", "amax", "amin", "median", "nanmedian"])
def test_whole_tensor_with_nan(name):
    assert_lowering_matches(f"aten.{name}.default", VALUES)


def test_rows_of_minus_infinity():
    rows = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
    assert_lowering_matches("aten.logsumexp.default", rows, [1])
    assert_lowering_matches("aten._softmax.default", rows, 1, False)
    assert_lowering_matches("aten._log_softmax.default", rows, 1, False)


def test_gradient_of_an_extreme_is_shared_by_ties():
    def program():
        values = torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 2.0]], requires_grad=True)
        (values.max() + values.amax(1).sum() + values.min(0).values.sum()).backward()

    assert_program_matches(program)
