"""Tensors made from numbers, against torch."""

import jax.numpy as jnp
import pytest
import torch

from tests.pytorch.operators.harness import assert_lowering_matches, check_operators
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS

FILLED = "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor zero_"
RANGES = "arange linspace linspace:tensor_overload logspace logspace:tensor_overload eye tril triu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("names", [FILLED, RANGES])
def test_operator(names, dtype):
    check_operators(names, dtype, samples=5)


@pytest.mark.parametrize(
    "arguments", [(5,), (2, 9, 3), (5, -1, -2), (0.0, 1.0, 0.1), (3, 3), (1, 2.5), (10**9, 10**9 + 7)]
)
@pytest.mark.parametrize("dtype", [None, torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_arange(arguments, dtype):
    name = {1: "default", 2: "start", 3: "start_step"}[len(arguments)]
    assert_lowering_matches(f"aten.arange.{name}", *arguments, dtype=dtype)


@pytest.mark.parametrize("value", [True, 3, 2.5])
def test_full_takes_its_dtype_from_the_value(value):
    assert_lowering_matches("aten.full.default", [2, 3], value)
    assert_lowering_matches("aten.scalar_tensor.default", value)


@pytest.mark.parametrize("name", ["tril_indices", "triu_indices"])
@pytest.mark.parametrize("arguments", [(3, 3), (3, 5, 1), (4, 2, -1), (0, 3)])
def test_triangle_indices(name, arguments):
    assert_lowering_matches(f"aten.{name}.default", *arguments)


@pytest.mark.parametrize("name", ["empty.memory_format", "empty_strided.default", "new_empty.default"])
def test_empty_has_torch_shape_and_dtype(name):
    lowering = LOWERINGS[f"aten.{name}"]
    if name.startswith("new"):
        result = lowering(jnp.ones(2), [2, 3], dtype=torch.bfloat16)
    else:
        result = lowering([2, 3], [3, 1], dtype=torch.bfloat16, device="cpu")
    assert result.shape == (2, 3)
    assert result.dtype == jnp.bfloat16
