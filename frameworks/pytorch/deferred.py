"""`DeferredTensor`: a tensor that the loop holds and nobody has computed yet."""

import weakref
from typing import Any, Protocol

import torch

from trainingcompiler.frameworks.pytorch.tape import Slot


class Owner(Protocol):
    """Who records calls on deferred tensors, and computes them when somebody looks."""

    def call(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` would, some arguments being deferred."""

    def value(self, slot: Slot) -> torch.Tensor:
        """The real tensor of a slot."""


class DeferredTensor(torch.Tensor):
    """Stands for a tensor of known shape and dtype whose value is computed when somebody looks at it.

    Attributes:
        slot: What it stands for.
        owner: Who computes it.
    """

    slot: Slot
    owner: Owner

    @staticmethod
    def __new__(cls, slot: Slot, owner: Owner) -> "DeferredTensor":
        """Makes the one tensor of a slot that the loop gets to hold."""
        meta = slot.meta
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=meta.device
        )
        self.slot = slot
        self.owner = owner
        slot.wrapper = weakref.ref(self)
        return self

    def __init__(self, slot: Slot, owner: Owner):
        super().__init__()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        owner = next(leaf.owner for leaf in _deferred((args, kwargs)))
        return owner.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        # Only code that bypasses torch's Python interface gets here (C++ extensions): it needs the value.
        def real(leaf):
            if isinstance(leaf, DeferredTensor):
                return leaf.owner.value(leaf.slot)
            if type(leaf) in (list, tuple):
                return type(leaf)(map(real, leaf))
            return leaf

        return func(*real(args), **{name: real(value) for name, value in (kwargs or {}).items()})

    def __reduce_ex__(self, protocol):
        return self.owner.value(self.slot).detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.owner.value(self.slot).detach().clone()


def _deferred(value: Any):
    if isinstance(value, DeferredTensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _deferred(item)
    elif isinstance(value, dict):
        yield from _deferred(tuple(value.values()))
