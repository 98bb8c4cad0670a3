"""Factorizations of matrices beyond those in `matmul`: LU and determinants, SVD, QR's parts, general eigenvalues.

Where LAPACK would report an error, the program checks that what it has computed is finite, and torch raises the error.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .promotion import INT32, Array, cast, expand, full
from .registry import lowers
from .value_checks import require

_linalg = lax.linalg


def _adjoint(matrix: Array) -> Array:
    transposed = jnp.matrix_transpose(matrix)
    return lax.conj(transposed) if jnp.iscomplexobj(matrix) else transposed


def _no_error(matrix: Array) -> Array:
    """LAPACK's `info` output of a factorization whose result was required to be finite."""
    return full(matrix.shape[:-2], 0, INT32)


def _batched(*arrays: Array) -> list[Array]:
    """Matrices broadcast against each other in all but their last two dimensions."""
    batch = jnp.broadcast_shapes(*(array.shape[:-2] for array in arrays))
    return [expand(array, batch + array.shape[-2:]) for array in arrays]


# --- LU ---


def _lu(A: Array) -> tuple[Array, Array, Array]:
    """The factors in one matrix, torch's pivots, which count from 1, and the permutation of the rows."""
    if A.size == 0:
        pivots = full((*A.shape[:-2], min(A.shape[-2:])), 0, INT32)
        return A, pivots, jnp.broadcast_to(jnp.arange(A.shape[-2], dtype=INT32), A.shape[:-1])
    factors, pivots, permutation = _linalg.lu(A)
    return factors, pivots + INT32.type(1), permutation


def _lu_as_torch(A: Array, contiguous: bool) -> tuple[Array, Array]:
    """Factors and pivots as torch saves them for gradients: of the transpose, where that is how A lies in memory."""
    factors, pivots, _ = _lu(jnp.matrix_transpose(A) if contiguous and not jnp.iscomplexobj(A) else A)
    return factors, pivots


def _permutation_matrix(permutation: Array, dtype: jnp.dtype) -> Array:
    """P such that `A = P @ L @ U`, where `A[permutation] = L @ U`."""
    size = permutation.shape[-1]
    columns = jnp.expand_dims(permutation, -2) == jnp.arange(size, dtype=permutation.dtype)[:, None]
    return cast(columns, dtype)


def _unpacked(factors: Array) -> tuple[Array, Array]:
    rows, columns = factors.shape[-2:]
    rank = min(rows, columns)
    lower = jnp.tril(factors[..., :rank], -1) + jnp.eye(rows, rank, dtype=factors.dtype)
    return lower, jnp.triu(factors[..., :rank, :])


def _require_pivoting(pivot: bool) -> None:
    if not pivot:
        raise NotImplementedError("an LU factorization without pivoting")


@lowers("aten.linalg_lu_factor_ex.default")
def linalg_lu_factor_ex(A: Array, *, pivot: bool = True, check_errors: bool = False) -> tuple[Array, Array, Array]:
    _require_pivoting(pivot)
    factors, pivots, _ = _lu(A)
    require(jnp.diagonal(factors, axis1=-2, axis2=-1) != 0)
    return factors, pivots, _no_error(A)


@lowers("aten.linalg_lu.default")
def linalg_lu(A: Array, *, pivot: bool = True) -> tuple[Array, Array, Array]:
    _require_pivoting(pivot)
    factors, _, permutation = _lu(A)
    return _permutation_matrix(permutation, A.dtype), *_unpacked(factors)


def _permutation_of(pivots: Array, size: int) -> Array:
    if pivots.size == 0:
        return jnp.broadcast_to(jnp.arange(size, dtype=INT32), (*pivots.shape[:-1], size))
    return _linalg.lu_pivots_to_permutation(cast(pivots, INT32) - INT32.type(1), size)


@lowers("aten.lu_unpack.default")
def lu_unpack(
    LU_data: Array, LU_pivots: Array, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Array, Array, Array]:
    empty = full((0,), 0, LU_data.dtype)
    lower, upper = _unpacked(LU_data) if unpack_data else (empty, empty)
    if not unpack_pivots:
        return empty, lower, upper
    return _permutation_matrix(_permutation_of(LU_pivots, LU_data.shape[-2]), LU_data.dtype), lower, upper


def _solve_factored(factors: Array, permutation: Array, B: Array, left: bool, adjoint: bool) -> Array:
    """X of `A @ X = B`, where `A[permutation] = L @ U`, or of `X @ A = B`, or with the adjoint of A."""
    if not left:
        return _adjoint(_solve_factored(factors, permutation, _adjoint(B), True, not adjoint))
    if B.size == 0:
        return B

    def triangular(B: Array, lower: bool) -> Array:
        return _linalg.triangular_solve(
            factors,
            B,
            left_side=True,
            lower=lower,
            unit_diagonal=lower,
            transpose_a=adjoint,
            conjugate_a=adjoint and jnp.iscomplexobj(factors),
        )

    columns = jnp.expand_dims(permutation, -1)
    if not adjoint:
        B = jnp.take_along_axis(B, jnp.broadcast_to(columns, B.shape), -2, mode="promise_in_bounds")
        return triangular(triangular(B, True), False)
    B = triangular(triangular(B, False), True)
    inverse = jnp.argsort(columns, axis=-2)
    return jnp.take_along_axis(B, jnp.broadcast_to(inverse, B.shape), -2, mode="promise_in_bounds")


@lowers("aten.linalg_lu_solve.default")
def linalg_lu_solve(LU: Array, pivots: Array, B: Array, *, left: bool = True, adjoint: bool = False) -> Array:
    permutation = _permutation_of(pivots, LU.shape[-1])
    factors, B = _batched(LU, B)
    permutation = expand(permutation, factors.shape[:-1])
    return _solve_factored(factors, permutation, B, left, adjoint)


@lowers("aten._linalg_solve_ex.default")
def linalg_solve_ex(
    A: Array, B: Array, *, left: bool = True, check_errors: bool = False
) -> tuple[Array, Array, Array, Array]:
    factors, pivots, permutation = _lu(A)
    is_vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    right = jnp.expand_dims(B, -1) if is_vector else B
    square, right = _batched(factors, right)
    result = _solve_factored(square, expand(permutation, square.shape[:-1]), right, left or is_vector, False)
    require(lax.is_finite(abs(result)))
    return (jnp.squeeze(result, -1) if is_vector else result), factors, pivots, _no_error(A)


def _sign_and_diagonal(factors: Array, pivots: Array) -> tuple[Array, Array]:
    """The sign of the row permutation, and the diagonal of U."""
    swaps = jnp.sum(pivots != jnp.arange(1, pivots.shape[-1] + 1, dtype=INT32), axis=-1)
    return cast(1 - 2 * (swaps % 2), factors.dtype), jnp.diagonal(factors, axis1=-2, axis2=-1)


@lowers("aten._linalg_det.default")
def linalg_det(A: Array, *, contiguous: bool = False) -> tuple[Array, Array, Array]:
    factors, pivots = _lu_as_torch(A, contiguous)
    sign, diagonal = _sign_and_diagonal(factors, pivots)
    return sign * jnp.prod(diagonal, axis=-1), factors, pivots


@lowers("aten._linalg_slogdet.default")
def linalg_slogdet(A: Array, *, contiguous: bool = False) -> tuple[Array, Array, Array, Array]:
    factors, pivots = _lu_as_torch(A, contiguous)
    sign, diagonal = _sign_and_diagonal(factors, pivots)
    size = abs(diagonal)
    phases = diagonal / size if jnp.iscomplexobj(A) else jnp.sign(diagonal)
    return sign * jnp.prod(phases, axis=-1), jnp.sum(jnp.log(size), axis=-1), factors, pivots


# --- Cholesky ---


@lowers("aten.cholesky.default")
def cholesky(self: Array, upper: bool = False) -> Array:
    factor = _linalg.cholesky(_adjoint(self) if upper else self, symmetrize_input=False)
    require(lax.is_finite(abs(factor)))
    return _adjoint(factor) if upper else factor


@lowers("aten._cholesky_solve_helper.default")
def cholesky_solve(self: Array, A: Array, upper: bool) -> Array:
    if self.size == 0:
        return self
    factor = _adjoint(A) if upper else A

    def triangular(B: Array, adjoint: bool) -> Array:
        conjugate = adjoint and jnp.iscomplexobj(factor)
        return _linalg.triangular_solve(
            factor, B, left_side=True, lower=True, transpose_a=adjoint, conjugate_a=conjugate
        )

    return triangular(triangular(self, False), True)


@lowers("aten.cholesky_inverse.default")
def cholesky_inverse(self: Array, upper: bool = False) -> Array:
    return cholesky_solve(jnp.broadcast_to(jnp.eye(self.shape[-1], dtype=self.dtype), self.shape), self, upper)


@lowers("aten.triangular_solve.default")
def triangular_solve(
    self: Array, A: Array, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Array, Array]:
    B, A = _batched(self, A)
    if B.size == 0:
        return B, A
    solution = _linalg.triangular_solve(
        A, B, left_side=True, lower=not upper, transpose_a=transpose, unit_diagonal=unitriangular
    )
    return solution, A


# --- singular values and eigenvalues ---


@lowers("aten._linalg_svd.default")
def linalg_svd(
    A: Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Array, Array, Array]:
    if not compute_uv:
        values = _linalg.svd(A, full_matrices=False, compute_uv=False)
        require(lax.is_finite(values))
        return full((0,), 0, A.dtype), values, full((0,), 0, A.dtype)
    left, values, right = _linalg.svd(A, full_matrices=full_matrices, compute_uv=True)
    require(lax.is_finite(values))
    return left, values, right


@lowers("aten.linalg_eig.default")
def linalg_eig(self: Array) -> tuple[Array, Array]:
    values, vectors = _linalg.eig(self, compute_left_eigenvectors=False)
    require(lax.is_finite(abs(values)))
    return values, vectors


@lowers("aten._linalg_eigvals.default")
def linalg_eigvals(self: Array) -> Array:
    [values] = _linalg.eig(self, compute_left_eigenvectors=False, compute_right_eigenvectors=False)
    require(lax.is_finite(abs(values)))
    return values


# --- reflections ---


@lowers("aten.geqrf.default")
def geqrf(self: Array) -> tuple[Array, Array]:
    if self.size == 0:
        return self, full((*self.shape[:-2], min(self.shape[-2:])), 0, self.dtype)
    reflectors, scales = jnp.linalg.qr(self, mode="raw")
    return jnp.matrix_transpose(reflectors), scales


@lowers("aten.linalg_householder_product.default")
def householder_product(input: Array, tau: Array) -> Array:
    if input.size == 0:
        return input
    return _linalg.householder_product(input, tau)


@lowers("aten.ormqr.default")
def ormqr(self: Array, input2: Array, input3: Array, left: bool = True, transpose: bool = False) -> Array:
    return input3 if input3.size == 0 else _linalg.ormqr(self, input2, input3, left=left, transpose=transpose)


@lowers("aten.linalg_matrix_exp.default")
def linalg_matrix_exp(self: Array) -> Array:
    if self.size == 0 or self.shape[-1] == 1:
        return jnp.exp(self)
    if self.dtype == jnp.bfloat16:
        raise NotImplementedError("the exponential of a bfloat16 matrix, of which torch makes NaN")
    # Squared over and over, it loses digits: in double precision, as the matrices are small.
    wide = jnp.complex128 if jnp.iscomplexobj(self) else jnp.float64
    return cast(jax.scipy.linalg.expm(cast(self, wide)), self.dtype)
