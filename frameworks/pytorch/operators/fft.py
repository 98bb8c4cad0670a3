"""Complex numbers and Fourier transforms."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from .promotion import Array, cast, constant
from .registry import inverts_view, lowers

Sizes = Sequence[int]


# --- complex numbers ---


@lowers("aten._conj.default", "aten._conj_physical.default", "aten.conj_physical.default", "aten._conj_copy.default")
def conj(self: Array) -> Array:
    return lax.conj(self) if jnp.iscomplexobj(self) else self


inverts_view("aten._conj.default")(lambda parent, child: conj(child))
lowers("aten.resolve_conj.default", "aten.resolve_neg.default")(lambda self: self)


@lowers("aten.view_as_real.default", "aten.view_as_real_copy.default")
def view_as_real(self: Array) -> Array:
    return jnp.stack([lax.real(self), lax.imag(self)], axis=-1)


@lowers("aten.view_as_complex.default", "aten.view_as_complex_copy.default")
def view_as_complex(self: Array) -> Array:
    return lax.complex(self[..., 0], self[..., 1])


inverts_view("aten.view_as_real.default")(lambda parent, child: view_as_complex(child))
inverts_view("aten.view_as_complex.default")(lambda parent, child: view_as_real(child))


@lowers("aten.complex.default")
def complex_of(real: Array, imag: Array) -> Array:
    real, imag = jnp.broadcast_arrays(real, imag)
    return lax.complex(real, imag)


@lowers("aten.polar.default")
def polar(abs: Array, angle: Array) -> Array:  # noqa: A002 - schema's names
    return complex_of(abs * lax.cos(angle), abs * lax.sin(angle))


# --- transforms: one axis after the other ---


def _normalized(result: Array, normalization: int, count: int) -> Array:
    """torch's codes: 0 leaves the sums, 1 divides them by the root of the count, 2 by the count."""
    if normalization == 0 or count == 0:
        return result
    part = jnp.finfo(result.dtype).dtype
    factor = 1 / count if normalization == 2 else 1 / math.sqrt(count)
    return result * cast(constant(factor, part), result.dtype)


def _count(sizes: Sizes, dim: Sizes) -> int:
    return math.prod(sizes[d] for d in dim)


def _transformed(array: Array, dim: Sizes, forward: bool) -> Array:
    for axis in dim:
        array = jnp.fft.fft(array, axis=axis) if forward else jnp.fft.ifft(array, axis=axis, norm="forward")
    return array


@lowers("aten._fft_c2c.default")
def fft_c2c(self: Array, dim: Sizes, normalization: int, forward: bool) -> Array:
    return _normalized(_transformed(self, dim, forward), normalization, _count(self.shape, dim))


@lowers("aten._fft_r2c.default")
def fft_r2c(self: Array, dim: Sizes, normalization: int, onesided: bool) -> Array:
    *others, last = dim
    whole = jnp.fft.rfft(self, axis=last) if onesided else jnp.fft.fft(self, axis=last)
    return _normalized(_transformed(whole, others, True), normalization, _count(self.shape, dim))


@lowers("aten._fft_c2r.default")
def fft_c2r(self: Array, dim: Sizes, normalization: int, last_dim_size: int) -> Array:
    *others, last = dim
    half = _transformed(self, others, False)
    result = jnp.fft.irfft(half, n=last_dim_size, axis=last, norm="forward")
    return _normalized(result, normalization, _count(result.shape, dim))
