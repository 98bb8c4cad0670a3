"""Python numbers that a captured step reads as inputs: hyperparameters, annealed weights, step counts."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch


class NumberUsed(Exception):
    """A number was used in a way that only its value can answer, so that it has to be a constant of the program.

    Attributes:
        source: What the number was, as `TracedNumber.source` says.
    """

    def __init__(self, source: object):
        super().__init__(source)
        self.source = source


class TracedNumber(float):
    """A float that also knows the 0-d float64 tensor which computes it in the captured step.

    It is a float, so that torch's argument checks and an optimizer's `momentum != 0` work on it unchanged. Arithmetic
    gives another `TracedNumber`. Comparing one with zero is answered by its value, because whether a number is zero is
    part of a program's signature; any other look at the value raises `NumberUsed`.

    Attributes:
        tensor: 0-d float64.
        source: Names the number; None for one computed from others or read from a tensor.
    """

    __slots__ = ("source", "tensor")

    def __new__(cls, value: float, tensor: torch.Tensor, source: object = None):
        self = super().__new__(cls, value)
        self.tensor = tensor
        self.source = source
        return self

    def _refuse(self, *_, **__):
        raise NumberUsed(self.source)

    __int__ = __float__ = __round__ = __trunc__ = __floor__ = __ceil__ = __divmod__ = __mod__ = __floordiv__ = _refuse
    is_integer = as_integer_ratio = hex = _refuse
    __hash__ = float.__hash__

    def _compare(name):
        def compare(self, other):
            if self.source is None or isinstance(other, TracedNumber) or other != 0:
                self._refuse()
            return getattr(float, name)(self, other)

        return compare

    __eq__, __ne__, __lt__ = _compare("__eq__"), _compare("__ne__"), _compare("__lt__")
    __le__, __gt__, __ge__ = _compare("__le__"), _compare("__gt__"), _compare("__ge__")

    def __bool__(self):
        return self != 0.0

    def _arithmetic(name, function):
        def compute(self, other):
            if isinstance(other, torch.Tensor) or not isinstance(other, int | float):
                return NotImplemented
            value = getattr(float, name)(self, float.__pos__(other) if isinstance(other, float) else other)
            tensor = other.tensor if isinstance(other, TracedNumber) else other
            return TracedNumber(value, function(self.tensor, tensor))

        return compute

    __add__ = __radd__ = _arithmetic("__add__", lambda a, b: a + b)
    __sub__, __rsub__ = _arithmetic("__sub__", lambda a, b: a - b), _arithmetic("__rsub__", lambda a, b: b - a)
    __mul__ = __rmul__ = _arithmetic("__mul__", lambda a, b: a * b)
    __truediv__ = _arithmetic("__truediv__", lambda a, b: a / b)
    __rtruediv__ = _arithmetic("__rtruediv__", lambda a, b: b / a)
    __pow__, __rpow__ = _arithmetic("__pow__", lambda a, b: a**b), _arithmetic("__rpow__", lambda a, b: b**a)

    def __neg__(self):
        return TracedNumber(float.__neg__(self), -self.tensor)

    def __pos__(self):
        return self

    def __abs__(self):
        return TracedNumber(float.__abs__(self), self.tensor.abs())

    del _compare, _arithmetic


@contextlib.contextmanager
def guarded_math() -> Iterator[None]:
    """Makes the functions of `math` refuse a `TracedNumber`, whose value they would otherwise read unseen."""

    def guard(function):
        def guarded(*args):
            for argument in args:
                if isinstance(argument, TracedNumber):
                    raise NumberUsed(argument.source)
            return function(*args)

        return guarded

    names = [name for name in vars(math) if callable(getattr(math, name)) and not name.startswith("_")]
    with mock.patch.multiple(math, **{name: guard(getattr(math, name)) for name in names}):
        yield
