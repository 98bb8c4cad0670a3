"""What torch's kernels check in values and XLA's do not: an index out of range, a probability above 1.

XLA clamps such an index, or drops the write, and trains on. So lowerings state what must hold; the program computes
whether all of it does, and undoes itself where it does not. torch then runs the step, and raises its own error.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np
from jax import lax

from .operands import Array, Number, constant

_conditions: ContextVar[list[Array] | None] = ContextVar("conditions", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[Array]]:
    """Collects the conditions of everything that is lowered inside, each a bool array of any shape."""
    conditions: list[Array] = []
    token = _conditions.set(conditions)
    try:
        yield conditions
    finally:
        _conditions.reset(token)


def require(condition: Array) -> None:
    """States that every element must hold, or torch would raise an error."""
    collected = _conditions.get()
    if collected is not None:
        collected.append(condition)


def require_between(values: Array, lowest: Number, highest: Number) -> None:
    """States that `lowest <= values <= highest` everywhere; NaN is refused too."""
    if _conditions.get() is None or values.size == 0:
        return
    if np.issubdtype(values.dtype, np.integer):
        limits = np.iinfo(values.dtype)
        lowest, highest = max(lowest, int(limits.min)), min(highest, int(limits.max))
    above, below = constant(lowest, values.dtype), constant(highest, values.dtype)
    require(lax.bitwise_and(lax.ge(values, above), lax.le(values, below)))


def all_hold(conditions: list[Array]) -> Array:
    """One bool: whether every element of every condition holds."""
    whole = [lax.reduce_and(condition, tuple(range(condition.ndim))) for condition in conditions]
    return whole[0] if len(whole) == 1 else lax.reduce_and(lax.concatenate([w[None] for w in whole], 0), (0,))
