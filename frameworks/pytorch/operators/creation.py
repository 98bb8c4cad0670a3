"""Tensors made from numbers. `empty` and its kin are zeros: any value is a correct one."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import torch
from jax import lax

from .dtypes import jax_dtype
from .promotion import (
    BOOL,
    FLOAT32,
    INT64,
    Array,
    Number,
    cast,
    constant,
    expand,
    full,
    in_opmath,
    iota,
    is_float,
    select,
)
from .registry import lowers


def _default(dtype: torch.dtype | None) -> jnp.dtype:
    return jax_dtype(dtype or torch.get_default_dtype())


def _dtype_of(value: Number, dtype: torch.dtype | None) -> jnp.dtype:
    """The dtype asked for, or torch's choice for a Python number."""
    if dtype is not None:
        return jax_dtype(dtype)
    return BOOL if isinstance(value, bool) else INT64 if isinstance(value, int) else _default(None)


# --- one value ---


def _filled(value: Number) -> Callable[..., Array]:
    def lowering(size, *unused, dtype=None, **placement):
        return full(size, value, _default(dtype))

    return lowering


def _filled_like(value: Number) -> Callable[..., Array]:
    def lowering(self, *, dtype=None, **placement):
        return full(self.shape, value, jax_dtype(dtype) if dtype else self.dtype)

    return lowering


def _new_filled(value: Number) -> Callable[..., Array]:
    def lowering(self, size, *unused, dtype=None, **placement):
        return full(size, value, jax_dtype(dtype) if dtype else self.dtype)

    return lowering


for _name, _value in (("zeros", 0), ("ones", 1)):
    lowers(f"aten.{_name}.default")(_filled(_value))
    lowers(f"aten.{_name}_like.default")(_filled_like(_value))
    lowers(f"aten.new_{_name}.default")(_new_filled(_value))
lowers(
    "aten.empty.memory_format",
    "aten.empty_strided.default",
    "aten.empty_permuted.default",
    "aten._efficientzerotensor.default",
)(_filled(0))
lowers("aten.empty_like.default")(_filled_like(0))
lowers("aten.new_empty.default", "aten.new_empty_strided.default")(_new_filled(0))


@lowers("aten.full.default")
def full_tensor(size: Sequence[int], fill_value: Number, *, dtype: torch.dtype | None = None, **placement) -> Array:
    return full(size, fill_value, _dtype_of(fill_value, dtype))


@lowers("aten.full_like.default")
def full_like(self: Array, fill_value: Number, *, dtype: torch.dtype | None = None, **placement) -> Array:
    return full(self.shape, fill_value, jax_dtype(dtype) if dtype else self.dtype)


@lowers("aten.new_full.default")
def new_full(
    self: Array, size: Sequence[int], fill_value: Number, *, dtype: torch.dtype | None = None, **placement
) -> Array:
    return full(size, fill_value, jax_dtype(dtype) if dtype else self.dtype)


@lowers("aten.scalar_tensor.default")
def scalar_tensor(s: Number, *, dtype: torch.dtype | None = None, **placement) -> Array:
    return cast(s, _default(dtype))


# --- ranges ---


def _arange(start: Number, end: Number, step: Number, dtype: torch.dtype | None) -> Array:
    whole = all(isinstance(value, int) for value in (start, end, step))
    target = jax_dtype(dtype) if dtype else INT64 if whole else _default(None)
    if target == INT64:  # torch drops the fractions before it counts, for this dtype alone.
        start, end, step = int(start), int(end), int(step)
    count = math.ceil((end - start) / step) if isinstance(end - start + step, float) else -(-(end - start) // step)
    # torch computes a range in double precision, and so does this, unless float32 is exact.
    exact = all(float(value).is_integer() and abs(value) < 2**24 for value in (start, step, start + count * step))
    working: jnp.dtype = INT64 if not is_float(target) else FLOAT32 if exact else jnp.dtype("float64")
    position = lax.iota(working, count)
    return cast(lax.add(lax.mul(position, constant(step, working)), constant(start, working)), target)


@lowers("aten.arange.default")
def arange(end: Number, *, dtype: torch.dtype | None = None, **placement) -> Array:
    return _arange(0, end, 1, dtype)


@lowers("aten.arange.start", "aten.arange.start_step")
def arange_from(
    start: Number, end: Number, step: Number = 1, *, dtype: torch.dtype | None = None, **placement
) -> Array:
    return _arange(start, end, step, dtype)


@lowers(*(f"aten.linspace.{kind}" for kind in ("default", "Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor")))
def linspace(
    start: Number | Array, end: Number | Array, steps: int, *, dtype: torch.dtype | None = None, **placement
) -> Array:
    target = _default(dtype)
    working = target if is_float(target) else jnp.dtype("float64")
    low, high = (bound if is_float(target) else cast(bound, target) for bound in (start, end))
    return cast(in_opmath(lambda low, high: _ramp(low, high, steps), working, low, high), target)


@lowers(*(f"aten.logspace.{kind}" for kind in ("default", "Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor")))
def logspace(
    start: Number | Array,
    end: Number | Array,
    steps: int,
    base: float = 10.0,
    *,
    dtype: torch.dtype | None = None,
    **placement,
) -> Array:
    target, working = _default(dtype), jnp.dtype("float64")
    low, high = (cast(bound if is_float(target) else cast(bound, target), working) for bound in (start, end))
    return cast(lax.pow(constant(base, working), _ramp(low, high, steps)), target)


def _ramp(low: Array, high: Array, steps: int) -> Array:
    """Equal steps counted from the nearer end, so that both ends are exact."""
    position = lax.iota(low.dtype, steps)
    # Behind a barrier, or XLA multiplies by the inverse, which is off by a bit, and whole numbers are truncated.
    step = (high - low) / lax.optimization_barrier(constant(max(steps - 1, 1), low.dtype))
    return select(position < steps // 2 + (steps == 1), low + step * position, high - step * (steps - 1 - position))


# --- triangles ---


def _eye(rows: int, columns: int, dtype: torch.dtype | None) -> Array:
    return cast(lax.eq(iota((rows, columns), 0), iota((rows, columns), 1)), _default(dtype))


@lowers("aten.eye.default")
def eye(n: int, *, dtype: torch.dtype | None = None, **placement) -> Array:
    return _eye(n, n, dtype)


@lowers("aten.eye.m")
def eye_rectangle(n: int, m: int, *, dtype: torch.dtype | None = None, **placement) -> Array:
    return _eye(n, m, dtype)


def _distance(shape: Sequence[int], diagonal: int) -> Array:
    """How far each element lies right of the diagonal."""
    return lax.sub(lax.sub(iota(shape, 1), iota(shape, 0)), INT64.type(diagonal))


@lowers("aten.tril.default")
def tril(self: Array, diagonal: int = 0) -> Array:
    return select(expand(_distance(self.shape[-2:], diagonal) <= 0, self.shape), self, 0)


@lowers("aten.triu.default")
def triu(self: Array, diagonal: int = 0) -> Array:
    return select(expand(_distance(self.shape[-2:], diagonal) >= 0, self.shape), self, 0)


@lowers("aten.tril_indices.default")
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: torch.dtype | None = torch.int64, **placement) -> Array:
    return _indices(jnp.tril_indices(row, offset, col), dtype)


@lowers("aten.triu_indices.default")
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: torch.dtype | None = torch.int64, **placement) -> Array:
    return _indices(jnp.triu_indices(row, offset, col), dtype)


def _indices(positions: tuple[Array, Array], dtype: torch.dtype | None) -> Array:
    return cast(jnp.stack(positions), jax_dtype(dtype or torch.int64))
