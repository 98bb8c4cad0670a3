"""Operators that see the memory behind a tensor, which a compiled program lays out by itself."""

import pytest
import torch
from comparison import difference
from torch.testing._internal.opinfo.core import SampleInput
from trial import CannotCompile, Trial, compiled


def assert_same_as_torch(function, *tensors):
    trial = Trial(function, SampleInput(tensors[0], args=tensors[1:]))
    trial.capture()
    [(results, _)] = compiled([trial])([trial.arrays])
    assert not trial.refusal
    assert difference(trial, results, None) == ("", False)


def leaf(*shape):
    return torch.arange(1.0, torch.Size(shape).numel() + 1).reshape(shape).requires_grad_()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).as_strided((2, 3), (1, 2), 1),
        lambda x: (x * 2)[2:].as_strided((2, 3), (1, 2), 0),
        lambda x: (x * 2)[2:].as_strided((2, 3), (1, 2)),
        lambda x: (x * 2).view(2, 4).t().as_strided((3, 2), (2, 1)),
        lambda x: torch.as_strided_scatter(x * 2, x[:3], (3,), (2,), 1) * 3,
    ],
)
def test_strides_count_in_the_memory_of_what_the_step_computes(function):
    assert_same_as_torch(function, leaf(8))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.as_strided((2, 3), (1, 2), 1),
        lambda x: (x * 2).view(2, 4).t().clone().as_strided((2, 3), (1, 2), 0),
        lambda x: torch.as_strided_copy((x * 2)[2:], (2, 3), (1, 2), 0),
    ],
)
def test_strides_are_refused_where_memory_may_be_laid_out_in_another_way(function):
    with pytest.raises(CannotCompile, match="memory may be laid out in another way"):
        Trial(function, SampleInput(leaf(8))).capture()


def test_a_write_through_strides():
    def function(x):
        whole = x * 2
        whole[1:].as_strided((3,), (2,), 1).mul_(10)
        return whole

    assert_same_as_torch(function, leaf(8))


def test_what_an_operator_returns_besides_what_it_writes():
    def function(x, mean, variance):
        return torch.ops.aten._native_batch_norm_legit.default(x, None, None, mean, variance, True, 0.1, 1e-5)[0]

    assert_same_as_torch(function, leaf(4, 2), torch.zeros(2), torch.ones(2))


def test_factors_of_a_determinant_are_those_that_its_gradient_expects():
    matrix = torch.tensor([[1.0, 2.0, 0.5], [3.0, -1.0, 2.0], [0.0, 4.0, 1.0]])
    assert_same_as_torch(torch.linalg.det, matrix.requires_grad_())
    assert_same_as_torch(torch.linalg.det, matrix.detach().mT.requires_grad_())
    assert_same_as_torch(lambda x: torch.linalg.slogdet(x.mT)[1], matrix)


def test_results_that_are_written_to_where_they_are_to_go():
    def function(x):
        into = torch.zeros(2, 4)
        with torch.no_grad():
            torch.mm(x, x.mT, out=into[:, :2])
            torch.add(x, 1, alpha=2, out=into[:, 2:])
        return into

    assert_same_as_torch(function, leaf(2, 2).detach())
