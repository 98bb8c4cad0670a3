"""Arithmetic, comparisons, logic and selection, element by element; see `unary` and `activations` for functions.

Names such as `aten.pow.Tensor` exist only in place (`aten.pow_.Tensor`); they are here as they arrive, without the
underscore.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .dtypes import jax_dtype, result_dtype
from .promotion import (
    BOOL,
    HALVES,
    Array,
    Number,
    Operand,
    aligned,
    cast,
    constant,
    expand,
    float_dtype,
    full,
    in_opmath,
    is_float,
    is_number,
    select,
)
from .registry import lowers


def _arithmetic(function: Callable[..., Array], dtype: jnp.dtype, *operands: Operand) -> Array:
    if dtype in HALVES and all(not is_number(x) and x.dtype == dtype for x in operands):
        return function(*aligned(dtype, *operands))  # One operation rounds correctly by itself.
    return in_opmath(function, dtype, *operands)


# --- arithmetic ---


@lowers("aten.add.Tensor", "aten.add.Scalar")
def add(self: Operand, other: Operand, alpha: Number = 1) -> Array:
    dtype = result_dtype(self, other)
    if dtype == BOOL:
        x, y = aligned(dtype, self, other)
        return lax.bitwise_or(x, y) if alpha else cast(x, dtype) | (y & constant(False, dtype))
    if alpha == 1:
        return _arithmetic(lax.add, dtype, self, other)
    return in_opmath(lambda x, y, scale: lax.add(x, lax.mul(y, scale)), dtype, self, other, alpha)


@lowers("aten.sub.Tensor", "aten.sub.Scalar")
def subtract(self: Operand, other: Operand, alpha: Number = 1) -> Array:
    dtype = result_dtype(self, other)
    if alpha == 1:
        return _arithmetic(lax.sub, dtype, self, other)
    return in_opmath(lambda x, y, scale: lax.sub(x, lax.mul(y, scale)), dtype, self, other, alpha)


@lowers("aten.rsub.Tensor", "aten.rsub.Scalar")
def reverse_subtract(self: Array, other: Operand, alpha: Number = 1) -> Array:
    return subtract(other, self, alpha)


@lowers("aten.mul.Tensor", "aten.mul.Scalar")
def multiply(self: Operand, other: Operand) -> Array:
    dtype = result_dtype(self, other)
    return _arithmetic(lax.bitwise_and if dtype == BOOL else lax.mul, dtype, self, other)


@lowers("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode")
def divide(self: Operand, other: Operand, rounding_mode: str | None = None) -> Array:
    if rounding_mode is None:
        return _arithmetic(lax.div, float_dtype(self, other), self, other)
    dtype = result_dtype(self, other)
    if rounding_mode == "floor":
        return in_opmath(_floor_divide, dtype, self, other)
    quotient = _arithmetic(lax.div, dtype, self, other)
    return truncate(quotient) if is_float(dtype) else quotient  # torch truncates what it has already rounded.


@lowers("aten.floor_divide.default", "aten.floor_divide.Scalar", "aten.floor_divide.Tensor")
def floor_divide(self: Operand, other: Operand) -> Array:
    return divide(self, other, rounding_mode="floor")


def _floor_divide(x: Array, y: Array) -> Array:
    if not is_float(x.dtype):
        quotient, rest = lax.div(x, y), lax.rem(x, y)
        return quotient - cast(_rounds_down(rest, y), x.dtype)
    # floor(x / y) is off by one where the quotient rounds up to an integer, so start from the exact remainder.
    rest = lax.rem(x, y)
    quotient = (x - rest) / y - cast(_rounds_down(rest, y), x.dtype)
    floor = lax.floor(quotient)
    floor = floor + cast(quotient - floor > 0.5, x.dtype)
    true = lax.div(x, y)
    floor = select(quotient == 0, copysign(constant(0, x.dtype), true), floor)
    return select(y == 0, true, floor)


def _rounds_down(rest: Array, divisor: Array) -> Array:
    """Where the floor of a quotient is one less than its integer part."""
    return (rest != 0) & ((rest < 0) != (divisor < 0))


@lowers("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.remainder.Scalar_Tensor")
def remainder(self: Operand, other: Operand) -> Array:
    def compute(x, y):
        rest = lax.rem(x, y)
        return select(_rounds_down(rest, y), rest + y, rest)

    return in_opmath(compute, result_dtype(self, other), self, other)


@lowers("aten.fmod.Tensor", "aten.fmod.Scalar")
def fmod(self: Operand, other: Operand) -> Array:
    return in_opmath(lax.rem, result_dtype(self, other), self, other)


@lowers("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar", "aten.pow.Tensor")
def power(self: Operand, exponent: Operand) -> Array:
    dtype = result_dtype(self, exponent)
    if is_number(exponent):
        simple = _POWERS.get(exponent)
        if is_float(dtype) and simple:
            return in_opmath(simple, dtype, self)
        if not is_float(dtype):
            return lax.integer_pow(cast(self, dtype), int(exponent))
    return in_opmath(lax.pow if is_float(dtype) else _integer_power, dtype, self, exponent)


def _integer_power(base: Array, exponent: Array) -> Array:
    """Wraps around like repeated multiplication; a negative exponent leaves only the powers of 1 and -1."""
    shape = np.broadcast_shapes(base.shape, exponent.shape)
    base, exponent = expand(base, shape), expand(exponent, shape)

    def square_and_multiply(bit, state):
        result, square = state
        odd = ((exponent >> bit) & 1) == 1
        return select(odd, result * square, result), square * square

    bits = exponent.dtype.itemsize * 8 - 1
    result, _ = lax.fori_loop(0, bits, square_and_multiply, (full(shape, 1, base.dtype), base))
    unit = select(base == 1, 1, select(base == -1, 1 - 2 * (exponent & 1), exponent * 0))
    return select(exponent < 0, unit, result)


_POWERS = {
    0.5: lax.sqrt,
    1: lambda x: x,
    2: lambda x: lax.mul(x, x),
    3: lambda x: lax.mul(lax.mul(x, x), x),
    -0.5: lax.rsqrt,
    -1: lambda x: lax.integer_pow(x, -1),
    -2: lambda x: lax.integer_pow(x, -2),
}


@lowers("aten.ldexp.Tensor", "aten.ldexp.default")
def ldexp(self: Array, other: Array) -> Array:
    return multiply(self, power(2.0, other))


# Optimizers are made of the next three, a node of each for every parameter, so they stay on lax.


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(self: Array, end: Array, weight: Operand) -> Array:
    def near(start, end, weight):
        return lax.add(start, lax.mul(weight, lax.sub(end, start)))

    def far(start, end, weight):
        return lax.sub(end, lax.mul(lax.sub(end, start), lax.sub(constant(1, start.dtype), weight)))

    def either(start, end, weight):
        return select(abs(weight) < 0.5, near(start, end, weight), far(start, end, weight))

    compute = either if not is_number(weight) else near if abs(weight) < 0.5 else far
    return in_opmath(compute, self.dtype, self, end, weight)


@lowers("aten.addcmul.default")
def addcmul(self: Array, tensor1: Array, tensor2: Array, value: Number = 1) -> Array:
    def compute(x, a, b, scale):
        return lax.add(x, lax.mul(lax.mul(scale, a), b))

    return in_opmath(compute, result_dtype(self, tensor1, tensor2), self, tensor1, tensor2, value)


@lowers("aten.addcdiv.default")
def addcdiv(self: Array, tensor1: Array, tensor2: Array, value: Number = 1) -> Array:
    def compute(x, a, b, scale):
        return lax.add(x, lax.div(lax.mul(scale, a), b))

    return in_opmath(compute, result_dtype(self, tensor1, tensor2), self, tensor1, tensor2, value)


def truncate(x: Array) -> Array:
    """Rounds floats towards zero."""
    return select(x < 0, lax.ceil(x), lax.floor(x))


@lowers("aten.maximum.default")
def maximum(self: Array, other: Array) -> Array:
    return lax.max(*aligned(result_dtype(self, other), self, other))


@lowers("aten.minimum.default")
def minimum(self: Array, other: Array) -> Array:
    return lax.min(*aligned(result_dtype(self, other), self, other))


def _ignoring_nan(function: Callable[..., Array]) -> Callable[..., Array]:
    def lowering(self, other):
        x, y = aligned(result_dtype(self, other), self, other)
        return select(lax.ne(x, x), y, select(lax.ne(y, y), x, function(x, y)))

    return lowering


lowers("aten.fmax.default")(_ignoring_nan(lax.max))
lowers("aten.fmin.default")(_ignoring_nan(lax.min))


@lowers("aten.clamp.default", "aten.clamp.Tensor")
def clamp(self: Array, min: Operand | None = None, max: Operand | None = None) -> Array:  # noqa: A002 - schema's names
    bounds = [bound for bound in (min, max) if bound is not None]
    dtype = result_dtype(self, *bounds)
    result = cast(self, dtype)
    if min is not None:
        result = lax.max(*aligned(dtype, result, min))
    if max is not None:
        result = lax.min(*aligned(dtype, result, max))
    return result


@lowers("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(self: Array, min: Operand) -> Array:  # noqa: A002 - schema's names
    return clamp(self, min, None)


@lowers("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(self: Array, max: Operand) -> Array:  # noqa: A002 - schema's names
    return clamp(self, None, max)


# --- floating-point functions of two arrays ---


def _float_binary(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda self, other: in_opmath(function, float_dtype(self, other), self, other)


def _logaddexp(scale: float) -> Callable[..., Array]:
    """log(b**x + b**y) / log(b) where `scale` is log(b)."""

    def compute(x, y):
        result = lax.max(x, y) + lax.log1p(lax.exp(-abs(x - y) * scale)) / scale
        return select((x == y) & (abs(x) == math.inf), x, result)

    return compute


def _hypot(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    large, small = lax.max(x, y), lax.min(x, y)
    ratio = small / select(large == 0, 1, large)
    infinite = (x == math.inf) | (y == math.inf)  # Even where the other is NaN.
    return select(infinite, math.inf, large * lax.sqrt(ratio * ratio + 1))


def _xlog(logarithm: Callable[[Array], Array]) -> Callable[..., Array]:
    """x * log(y), zero where x is, NaN where y is."""

    def compute(x, y):
        return select(y != y, y, select(x == 0, 0, x * logarithm(y)))

    return compute


def _same_shape(function: Callable[..., Array]) -> Callable[..., Array]:
    """For the few functions in `lax` that broadcast not even 0-d operands."""

    def compute(x, y):
        shape = np.broadcast_shapes(x.shape, y.shape)
        return function(expand(x, shape), expand(y, shape))

    return compute


def hurwitz_zeta(s: Array, q: Array) -> Array:
    """The sum of (q + k)^-s over all k >= 0; XLA's own knows only positive q, so that lesser terms are added first."""
    pole = (q <= 0) & (q == lax.floor(q)) & (s >= 1)

    def add_term(state):
        total, q = state
        low = q < 0
        return select(low, total + lax.pow(q, -s), total), select(low, q + 1, q)

    start = full(q.shape, 0, q.dtype), select(pole, 1, q)
    total, shifted = lax.while_loop(lambda state: lax.reduce_or(state[1] < 0, tuple(range(q.ndim))), add_term, start)
    result = select(pole | (s == 1), math.inf, total + lax.zeta(s, shifted))
    return select(s < 1, math.nan, result)


def copysign(magnitude: Array, sign: Array) -> Array:
    """`magnitude` with the sign bit of `sign`, both floating and of one dtype."""
    magnitude = lax.abs(magnitude)
    return select(signbit(sign), -magnitude, magnitude)


@lowers("aten.signbit.default")
def signbit(self: Array) -> Array:
    if not is_float(self.dtype):
        return lax.lt(self, constant(0, self.dtype))
    bits = jnp.dtype(f"int{self.dtype.itemsize * 8}")
    return lax.lt(lax.bitcast_convert_type(self, bits), constant(0, bits))


for _names, _function in {
    ("atan2.default",): lax.atan2,
    ("logaddexp.default",): _logaddexp(1.0),
    ("logaddexp2.default",): _logaddexp(math.log(2)),
    ("hypot.default",): _hypot,
    ("nextafter.default",): lax.nextafter,
    ("copysign.Tensor", "copysign.Scalar"): copysign,
    ("xlogy.Tensor", "xlogy.Scalar_Self", "xlogy.Scalar_Other"): _xlog(lax.log),
    ("special_xlog1py.default", "special_xlog1py.self_scalar", "special_xlog1py.other_scalar"): _xlog(lax.log1p),
    ("special_zeta.default", "special_zeta.self_scalar", "special_zeta.other_scalar"): _same_shape(hurwitz_zeta),
    ("igamma.default",): _same_shape(lax.igamma),
    ("igammac.default",): _same_shape(lax.igammac),
}.items():
    lowers(*(f"aten.{name}" for name in _names))(_float_binary(_function))


@lowers("aten.heaviside.default")
def heaviside(self: Array, values: Array) -> Array:
    x, values = aligned(self.dtype, self, values)
    return select(x == 0, values, cast(x > 0, x.dtype))


lowers("aten.gcd.default")(lambda self, other: jnp.gcd(*aligned(result_dtype(self, other), self, other)))
lowers("aten.lcm.default")(lambda self, other: jnp.lcm(*aligned(result_dtype(self, other), self, other)))


# --- comparison and logic ---


def _comparison(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda self, other: function(*aligned(result_dtype(self, other), self, other))


def _logical(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda self, other: function(*aligned(BOOL, self, other))


def _bitwise(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda self, other: function(*aligned(result_dtype(self, other), self, other))


def _shift_right(x: Array, y: Array) -> Array:
    signed = jnp.issubdtype(x.dtype, jnp.signedinteger)
    return (lax.shift_right_arithmetic if signed else lax.shift_right_logical)(x, y)


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    lowers(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(getattr(lax, _name)))
for _name in ("and", "or", "xor"):
    _function = getattr(lax, f"bitwise_{_name}")
    lowers(f"aten.logical_{_name}.default")(_logical(_function))
    lowers(*(f"aten.bitwise_{_name}.{kind}" for kind in ("Tensor", "Scalar", "Scalar_Tensor")))(_bitwise(_function))
for _name, _function in (("left", lax.shift_left), ("right", _shift_right)):
    lowers(
        *(f"aten.bitwise_{_name}_shift.{kind}" for kind in ("Tensor", "Tensor_Scalar", "Scalar_Tensor")),
        *(f"aten.__{_name[0]}shift__.{kind}" for kind in ("Tensor", "Scalar")),
    )(_bitwise(_function))


@lowers("aten.isclose.default")
def isclose(self: Array, other: Array, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    return jnp.isclose(self, other, rtol, atol, equal_nan)


@lowers("aten.isin.Tensor_Tensor")
def isin(elements: Array, test_elements: Array, *, assume_unique: bool = False, invert: bool = False) -> Array:
    return jnp.isin(elements, test_elements, invert=invert)


# --- selection, copies and conversions ---


@lowers("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(condition: Array, self: Operand, other: Operand) -> Array:
    dtype = result_dtype(self, other)
    return select(cast(condition, BOOL), cast(self, dtype), cast(other, dtype))


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(self: Array, mask: Array, value: Operand) -> Array:
    return select(mask, cast(value, self.dtype), self)


@lowers("aten._to_copy.default")
def to_copy(self: Array, *, dtype: torch.dtype | None = None, **placement: object) -> Array:
    return self if dtype is None else cast(self, jax_dtype(dtype))


@lowers("aten.clone.default", "aten.lift.default", "aten.contiguous.default")
def clone(self: Array, memory_format: torch.memory_format | None = None) -> Array:
    return self


@lowers("aten.copy.default")
def copy(self: Array, src: Array, non_blocking: bool = False) -> Array:
    return expand(cast(src, self.dtype), self.shape)


@lowers("aten.fill.Scalar", "aten.fill.Tensor")
def fill(self: Array, value: Operand) -> Array:
    return full(self.shape, value, self.dtype) if is_number(value) else expand(cast(value, self.dtype), self.shape)


@lowers("aten.zero.default")
def zero(self: Array) -> Array:
    return full(self.shape, 0, self.dtype)
