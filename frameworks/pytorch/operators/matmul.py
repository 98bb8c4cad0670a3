"""Matrix products and the small dense linear algebra that training steps use."""

import contextlib
import string
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import Array, Number, cast, expand, full, is_number, opmath
from .registry import lowers
from .value_checks import require

Axes = Sequence[int]

# XLA:GPU multiplies float32 in TF32 at every precision below HIGHEST.
_PRECISIONS = {"highest": lax.Precision.HIGHEST, "high": lax.Precision.HIGH, "medium": lax.Precision.DEFAULT}
_asked: ContextVar[str | None] = ContextVar("precision", default=None)


@contextlib.contextmanager
def products_at(precision: str | None) -> Iterator[None]:
    """Lowers float32 products at one of torch's precisions; None is what torch's flag says at the moment."""
    token = _asked.set(precision)
    try:
        yield
    finally:
        _asked.reset(token)


def strictest(precisions: Collection[str]) -> str | None:
    """The most exact of several of torch's precisions; None of none."""
    return next((name for name in _PRECISIONS if name in precisions), None)


def matmul_precision() -> lax.Precision:
    """How exactly float32 products are computed: what `torch.set_float32_matmul_precision` asked for.

    Stated on every float32 product because XLA:GPU's default is TF32 where torch's is float32.
    """
    return _PRECISIONS[_asked.get() or torch.get_float32_matmul_precision()]


def scaled(array: Array, factor: Number | Array) -> Array:
    """`array * factor` in the dtype of `array`; the same array for a Python 1."""
    return array if is_number(factor) and factor == 1 else lax.mul(array, cast(factor, array.dtype))


def product(left: Array, right: Array, contract: tuple[Axes, Axes], batch: tuple[Axes, Axes] = ((), ())) -> Array:
    """A contraction of two arrays, left in the dtype it was accumulated in (float32 for 16-bit floats).

    Args:
        left: An array.
        right: Another of the same dtype.
        contract: `(axes of left, axes of right)` to sum over.
        batch: `(axes of left, axes of right)` to keep together, first in the result.

    Returns:
        What `lax.dot_general` gives: kept axes, then the other axes of left, then those of right.
    """
    wide = opmath(left.dtype)
    return lax.dot_general(left, right, (contract, batch), precision=_precision(left), preferred_element_type=wide)


def _precision(operand: Array) -> lax.Precision | None:
    return matmul_precision() if operand.dtype in (jnp.float32, jnp.complex64) else None


def _matrix_product(left: Array, right: Array) -> Array:
    batch = tuple(range(left.ndim - 2))
    return product(left, right, ((left.ndim - 1,), (left.ndim - 2,)), (batch, batch))


def _plus(self: Array, result: Array, beta: Number | Array, alpha: Number | Array) -> Array:
    """`beta * self + alpha * result`, rounded once, to the dtype of `self`."""
    result = scaled(result, alpha)
    if not (is_number(beta) and beta == 0):  # torch: a zero beta ignores even a NaN
        addend = scaled(cast(self, result.dtype), beta)
        result = lax.add(expand(addend, result.shape), result)
    return cast(result, self.dtype)


@lowers("aten.mm.default", "aten.bmm.default")
def mm(self: Array, other: Array) -> Array:
    return cast(_matrix_product(self, other), self.dtype)


@lowers("aten.mv.default")
def mv(self: Array, vec: Array) -> Array:
    return cast(product(self, vec, ((1,), (0,))), self.dtype)


@lowers("aten.dot.default")
def dot(self: Array, other: Array) -> Array:
    return cast(product(self, other, ((0,), (0,))), self.dtype)


@lowers("aten.vdot.default")
def vdot(self: Array, other: Array) -> Array:
    return dot(lax.conj(self) if jnp.iscomplexobj(self) else self, other)


@lowers("aten.addmm.default", "aten.baddbmm.default")
def addmm(self: Array, left: Array, right: Array, *, beta: Number = 1, alpha: Number = 1) -> Array:
    return _plus(self, _matrix_product(left, right), beta, alpha)


@lowers("aten.addbmm.default")
def addbmm(self: Array, left: Array, right: Array, *, beta: Number = 1, alpha: Number = 1) -> Array:
    return _plus(self, product(left, right, ((0, 2), (0, 1))), beta, alpha)


@lowers("aten.addmv.default")
def addmv(self: Array, matrix: Array, vector: Array, *, beta: Number = 1, alpha: Number = 1) -> Array:
    return _plus(self, product(matrix, vector, ((1,), (0,))), beta, alpha)


@lowers("aten.addr.default")
def addr(self: Array, left: Array, right: Array, *, beta: Number = 1, alpha: Number = 1) -> Array:
    if self.dtype == jnp.bool_:
        return (self & bool(beta)) | (outer(left, right) & bool(alpha))
    wide = opmath(left.dtype)
    return _plus(self, outer(cast(left, wide), cast(right, wide)), beta, alpha)


@lowers("aten.outer.default", "aten.ger.default")
def outer(self: Array, other: Array) -> Array:
    return lax.expand_dims(self, (1,)) * lax.expand_dims(other, (0,))


@lowers("aten.linear.default")
def linear(input: Array, weight: Array, bias: Array | None = None) -> Array:
    result = product(input, weight, ((input.ndim - 1,), (weight.ndim - 1,)))
    if bias is not None:
        result = lax.add(result, expand(cast(bias, result.dtype), result.shape))
    return cast(result, input.dtype)


@lowers("aten.matmul.default")
def matmul(self: Array, other: Array) -> Array:
    wide = opmath(self.dtype)
    return cast(jnp.matmul(self, other, precision=_precision(self), preferred_element_type=wide), self.dtype)


@lowers("aten._trilinear.default")
def trilinear(
    i1: Array, i2: Array, i3: Array, expand1: Axes, expand2: Axes, expand3: Axes, sumdim: Axes, unroll_dim: int = 1
) -> Array:
    letters = string.ascii_letters[: i1.ndim + len(expand1)]

    def without(dims: Axes) -> str:
        return "".join(letter for dim, letter in enumerate(letters) if dim not in dims)

    equation = f"{without(expand1)},{without(expand2)},{without(expand3)}->{without(sumdim)}"
    wide = opmath(i1.dtype)
    return cast(jnp.einsum(equation, i1, i2, i3, precision=_precision(i1), preferred_element_type=wide), i1.dtype)


# --- linear algebra ---


def _adjoint(matrix: Array) -> Array:
    transposed = jnp.matrix_transpose(matrix)
    return lax.conj(transposed) if jnp.iscomplexobj(matrix) else transposed


def _no_error(matrix: Array) -> Array:
    """LAPACK's `info` output of a factorization whose result was required to be finite."""
    return full(matrix.shape[:-2], 0, jnp.dtype("int32"))


@lowers("aten._linalg_check_errors.default")
def linalg_check_errors(info: Array, api_name: str, *, is_matrix: bool) -> tuple[()]:
    return ()


@lowers("aten.linalg_cholesky_ex.default")
def linalg_cholesky_ex(self: Array, *, upper: bool = False, check_errors: bool = False) -> tuple[Array, Array]:
    factor = lax.linalg.cholesky(_adjoint(self) if upper else self, symmetrize_input=False)
    require(lax.is_finite(factor))
    return (_adjoint(factor) if upper else factor), _no_error(self)


@lowers("aten.linalg_inv_ex.default")
def linalg_inv_ex(A: Array, *, check_errors: bool = False) -> tuple[Array, Array]:
    inverse = jnp.linalg.inv(A)
    require(lax.is_finite(inverse))
    return inverse, _no_error(A)


@lowers("aten.linalg_solve_triangular.default")
def linalg_solve_triangular(
    self: Array, B: Array, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Array:
    batch = np.broadcast_shapes(self.shape[:-2], B.shape[:-2])
    return lax.linalg.triangular_solve(
        expand(self, batch + self.shape[-2:]),
        expand(B, batch + B.shape[-2:]),
        left_side=left,
        lower=not upper,
        unit_diagonal=unitriangular,
    )


@lowers("aten.linalg_qr.default")
def linalg_qr(A: Array, mode: str = "reduced") -> tuple[Array, Array]:
    if mode == "r":
        return full((0,), 0, A.dtype), jnp.linalg.qr(A, mode="r")
    return tuple(jnp.linalg.qr(A, mode=mode))


@lowers("aten._linalg_eigh.default")
def linalg_eigh(A: Array, UPLO: str = "L", compute_v: bool = True) -> tuple[Array, Array]:
    vectors, values = lax.linalg.eigh(A, lower=UPLO.upper() == "L", symmetrize_input=False)
    require(lax.is_finite(values))
    return values, vectors if compute_v else full((0,), 0, A.dtype)
