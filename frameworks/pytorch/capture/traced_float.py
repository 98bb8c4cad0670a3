"""Python numbers that a captured step reads as inputs: hyperparameters, annealed weights, step counts."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch


class ConcretizationError(Exception):
    """A number was used in a way that only its value can answer, so that it has to be a constant of the program.

    Attributes:
        source: What the number was, as `TracedFloat.source` says.
    """

    def __init__(self, source: Any):
        super().__init__(source)
        self.source = source


def _refusal(name: str) -> Callable:
    def refuse(self: "TracedFloat", *_: Any, **__: Any) -> Any:
        raise ConcretizationError(self.source)

    refuse.__name__ = name
    return refuse


def _comparison(name: str) -> Callable:
    def compare(self: "TracedFloat", other: Any) -> bool:
        if self.source is None or isinstance(other, TracedFloat) or other != 0:
            raise ConcretizationError(self.source)
        return getattr(float, name)(self, other)

    return compare


def _arithmetic(name: str, function: Callable) -> Callable:
    def compute(self: "TracedFloat", other: Any) -> Any:
        if isinstance(other, torch.Tensor) or not isinstance(other, int | float):
            return NotImplemented
        tensor = other.tensor if isinstance(other, TracedFloat) else other
        return TracedFloat(getattr(float, name)(self, other), function(self.tensor, tensor))

    return compute


class TracedFloat(float):
    """A float that also knows the 0-d float64 tensor which computes it in the captured step.

    It is a float, so that torch's argument checks and an optimizer's `momentum != 0` work on it unchanged. Arithmetic
    gives another `TracedFloat`. Comparing one with zero is answered by its value, because whether a number is zero is
    part of a program's signature; any other look at the value raises `ConcretizationError`.

    Attributes:
        tensor: 0-d float64.
        source: Names the number; None for one computed from others or read from a tensor.
    """

    __slots__ = ("source", "tensor")
    tensor: torch.Tensor
    source: Any

    def __new__(cls, value: float, tensor: torch.Tensor, source: Any = None) -> "TracedFloat":
        """Pairs a value with the tensor that computes it."""
        self = super().__new__(cls, value)
        self.tensor = tensor
        self.source = source
        return self

    def __bool__(self) -> bool:
        return self != 0.0

    def __neg__(self) -> "TracedFloat":
        return TracedFloat(float.__neg__(self), -self.tensor)

    def __pos__(self) -> "TracedFloat":
        return self

    def __abs__(self) -> "TracedFloat":
        return TracedFloat(float.__abs__(self), self.tensor.abs())

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise ConcretizationError(self.source)

    __hash__ = float.__hash__


def _define_operators() -> None:
    for name in (
        "__int__ __float__ __round__ __trunc__ __floor__ __ceil__ __divmod__ __mod__ __floordiv__ __rmod__ "
        "__rfloordiv__ __rdivmod__ is_integer as_integer_ratio hex"
    ).split():
        setattr(TracedFloat, name, _refusal(name))
    for name in "__eq__ __ne__ __lt__ __le__ __gt__ __ge__".split():
        setattr(TracedFloat, name, _comparison(name))
    for name, function in {
        "__add__": lambda a, b: a + b,
        "__radd__": lambda a, b: b + a,
        "__sub__": lambda a, b: a - b,
        "__rsub__": lambda a, b: b - a,
        "__mul__": lambda a, b: a * b,
        "__rmul__": lambda a, b: b * a,
        "__truediv__": lambda a, b: a / b,
        "__rtruediv__": lambda a, b: b / a,
        "__pow__": lambda a, b: a**b,
        "__rpow__": lambda a, b: b**a,
    }.items():
        setattr(TracedFloat, name, _arithmetic(name, function))


_define_operators()


@contextlib.contextmanager
def guarded_math() -> Iterator[None]:
    """Makes the functions of `math` refuse a `TracedFloat`, whose value they would otherwise read unseen."""

    def guard(function: Callable) -> Callable:
        def guarded(*args: Any) -> Any:
            for argument in args:
                if isinstance(argument, TracedFloat):
                    raise ConcretizationError(argument.source)
            return function(*args)

        return guarded

    names = [name for name in vars(math) if callable(getattr(math, name)) and not name.startswith("_")]
    with mock.patch.dict(vars(math), {name: guard(getattr(math, name)) for name in names}):
        yield


def smallest(*items: Any, **options: Any) -> Any:
    """`min`, which gives a `TracedFloat` where it is given one."""
    return _extreme(min, torch.minimum, items, options)


def largest(*items: Any, **options: Any) -> Any:
    """`max`, which gives a `TracedFloat` where it is given one."""
    return _extreme(max, torch.maximum, items, options)


def _extreme(plain: Callable, function: Callable, items: tuple, options: dict) -> Any:
    if len(items) != 2 or options or not any(isinstance(item, TracedFloat) for item in items):
        return plain(*items, **options)
    one, other = items
    traced = one if isinstance(one, TracedFloat) else other
    tensors = [item.tensor if isinstance(item, TracedFloat) else torch.full_like(traced.tensor, item) for item in items]
    return TracedFloat(plain(float.__float__(one), float.__float__(other)), function(*tensors))
