"""Views against torch, read and written through."""

import jax
import pytest
import torch

from tests.pytorch.operators.harness import (
    assert_lowering_matches,
    assert_program_matches,
    assert_view_inverse_matches,
    check_operators,
)
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS

SHAPES = """
    view view_as reshape reshape_as flatten unflatten squeeze squeeze:multiple unsqueeze permute transpose t movedim
    expand expand_as broadcast_to ravel atleast_1d T mT
"""
PARTS = """
    narrow narrow_copy chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split unbind unfold diagonal
    as_strided select slice hsplit diag_embed diag
"""
COPIES = """
    alias_copy squeeze_copy view_copy t_copy unfold_copy expand_copy permute_copy transpose_copy unsqueeze_copy
    diagonal_copy as_strided_copy split_with_sizes_copy unbind_copy
"""


@pytest.mark.parametrize("names", [SHAPES, PARTS, COPIES])
def test_operator(names):
    check_operators(names, torch.float32, samples=5)


BASE = torch.arange(24).reshape(2, 3, 4)
VIEWS = [
    ("view.default", [6, -1]),
    ("_unsafe_view.default", [4, 6]),
    ("_reshape_alias.default", [6, 4], [4, 1]),
    ("squeeze.default",),
    ("squeeze.dim", 1),
    ("squeeze.dims", [0, 1]),
    ("unsqueeze.default", -1),
    ("alias.default",),
    ("detach.default",),
    ("permute.default", [2, 0, -2]),
    ("transpose.int", 0, -1),
    ("movedim.int", 0, 2),
    ("movedim.intlist", [0, 1], [1, -1]),
    ("expand.default", [1, 2, -1, 4]),
    ("slice.Tensor", 2, 1, 3),
    ("slice.Tensor", 2, 1, 9223372036854775807, 2),
    ("slice.Tensor", -1, -3, None),
    ("slice.Tensor", 1, 2, 1),
    ("slice.Tensor",),
    ("narrow.default", 2, 1, 2),
    ("select.int", 1, -1),
    ("select.int", 0, 1),
    ("unbind.int", 1),
    ("split.Tensor", 3, 2),
    ("split_with_sizes.default", [1, 3], 2),
    ("chunk.default", 3, -1),
    ("diagonal.default",),
    ("diagonal.default", 1, -1, 1),
    ("unfold.default", 2, 2, 2),
    ("as_strided.default", [3, 2], [4, 1], 3),
    ("as_strided.default", [2, 2], [12, 5], 1),
    ("view.dtype", torch.int32),
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_read_and_write_through(view):
    name, *arguments = view
    base = BASE[:1, :1] if name.startswith("squeeze") else BASE
    if name != "_unsafe_view.default":
        assert_lowering_matches(f"aten.{name}", base, *arguments)
        assert_view_inverse_matches(f"aten.{name}", base, *arguments)


@pytest.mark.parametrize("base", [torch.arange(4), torch.arange(6).reshape(2, 3)])
def test_t(base):
    assert_lowering_matches("aten.t.default", base)
    assert_view_inverse_matches("aten.t.default", base)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float64, torch.bfloat16, torch.bool])
def test_view_of_other_width(dtype):
    values = torch.tensor([[1.0, -2.5, 0.0, 3.25]]) if dtype != torch.bool else torch.ones(2, 4, dtype=torch.uint8)
    assert_lowering_matches("aten.view.dtype", values, dtype)


def test_dense_as_strided_is_no_gather():
    # The usual uses, a transpose or a slice, must stay cheap: no index array as large as the result.
    program = jax.make_jaxpr(lambda x: LOWERINGS["aten.as_strided.default"](x, [4, 3, 2], [1, 4, 12], 0))(BASE.numpy())
    assert {equation.primitive.name for equation in program.eqns} <= {"reshape", "slice", "transpose"}


def test_as_strided_past_the_end_is_refused():
    with pytest.raises(AssertionError, match="looks past the tensor"):
        assert_lowering_matches("aten.as_strided.default", BASE.flatten()[:12], [4], [4], 0)


def test_writes_in_a_program():
    def program():
        values = torch.zeros(3, 4)
        values[1] = 2.0
        values[:, ::2] += torch.ones(3, 2)
        values.t()[0].copy_(torch.arange(3))
        values.diagonal().fill_(5.0)

    assert_program_matches(program)
