"""`DeferredTensor`: a tensor that the loop holds and nobody has computed yet."""

import weakref
from typing import Any, Protocol

import torch
from torch.utils import swap_tensors  # torch's own, which refuses tensors with weak references

from trainingcompiler.errors import GradientLostError
from trainingcompiler.frameworks.pytorch.tape.entries import Slot


class Owner(Protocol):
    """Who records calls on deferred tensors, and computes them when somebody looks."""

    def call(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` would, some arguments being deferred."""

    def value(self, slot: Slot) -> torch.Tensor:
        """The real tensor of a slot."""


_SHAPE: Any = torch.Tensor.shape  # torch's own property
_make_wrapper = torch.Tensor._make_wrapper_subclass


def _is_seen_by_us_only() -> bool:
    """Whether no mode but the session's sees torch functions in this thread."""
    return torch._C._len_torch_function_stack() <= 1


class _EqualsTensor(type(torch.Tensor)):  # type: ignore[misc]
    """A class that is `torch.Tensor` for `==`: a script may ask `type(x) == torch.Tensor`.

    `is` cannot be answered; `isinstance` is true. The hash is its own: torch collects in a set the classes that it has
    to ask what a function means, and must not take this one for one that it has.
    """

    def __eq__(cls, other: object) -> bool:
        return other is torch.Tensor or other is cls

    __hash__ = type.__hash__


class DeferredTensor(torch.Tensor, metaclass=_EqualsTensor):
    """Stands for a tensor of known shape and dtype whose value is computed when somebody looks at it.

    Attributes:
        slot: What it stands for.
        owner: Who computes it.
    """

    slot: Slot
    owner: Owner

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """See `torch.Tensor.shape`; this is quicker than torch's own, which asks the modes."""
        slot = slot_of(self)
        return _SHAPE.__get__(self) if slot is None or not _is_seen_by_us_only() else slot.geometry.shape

    def size(self, dim: int | None = None) -> Any:
        """See `torch.Tensor.size` and `shape`."""
        slot = slot_of(self)
        if slot is None or not _is_seen_by_us_only():
            return torch.Tensor.size(self, dim)
        shape = slot.geometry.shape
        if dim is None:
            return shape
        return shape[dim] if type(dim) is int and -len(shape) <= dim < len(shape) else torch.Tensor.size(self, dim)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        for leaf in _deferred((args, kwargs)):
            owner = getattr(leaf, "owner", None)
            if owner is not None:
                return owner.call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))  # a signal's handler has computed them a moment ago

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        # Only code that bypasses torch's Python interface gets here (C++ extensions): it needs the value.
        def real(leaf):
            if isinstance(leaf, DeferredTensor):
                slot = leaf.slot
                if torch.is_grad_enabled() and slot.requires_grad and not slot.committed and not slot.freed:
                    raise GradientLostError(
                        f"{func} is called in C++ with a result of a compiled step that needs a gradient, and its "
                        "gradient history is not there, so that what is behind it would not be trained. Wrap the call "
                        "in a torch.autograd.Function, which is seen, or run the script with --engine=eager"
                    )
                return leaf.owner.value(slot)
            if type(leaf) in (list, tuple):
                return type(leaf)(map(real, leaf))
            return leaf

        return func(*real(args), **{name: real(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name):
        raise AttributeError(f"'Tensor' object has no attribute '{name}'")

    def as_subclass(self, cls):
        """See `torch.Tensor.as_subclass`, which asks no mode."""
        return self.owner.call(torch.Tensor.as_subclass, (self, cls), {})

    def set_(self, *args, **kwargs):
        """See `torch.Tensor.set_`, which asks no mode."""
        return self.owner.call(torch.Tensor.set_, (self, *args), kwargs)

    def __reduce_ex__(self, protocol):
        return self.owner.value(self.slot).detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.owner.value(self.slot).detach().clone()


def slot_of(value: Any) -> Slot | None:
    """The slot of a deferred tensor; None for anything else.

    A signal's handler may compute a tensor between any two lines outside of the critical section: it is torch's then.
    """
    return getattr(value, "slot", None) if type(value) is DeferredTensor else None


def take_contents(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Gives a tensor's Python object the contents of another one, and `other` its own; attributes of the script's stay.

    Raises:
        RuntimeError: Somebody refers weakly to one of them.
    """
    ours = ("slot", "owner")
    set_by_script = {name: value for name, value in tensor.__dict__.items() if name not in ours}
    swap_tensors(tensor, other)
    tensor.__dict__.update(set_by_script)


def deferred(slot: Slot, owner: Owner) -> DeferredTensor:
    """Makes the one tensor of a slot that the loop gets to hold."""
    shape, strides, dtype, _ = slot.geometry
    # No constructor: this is done at every call that is recorded.
    tensor = _make_wrapper(DeferredTensor, shape, strides=strides, dtype=dtype, device=slot.device)
    tensor.slot = slot
    tensor.owner = owner
    slot.wrapper = weakref.ref(tensor)
    return tensor


def _deferred(value: Any):
    if isinstance(value, DeferredTensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _deferred(item)
    elif isinstance(value, dict):
        yield from _deferred(tuple(value.values()))


def functional_name(name: str) -> str:
    """The name of the function that computes what one of this name writes: `add` for `add_` and `__iadd__`."""
    return name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
