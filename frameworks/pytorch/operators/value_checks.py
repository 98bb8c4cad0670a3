"""What torch's kernels check in values and XLA's do not: an index out of range, a probability above 1.

XLA clamps such an index, or drops the write, and trains on. So lowerings state what must hold; the program computes
whether all of it does, and undoes itself where it does not. torch then runs the step, and raises its own error.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np
from jax import lax

from .promotion import Array, Number, constant


class Conditions(list[Array]):
    """What must hold, each a bool array of any shape; and what an operator has left as it was where that does not."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Array, int]] = {}  # with the count of conditions then, by identity
        self._all: tuple[int, Array] | None = None

    def all(self) -> Array:
        """Whether everything that has been stated so far holds."""
        if self._all is None or self._all[0] != len(self):
            self._all = len(self), all_hold(self)
        return self._all[1]

    def keep(self, value: Array) -> None:
        """Notes that a value is the old one where something that has been stated so far does not hold."""
        self._kept[id(value)] = value, len(self)

    def keeps(self, value: Array) -> bool:
        """Whether a value is the old one where anything does not hold."""
        return self._kept.get(id(value), (None, -1))[1] == len(self)


_conditions: ContextVar[Conditions | None] = ContextVar("conditions", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Conditions]:
    """Collects the conditions of everything that is lowered inside."""
    conditions = Conditions()
    token = _conditions.set(conditions)
    try:
        yield conditions
    finally:
        _conditions.reset(token)


def stated() -> Conditions | None:
    """The conditions of what has been lowered so far; None if nobody collects them."""
    return _conditions.get()


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
