"""Orthogonal polynomials of an order that is a tensor too, by their three-term recurrences."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from .pointwise import truncate
from .promotion import INT64, Array, cast, constant, expand, float_dtype, in_opmath, select
from .registry import lowers

Step = Callable[[Array, Array, Array, Array], Array]
"""`(k, x, value of order k - 1, value of order k)` to the value of order k + 1."""


def _lower_polynomial(name: str, first: Callable[[Array], Array], step: Step, highest: dict[int, int] | None = None):
    """Registers a polynomial that is 1 at order 0 and `first` at order 1; NaN past `highest` bytes' order."""

    def compute(x: Array, n: Array) -> Array:
        shape = jnp.broadcast_shapes(x.shape, n.shape)
        x, order = expand(x, shape), cast(truncate(expand(n, shape)), INT64)
        beyond = None
        if highest:
            limit = highest[x.dtype.itemsize]
            beyond, order = order > limit, lax.min(order, jnp.full_like(order, limit))
        last = jnp.max(order, initial=0)

        def advance(state):
            k, before, value = state
            new = step(cast(k, x.dtype), x, before, value)
            inside = k < order
            return k + 1, select(inside, value, before), select(inside, new, value)

        start = constant(1, INT64), jnp.ones_like(x), first(x)
        _, _, value = lax.while_loop(lambda state: state[0] < last, advance, start)
        value = select(order < 0, 0, select(order == 0, 1, value))
        return value if beyond is None else select(beyond, jnp.nan, value)

    @lowers(*(f"aten.special_{name}.{kind}" for kind in ("default", "x_scalar", "n_scalar")))
    def polynomial(x, n):
        return in_opmath(compute, float_dtype(x, n), x, n)


def _chebyshev(k: Array, x: Array, before: Array, value: Array) -> Array:
    return 2 * x * value - before


def _shifted(k: Array, x: Array, before: Array, value: Array) -> Array:
    return 2 * (2 * x - 1) * value - before


for _kind, _offset in (("u", 0), ("v", -1), ("w", 1)):
    _lower_polynomial(f"chebyshev_polynomial_{_kind}", lambda x, offset=_offset: 2 * x + offset, _chebyshev)
    _lower_polynomial(
        f"shifted_chebyshev_polynomial_{_kind}", lambda x, offset=_offset: 2 * (2 * x - 1) + offset, _shifted
    )
_lower_polynomial("chebyshev_polynomial_t", lambda x: x, _chebyshev)
_lower_polynomial("shifted_chebyshev_polynomial_t", lambda x: 2 * x - 1, _shifted)

_HERMITE_LIMITS = {4: 128, 8: 512}
_lower_polynomial(
    "hermite_polynomial_h",
    lambda x: 2 * x,
    lambda k, x, before, value: 2 * x * value - 2 * k * before,
    _HERMITE_LIMITS,
)
_lower_polynomial(
    "hermite_polynomial_he", lambda x: x, lambda k, x, before, value: x * value - k * before, _HERMITE_LIMITS
)
_lower_polynomial(
    "laguerre_polynomial_l",
    lambda x: 1 - x,
    lambda k, x, before, value: ((2 * k + (1 - x)) * value - k * before) / (k + 1),
)
_lower_polynomial(
    "legendre_polynomial_p",
    lambda x: x,
    lambda k, x, before, value: ((2 * k + 1) * x * value - k * before) / (k + 1),
)
