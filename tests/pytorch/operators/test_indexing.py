"""Reads and writes at computed positions, joins and padding against torch, forward and backward."""

import jax
import pytest
import torch

from tests.pytorch.operators.harness import (
    assert_lowering_matches,
    assert_program_matches,
    check_operator,
    check_operators,
    to_numpy,
    to_torch,
)
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS

POSITIONS = """
    index_select index_add index_copy gather scatter scatter_add take take_along_dim masked_scatter put nonzero_static
    bucketize searchsorted
"""
REDUCING = """
    scatter_reduce:sum scatter_reduce:prod scatter_reduce:mean scatter_reduce:amin scatter_reduce:amax
    index_reduce:mean index_reduce:prod index_reduce:amin index_reduce:amax
"""
JOINS = """
    cat stack hstack vstack dstack column_stack block_diag roll flip fliplr flipud rot90 repeat tile
    meshgrid:list_of_tensors
"""
PADDING = """
    constant_pad_nd nn.functional.pad:constant nn.functional.pad:reflect nn.functional.pad:replicate
    nn.functional.pad:replicate_negative nn.functional.pad:circular
"""
SCATTERS = "select_scatter slice_scatter diagonal_scatter as_strided_scatter"


BETA = "ignore:index_reduce"
DEPRECATED = "ignore:The reduce argument of torch.scatter"
SLOW = "ignore:torch.searchsorted"


@pytest.mark.filterwarnings(DEPRECATED, SLOW)
@pytest.mark.parametrize("names", [POSITIONS, JOINS, PADDING, SCATTERS])
def test_float32(names):
    check_operators(names, torch.float32, samples=5)


@pytest.mark.filterwarnings(BETA)
def test_reducing_scatters():
    check_operators(REDUCING, torch.float32, samples=2)


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers(dtype):
    check_operators("index_select index_add gather scatter scatter_add cat stack take", dtype)


def test_bfloat16():
    check_operators("index_select gather scatter cat nn.functional.pad:reflect", torch.bfloat16)


def test_data_dependent_shapes_are_the_only_ones_left_out():
    check_operator("index_fill", skip={"aten._unique.default"})
    check_operator("index_put", samples=12, skip={"aten.index.Tensor"})
    check_operator("repeat_interleave", skip={"aten.repeat_interleave.Tensor"})


def test_repeat_interleave_of_known_size():
    assert_lowering_matches("aten.repeat_interleave.Tensor", torch.tensor([2, 0, 3]), output_size=5)


X = torch.arange(120.0).reshape(2, 3, 4, 5)
PAIRS, PAIR = torch.tensor([[0, -1], [1, 1]]), torch.tensor([2, -3])


@pytest.mark.parametrize(
    "indices",
    [
        [PAIRS],
        [None, PAIRS],
        [PAIRS, PAIR],
        [None, PAIRS, PAIR],
        [PAIRS, None, PAIR],
        [None, None, None, PAIR],
        [PAIRS, None, None, PAIR],
        [PAIR.new_empty(0)],
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_index_and_index_put(indices, accumulate):
    indices = [index % 2 if index is not None and i == 0 else index for i, index in enumerate(indices)]
    assert_lowering_matches("aten.index.Tensor", X, indices)
    selected = torch.ops.aten.index.Tensor(X, indices)
    # Where positions repeat, only equal values have one right answer without accumulation.
    values = torch.rand(selected.shape) if accumulate else torch.tensor(7.0)
    assert_lowering_matches("aten.index_put.default", X, indices, values, accumulate)


@pytest.mark.parametrize("values", [torch.tensor(5.0), torch.tensor([6.0]), torch.rand(1, 5), torch.rand(5)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_masked_index_put(values, accumulate):
    mask = torch.rand(2, 3, 4) > 0.5
    assert_lowering_matches("aten.index_put.default", X, [mask], values, accumulate)


@pytest.mark.parametrize("values", [torch.tensor(5.0), torch.rand(2, 1, 1, 5), torch.rand(1, 4, 5)])
def test_mask_of_an_inner_dimension(values):
    assert_lowering_matches("aten.index_put.default", X, [None, torch.tensor([True, False, True])], values)


def test_mask_with_values_of_its_own_number_is_refused():
    mask = torch.tensor([True, True])
    with pytest.raises(AssertionError, match="boolean mask"):
        assert_lowering_matches("aten.index_put.default", X, [mask], torch.rand(2, 3, 4, 5))
    with pytest.raises(AssertionError, match="boolean mask"):
        assert_lowering_matches("aten.index.Tensor", X, [mask])


def test_accumulation_in_bfloat16_does_not_saturate():
    # Added up one by one in bfloat16, ones stop at 256; torch's own scatter_add does, so it is no reference here.
    program = jax.jit(lambda *arrays: LOWERINGS["aten.scatter_add.default"](arrays[0], 0, *arrays[1:]))
    ones = torch.ones(1000, dtype=torch.bfloat16)
    with jax.enable_x64(True):
        result = program(*map(to_numpy, (ones[:1] - 1, torch.zeros(1000, dtype=torch.int64), ones)))
    assert to_torch(result)[0] == 1000


def test_smaller_index_touches_a_corner():
    index = torch.tensor([[1, 0], [2, 2]])
    base, source = torch.zeros(4, 5), torch.rand(3, 3)
    assert_lowering_matches("aten.gather.default", torch.rand(4, 5), 0, index)
    assert_lowering_matches("aten.scatter_add.default", base, 0, index, source)
    assert_lowering_matches("aten.scatter.value", base, 1, index, 2)
    assert_lowering_matches("aten.scatter.reduce", base + 2, 1, index, source, reduce="multiply")
    assert_lowering_matches("aten.scatter.value_reduce", base + 2, 1, index, 3, reduce="add")


def test_gradients_of_views():
    def program():
        values = torch.rand(4, 6, requires_grad=True)
        parts = [
            values[1],
            values[:, 1:5:2],
            values.diagonal(1),
            values.unfold(1, 3, 2),
            values.as_strided([2, 2], [1, 6]),
        ]
        sum(part.sin().sum() for part in parts).backward()

    assert_program_matches(program)


def test_masked_scatter_backward():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert_lowering_matches("aten.masked_scatter_backward.default", torch.rand(2, 3), mask, [5])


def test_fill_diagonal():
    def program():
        torch.zeros(5, 2).fill_diagonal_(3.0, wrap=True)
        torch.zeros(3, 4).fill_diagonal_(3.0)

    assert_program_matches(program)
