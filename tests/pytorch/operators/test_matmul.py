"""Matrix products and dense linear algebra against torch."""

import jax
import numpy as np
import pytest
import torch
from jax import lax

from tests.pytorch.operators.harness import assert_lowering_matches, check_operator
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS
from trainingcompiler.frameworks.pytorch.operators.matmul import matmul_precision

PRODUCTS = (
    "mm",
    "bmm",
    "mv",
    "dot",
    "vdot",
    "matmul",
    "addmm",
    "baddbmm",
    "addbmm",
    "addmv",
    "addr",
    "outer",
    "einsum",
)
LAYERS = ("nn.functional.linear", "nn.functional.bilinear")
FACTORIZATIONS = ("linalg.cholesky", "linalg.inv", "linalg.solve_triangular", "linalg.qr")


# The samples' products have up to 25 terms of up to 81 each: 25 * 81 * 2^-24 is what rounding may leave of a small sum,
# in an order of adding that differs between processors.
FLOAT32 = {"rtol": 1.3e-6, "atol": 1.2e-4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*PRODUCTS, *LAYERS, *FACTORIZATIONS])
def test_operator(name, dtype):
    rounds = dtype is torch.float32 and name in PRODUCTS
    check_operator(name, dtype, samples=4, tolerance=FLOAT32 if rounds else None)


@pytest.mark.parametrize("name", ["addmm", "baddbmm", "nn.functional.linear"])
def test_sixteen_bit_products_accumulate_in_float32(name):
    check_operator(name, torch.bfloat16, samples=4)


def test_integer_product():
    assert_lowering_matches("aten.mm.default", torch.arange(6).reshape(2, 3), torch.arange(12).reshape(3, 4))


def test_linear_and_matmul_met_whole():
    assert_lowering_matches("aten.linear.default", torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5))
    assert_lowering_matches("aten.matmul.default", torch.randn(2, 3, 4), torch.randn(4, 5))


def test_zero_beta_ignores_what_it_multiplies():
    nothing = torch.full((2, 2), torch.nan)
    assert_lowering_matches("aten.addmm.default", nothing, torch.randn(2, 3), torch.randn(3, 2), beta=0)


@pytest.mark.parametrize("triangle", ["L", "U"])
def test_eigenvectors_rebuild_the_matrix(triangle):
    half = np.random.default_rng(0).standard_normal((4, 4))
    matrix = half + half.T
    with jax.enable_x64(True):
        values, vectors = LOWERINGS["aten._linalg_eigh.default"](jax.numpy.asarray(matrix), triangle)
    values, vectors = np.asarray(values), np.asarray(vectors)
    # Only up to the signs of the vectors is the factorization unique; float64 leaves 1e-12 after 4 x 4 products.
    np.testing.assert_allclose(vectors * values @ vectors.T, matrix, atol=1e-12)


@pytest.mark.parametrize(
    ("setting", "precision"),
    [("highest", lax.Precision.HIGHEST), ("high", lax.Precision.HIGH), ("medium", lax.Precision.DEFAULT)],
)
def test_precision_follows_torch(setting, precision, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    assert matmul_precision() == precision
    operands = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)
    text = jax.jit(lambda *operands: LOWERINGS["aten.mm.default"](*operands)).lower(*operands).as_text()
    assert f"precision = [{precision.name}, {precision.name}]" in text
