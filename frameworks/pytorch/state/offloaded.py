"""Training state on several devices, or on a GPU: torch gives values away, and gets them back when it touches them.

On one CPU torch and the compiled step share memory (`shared_tensors`). On several devices there is nothing to share:
an array is divided, or copied, between them. On a GPU torch and XLA each have a queue of their own, and would have to
wait for each other at every step. So, while a step owns a tensor's values, the tensor is of a class of ours that shows
its shape and dtype to everyone, and fetches the values before torch does anything else with it. Then it is an ordinary
tensor again, until the next step takes its values. A loop in which nobody looks moves nothing.
"""

import copy
import functools
import weakref
from collections.abc import Iterable
from typing import Any

import jax
import torch
from torch.utils._python_dispatch import _disable_current_modes

from trainingcompiler.frameworks.pytorch.interop.arrays import array_over, tensor_of
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.devices import finish
from trainingcompiler.frameworks.pytorch.interop.tensor_attributes import METADATA, METADATA_METHODS
from trainingcompiler.frameworks.pytorch.state.ownership import is_shared
from trainingcompiler.frameworks.pytorch.state.shared_tensors import check_owned, set_data
from trainingcompiler.parallel.arrays import own_device, owned_array, placed_array

_SHOWN = METADATA | {"grad", "_grad", "_version"}
_SETTABLE = {"grad", "_grad"}
_offloaded: dict[int, "OffloadedTensor"] = {}  # of the tensors whose values are away, by identity


class OffloadedTensor:
    """One tensor that steps on several devices read or write.

    Tensors that share their memory with others keep their values: these are copied into and out of every step.

    Attributes:
        tensor: A weak reference to the torch tensor.
    """

    __slots__ = ("__weakref__", "_array", "_is_ahead", "tensor")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = weakref.ref(tensor)
        self._array: jax.Array | None = None  # the values, while they are away
        self._is_ahead = False  # whether they are newer than what torch still has
        weakref.finalize(tensor, _forget, id(tensor), self).atexit = False

    @classmethod
    def over(cls, array: jax.Array, dtype: torch.dtype, device: torch.device) -> tuple["OffloadedTensor", torch.Tensor]:
        """An offloaded tensor, and torch's, whose values are an array that a step has returned."""
        tensor = torch.empty((), dtype=dtype, device=device).expand(array.shape)
        offloaded = cls(tensor)
        offloaded._array, offloaded._is_ahead = array, True
        offloaded._leave(tensor)
        return offloaded, tensor

    @property
    def is_divided(self) -> bool:
        """Whether other workers hold parts of it, so that this one alone cannot fetch it; see `sharded`."""
        return False

    @property
    def stays(self) -> bool:
        """Whether the tensor has kept its values, as others see its memory."""
        return self._array is None

    def array(self, sharding: Any, written: bool = False) -> jax.Array:
        """The array to pass to a step, placed as the step wants it; a `sharding` of None is the one device.

        Raises:
            CaptureError: The step is to write to it, and somebody whom torch knows nothing of sees it.
        """
        tensor = self.tensor()
        assert tensor is not None, "a step was run with the state of a tensor that is gone"
        if sharding is None:
            if self._array is not None:
                return self._array
            sharding = own_device()
        if self._array is None:
            if written:
                check_owned(tensor)
            stays = is_shared(tensor)  # asked first: JAX looks at the old memory for a while
            values = array_over(tensor)
            # A step updates it in place: not torch's own memory.
            array = placed_array(owned_array(values) if isinstance(values, jax.Array) else values, sharding)
            if stays:
                return array
            self._array = array
            if tensor.device.type == "cuda":  # whose memory the step may need
                self._give_up(tensor)
            self._leave(tensor)
        self._array = placed_array(self._array, sharding)
        return self._array

    def update(self, array: jax.Array) -> None:
        """Takes over what a step has made of the array."""
        tensor = self.tensor()
        assert tensor is not None
        if self._array is None:
            tensor.detach().copy_(tensor_of(array, tensor.device))
            return
        self._array = array
        if not self._is_ahead:
            self._give_up(tensor)  # old values, which would be a second copy of the parameters

    @section.around  # a step that runs has consumed the array, and stores another one
    def fetch(self) -> None:
        """Gives the tensor its values back; without effect while it has them."""
        tensor, array = self.tensor(), self._array
        if tensor is None or array is None:
            return
        del _offloaded[id(tensor)]
        with torch._C.DisableTorchFunction():
            tensor.__class__ = _kind_of(type(tensor))
        if self._is_ahead:
            set_data(tensor, tensor_of(array, tensor.device).clone())
            finish(tensor.device)  # or XLA might use the array's memory again before torch has read it
        self._array, self._is_ahead = None, False

    def _give_up(self, tensor: torch.Tensor) -> None:
        """Frees the memory that torch has for the values."""
        self._is_ahead = True
        set_data(tensor, torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape))

    def _leave(self, tensor: torch.Tensor) -> None:
        _offloaded[id(tensor)] = self
        with torch._C.DisableTorchFunction():
            tensor.__class__ = _away(type(tensor))


def array_of(tensor: torch.Tensor) -> jax.Array | None:
    """The values of a tensor, while they are away; the next step consumes the array."""
    offloaded = offloaded_of(tensor)
    return None if offloaded is None else offloaded._array


def offloaded_of(tensor: torch.Tensor) -> OffloadedTensor | None:
    """What is known of a tensor whose values are away."""
    return _offloaded.get(id(tensor))


def away() -> list[torch.Tensor]:
    """All tensors whose values are away."""
    return [tensor for offloaded in list(_offloaded.values()) if (tensor := offloaded.tensor()) is not None]


class Away:
    """What the class of a tensor whose values are away adds to its own."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Lets torch do something with tensors, some of which are away: fetched first, if their values matter."""
        kwargs = kwargs or {}
        if _needs_values(function):
            with _disable_current_modes():  # whoever records what torch does is not to see this
                bring_back((args, kwargs))
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        """Copies the tensor as it is without us."""
        bring_back((self,))
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the tensor as it is without us."""
        bring_back((self,))
        return self.__reduce_ex__(protocol)


def _needs_values(function: Any) -> bool:
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    # torch's own `Tensor.grad` is a Python property, as is ours in its place: they have no name before Python 3.13.
    attribute = "grad" if owner is torch.Tensor.grad else getattr(owner, "__name__", "")
    if name == "__get__":
        return attribute not in _SHOWN
    return not (name in METADATA_METHODS or (name == "__set__" and attribute in _SETTABLE))


def bring_back(values: Iterable) -> None:
    """Gives tensors their values, wherever they are in lists and dicts: for C++ code, which asks nobody."""
    for value in values:
        if isinstance(value, torch.Tensor):
            offloaded = _offloaded.get(id(value))
            if offloaded is not None:
                offloaded.fetch()
        elif isinstance(value, list | tuple):
            bring_back(value)
        elif isinstance(value, dict):
            bring_back(value.values())


def _forget(key: int, offloaded: OffloadedTensor) -> None:
    if _offloaded.get(key) is offloaded:
        del _offloaded[key]


@functools.cache
def _away(kind: type) -> type:
    """The class of tensors of a class whose values are away."""
    return type(kind)(f"Away{kind.__name__}", (Away, kind), {"__slots__": (), "__module__": __name__})


def _kind_of(away: type) -> type:
    return away.__mro__[2]
