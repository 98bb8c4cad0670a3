"""Training state: tensors that torch and the compiled step share, in one copy.

The buffers belong to XLA and are donated to every step, which updates them in place; torch sees them through their
addresses. Any read, edit, `state_dict()` or `deepcopy` in torch therefore works on current values.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Sharding

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.arrays import gpu_array, numpy_view, tensor_of, tensor_over
from trainingcompiler.frameworks.pytorch.interop.devices import CPU
from trainingcompiler.frameworks.pytorch.state.ownership import is_foreign, is_shared
from trainingcompiler.parallel.arrays import address, owned_array, placed_array, snapshot


class _Buffer:
    """One piece of memory that XLA owns; every torch view of it keeps it alive.

    Attributes:
        array: The newest array that lives in it.
        address: Where it lies.
    """

    __slots__ = ("address", "array")

    def __init__(self, array: jax.Array):
        self.array = array
        self.address = address(array) if array.size else None

    def update(self, array: jax.Array) -> None:
        """Takes over the array that a step has left in the memory."""
        # Views of the old memory that the user holds would be lost; the compiler demands the identity alias map.
        if self.address is not None and array.unsafe_buffer_pointer() != self.address:
            raise AssertionError("XLA moved a donated state buffer")
        self.array = array


class _Copy:
    """The values that a tensor has had.

    Attributes:
        values: In memory that XLA owns.
        was_shared: Whether others saw the tensor's memory.
    """

    __slots__ = ("_pointer", "_version", "values", "was_shared")

    def __init__(self, tensor: torch.Tensor):
        self._pointer, self._version = tensor.data_ptr(), tensor._version
        self.was_shared = is_shared(tensor)  # asked first: JAX looks at the old memory for a while
        self.values = owned_array(numpy_view(tensor.contiguous()))

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies where it lay, and nothing has been written to it since."""
        return (self._pointer, self._version) == (tensor.data_ptr(), tensor._version)


class SharedTensor:
    """One tensor that the compiled step reads or writes.

    Tensors that share their memory with other tensors have to stay where they are: their values are copied into and out
    of every step. All others are moved into a buffer of their own on first use. What NumPy or another process sees is
    read, and not written: they may write to it while a step runs, which would undo that.

    Attributes:
        tensor: A weak reference to the torch tensor.
    """

    __slots__ = ("__weakref__", "_buffer", "_copy", "_pointer", "tensor")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = weakref.ref(tensor)
        self._buffer: _Buffer | None = None
        self._pointer = -1
        self._copy: _Copy | None = None

    @classmethod
    def over(
        cls, array: jax.Array, dtype: torch.dtype, device: torch.device = CPU
    ) -> tuple["SharedTensor", torch.Tensor]:
        """A shared tensor, and torch's, over an array that a step has returned; memory is shared on a CPU only."""
        assert device.type == "cpu"
        buffer = _Buffer(array)
        tensor = tensor_over(array, buffer, dtype)
        shared = cls(tensor)
        shared._buffer, shared._pointer = buffer, tensor.data_ptr()
        return shared, tensor

    @property
    def stays(self) -> bool:
        """Whether the tensor has been left where it is, as others see its memory."""
        return self._buffer is None

    def array(self, sharding: Sharding | None, written: bool = False) -> jax.Array:
        """The array to pass to the step, on one device; `sharding` is that of one of several workers, or None.

        A tensor whose memory was replaced (`p.data = ...`) is moved again.

        Raises:
            CaptureError: The step is to write to it, and somebody whom torch knows nothing of sees it.
        """
        tensor = self.tensor()
        assert tensor is not None, "a step was run with the state of a tensor that is gone"
        if self._buffer is None or tensor.data_ptr() != self._pointer:
            self._buffer = None
            if written:
                check_owned(tensor)
            copy, self._copy = self._copy, None
            if copy is None or not copy.is_of(tensor):
                copy = _Copy(tensor)
            values = copy.values
            if sharding is not None:
                values = placed_array(values, sharding)
            if copy.was_shared:
                return values
            self._move(tensor, _Buffer(values))
        assert self._buffer is not None
        return self._buffer.array

    def copy(self) -> None:
        """Copies the values for the next `array`, which takes them if the tensor has not been written to."""
        tensor = self.tensor()
        if tensor is not None and (self._buffer is None or tensor.data_ptr() != self._pointer):
            self._copy = _Copy(tensor)

    def forget_copy(self) -> None:
        """Drops a copy that no `array` has taken."""
        self._copy = None

    def update(self, array: jax.Array) -> None:
        """Takes over what the step has made of the array."""
        if self._buffer is not None:
            self._buffer.update(array)
            return
        tensor = self.tensor()
        assert tensor is not None
        tensor.detach().copy_(tensor_of(array))

    def _move(self, tensor: torch.Tensor, buffer: _Buffer) -> None:
        set_data(tensor, tensor_over(buffer.array, buffer, tensor.dtype))
        self._buffer, self._pointer = buffer, tensor.data_ptr()


class StateRegistry:
    """The shared tensor of each of torch's, found by identity.

    Args:
        kind: `SharedTensor`, or one with the same methods for state on several devices.
        make: Makes one for a tensor; None is `kind` itself.
    """

    def __init__(self, kind: Any = SharedTensor, make: Callable[[torch.Tensor], Any] | None = None):
        self._kind = kind
        self._make = make or kind
        self._shared: dict[int, Any] = {}

    def all_of(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The ones of many tensors."""
        known = self._shared.get
        found = [known(id(tensor)) for tensor in tensors]  # a step asks for hundreds of them
        for index, (one, tensor) in enumerate(zip(found, tensors, strict=True)):
            if one is None or one.tensor() is not tensor:
                found[index] = self.of(tensor)
        return found

    def of(self, tensor: torch.Tensor) -> Any:
        """The one of a tensor, made on first use."""
        found = self._shared.get(id(tensor))
        if found is None or found.tensor() is not tensor:
            found = self._make(tensor)
            self._register(tensor, found)
        return found

    def arrays(self, shared: Sequence[Any], shardings: Iterable[Sharding | None], written: bool) -> list[jax.Array]:
        """What a step is given of shared tensors; see `SharedTensor.array`."""
        return [one.array(where, written) for one, where in zip(shared, shardings, strict=False)]

    def update(self, shared: Sequence[Any], arrays: Sequence[jax.Array]) -> None:
        """Takes over what a step has made of their arrays."""
        for one, array in zip(shared, arrays, strict=True):
            one.update(array)

    def tensor_for(self, array: jax.Array, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A new tensor over an array that a step has returned."""
        shared, tensor = self._kind.over(array, dtype, device)
        self._register(tensor, shared)
        return tensor

    def _register(self, tensor: torch.Tensor, shared: Any) -> None:
        key = id(tensor)
        self._shared[key] = shared
        weakref.finalize(tensor, self._forget, key, shared).atexit = False

    def _forget(self, key: int, shared: Any) -> None:
        if self._shared.get(key) is shared:
            del self._shared[key]


def input_array(tensor: torch.Tensor, on_host: bool) -> np.ndarray | jax.Array:
    """A snapshot of a tensor's values, which a program is given as they are.

    Args:
        tensor: Any.
        on_host: Whether programs read the host's memory: a NumPy array is made in 1 us, one of JAX's in 100.
    """
    if tensor.device.type != "cpu":
        with torch._C.DisableTorchFunction():  # or a mode that records would get to see it
            return gpu_array(tensor.detach().clone(memory_format=torch.contiguous_format))
    values = numpy_view(tensor)
    return np.array(values, order="C", copy=True) if on_host else snapshot(values)


def set_data(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Replaces a tensor's memory, which torch is not to take for a write to it."""
    version = tensor._version
    with torch._C.DisableTorchFunctionSubclass():
        tensor.data = values
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def check_owned(tensor: torch.Tensor) -> None:
    """Refuses a tensor that a step would write to while others may.

    Raises:
        CaptureError: NumPy or another process sees its memory.
    """
    if is_foreign(tensor):
        is_trained = tensor.requires_grad
        cure = "`p.data = p.data.clone()` gives it" if is_trained else "a copy of it (`.clone()`) in its place has"
        raise CaptureError(
            f"a {'parameter' if is_trained else 'tensor'} of shape {list(tensor.shape)} that the step updates lies in "
            f"memory that NumPy or another process sees too, and may write to; {cure} memory of its own, to be compiled"
        )
