"""Functions of one array, element by element, that are no activations."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .pointwise import hurwitz_zeta, truncate
from .promotion import BOOL, INT32, Array, cast, constant, float_dtype, full, in_opmath, is_float, opmath, select
from .registry import lowers

# --- functions with floating-point results, integers promoted ---


def _float_unary(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda self: in_opmath(function, float_dtype(self), self)


def _scaled(function: Callable[[Array], Array], factor: float) -> Callable[[Array], Array]:
    return lambda x: lax.mul(function(x), constant(factor, x.dtype))


def _sinc(x: Array) -> Array:
    angle = x * math.pi
    return select(x == 0, 1, lax.sin(angle) / angle)


def _digamma(x: Array) -> Array:
    return select(x == 0, -1 / x, lax.digamma(x))


def _ndtr(x: Array) -> Array:
    return lax.erfc(x * -math.sqrt(0.5)) * 0.5


def _erfinv(x: Array) -> Array:
    """In double precision: near 1 the gradient magnifies the errors of a float32 approximation a thousand times."""
    return cast(lax.erf_inv(cast(x, jnp.dtype("float64"))), x.dtype)


def _entr(x: Array) -> Array:
    return select(x < 0, -math.inf, select(x == 0, 0, -x * lax.log(x)))


def _bessel(scaled: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: scaled(x) * lax.exp(abs(x))


_FLOAT_UNARY: dict[str, Callable[[Array], Array]] = {
    "exp": lax.exp,
    "exp2": lax.exp2,
    "expm1": lax.expm1,
    "log": lax.log,
    "log2": _scaled(lax.log, 1 / math.log(2)),
    "log10": _scaled(lax.log, 1 / math.log(10)),
    "log1p": lax.log1p,
    "sqrt": lax.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": lambda x: lax.div(constant(1, x.dtype), x),
    "sin": lax.sin,
    "cos": lax.cos,
    "tan": lax.tan,
    "asin": lax.asin,
    "acos": lax.acos,
    "atan": lax.atan,
    "sinh": lax.sinh,
    "cosh": lax.cosh,
    "tanh": lax.tanh,
    "asinh": lax.asinh,
    "acosh": lax.acosh,
    "atanh": lax.atanh,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": _erfinv,
    "lgamma": lax.lgamma,
    "digamma": _digamma,
    "sigmoid": lax.logistic,
    "sinc": _sinc,
    "deg2rad": _scaled(lambda x: x, math.pi / 180),
    "rad2deg": _scaled(lambda x: x, 180 / math.pi),
    "angle": lambda x: select(x < 0, math.pi, select(x != x, x, 0)),
    "i0": _bessel(lax.bessel_i0e),
    "special_i0e": lax.bessel_i0e,
    "special_i1": _bessel(lax.bessel_i1e),
    "special_i1e": lax.bessel_i1e,
    "special_modified_bessel_i0": _bessel(lax.bessel_i0e),
    "special_modified_bessel_i1": _bessel(lax.bessel_i1e),
    "special_ndtr": _ndtr,
    "special_ndtri": jax.scipy.special.ndtri,
    "special_log_ndtr": jax.scipy.special.log_ndtr,
    "special_entr": _entr,
}
for _name, _function in _FLOAT_UNARY.items():
    lowers(f"aten.{_name}.default")(_float_unary(_function))


@lowers("aten.polygamma.default")
def polygamma(n: int, self: Array) -> Array:
    def compute(x):
        if n == 0:
            return _digamma(x)
        order = full(x.shape, n + 1, x.dtype)
        if n > 1:
            return hurwitz_zeta(order, x) * ((-1) ** (n + 1) * math.factorial(n))
        # The series holds for positive x; below 1/2 it is reflected: f(x) + f(1 - x) = (pi / sin(pi x))^2.
        low = x < 0.5
        value = lax.zeta(order, select(low, 1 - x, x))
        return select(low, (math.pi / lax.sin(math.pi * x)) ** 2 - value, value)

    return in_opmath(compute, float_dtype(self), self)


@lowers("aten.mvlgamma.default")
def mvlgamma(self: Array, p: int) -> Array:
    def compute(x):
        return sum((lax.lgamma(x - i / 2) for i in range(p)), p * (p - 1) / 4 * math.log(math.pi))

    return in_opmath(compute, float_dtype(self), self)


@lowers("aten.logit.default")
def logit(self: Array, eps: float | None = None) -> Array:
    def compute(x):
        if eps is not None:
            x = lax.clamp(constant(eps, x.dtype), x, constant(1 - eps, x.dtype))
        return lax.log(x / (1 - x))

    return in_opmath(compute, float_dtype(self), self)


# --- rounding and signs, in the argument's own dtype ---


def _rounding(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda self: function(self) if is_float(self.dtype) else self


def round_half_even(x: Array) -> Array:
    """Rounds floats to the nearest integer, halves to the even one."""
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


lowers("aten.floor.default")(_rounding(lax.floor))
lowers("aten.ceil.default")(_rounding(lax.ceil))
lowers("aten.trunc.default")(_rounding(truncate))
lowers("aten.round.default")(_rounding(round_half_even))
lowers("aten.frac.default")(lambda self: lax.sub(self, truncate(self)))


@lowers("aten.round.decimals")
def round_decimals(self: Array, decimals: int) -> Array:
    def compute(x):
        scale = 10.0 ** abs(decimals)
        return round_half_even(x * scale) / scale if decimals >= 0 else round_half_even(x / scale) * scale

    return in_opmath(compute, self.dtype, self)


lowers("aten.neg.default", "aten._neg_view.default")(lax.neg)
lowers("aten.abs.default")(lambda self: self if jnp.issubdtype(self.dtype, jnp.unsignedinteger) else lax.abs(self))


@lowers("aten.sign.default", "aten.sgn.default")
def sign(self: Array) -> Array:
    if self.dtype == BOOL:
        return self
    if jnp.iscomplexobj(self):
        size = lax.abs(self)
        return select(size == 0, 0, self / cast(select(size == 0, 1, size), self.dtype))
    return cast(self > 0, self.dtype) - cast(self < 0, self.dtype)  # Unlike lax.sign, NaN has sign 0.


@lowers("aten.frexp.Tensor")
def frexp(self: Array) -> tuple[Array, Array]:
    mantissa, exponent = jnp.frexp(cast(self, opmath(self.dtype)))
    return cast(mantissa, self.dtype), cast(exponent, INT32)


# --- predicates ---

lowers("aten.logical_not.default")(lambda self: lax.bitwise_not(cast(self, BOOL)))
lowers("aten.bitwise_not.default")(lax.bitwise_not)
lowers("aten.isnan.default")(lambda self: lax.ne(self, self))
lowers("aten.isfinite.default")(
    lambda self: lax.is_finite(self) if is_float(self.dtype) else full(self.shape, True, BOOL)
)


def _equals(value: float, of: Callable[[Array], Array] = lambda x: x) -> Callable[[Array], Array]:
    def lowering(self):
        if not is_float(self.dtype):
            return full(self.shape, False, BOOL)
        return lax.eq(of(self), constant(value, self.dtype))

    return lowering


lowers("aten.isinf.default")(_equals(math.inf, lax.abs))
lowers("aten.isposinf.default")(_equals(math.inf))
lowers("aten.isneginf.default")(_equals(-math.inf))


@lowers("aten.nan_to_num.default")
def nan_to_num(
    self: Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Array:
    if not is_float(self.dtype):
        return self
    limits = jnp.finfo(self.dtype)
    nan = 0.0 if nan is None else nan
    posinf = float(limits.max) if posinf is None else posinf
    neginf = float(limits.min) if neginf is None else neginf
    result = select(self != self, nan, self)
    result = select(self == math.inf, posinf, result)
    return select(self == -math.inf, neginf, result)
