"""Training state: tensors that torch and the compiled step share, in one copy.

The buffers belong to XLA and are donated to every step, which updates them in place; torch sees them through their
addresses. Any read, edit, `state_dict()` or `deepcopy` in torch therefore works on current values.
"""

import weakref

import jax
import torch

from trainingcompiler.buffers import address, owned_array, snapshot
from trainingcompiler.frameworks.pytorch.arrays import numpy_view, tensor_of, tensor_over


class Cell:
    """One tensor that the compiled step reads or writes.

    Attributes:
        tensor: A weak reference to the torch tensor.
        shared: Whether other tensors see the same memory, so that it has to stay where it is: its values are copied
            into and out of every step.
    """

    __slots__ = ("__weakref__", "_address", "_array", "shared", "tensor")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = weakref.ref(tensor)
        self._array: jax.Array | None = None
        self._address = -1
        self.shared = _is_shared(tensor)

    def array(self) -> jax.Array:
        """The buffer to pass to the step. A tensor whose memory was replaced (`p.data = ...`) is adopted again."""
        tensor = self.tensor()
        assert tensor is not None, "a step was run with the state of a tensor that is gone"
        if self.shared:
            return owned_array(numpy_view(tensor.contiguous()))
        if self._array is None or tensor.data_ptr() != self._address:
            self._adopt(tensor)
        assert self._array is not None
        return self._array

    def update(self, array: jax.Array) -> None:
        """Takes over what the step has made of the buffer."""
        tensor = self.tensor()
        assert tensor is not None
        if self.shared:
            tensor.detach().copy_(tensor_of(array))
            return
        self._array = array
        if array.size and address(array) != self._address:
            # Views of the old memory that the user holds would be lost; the compiler demands the identity alias map.
            raise AssertionError("XLA moved a donated state buffer")

    def _adopt(self, tensor: torch.Tensor) -> None:
        self._array = owned_array(numpy_view(tensor.contiguous()))
        view = tensor_over(self._array, self, tensor.dtype)
        version = tensor._version
        tensor.data = view
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        self._address = tensor.data_ptr()


class CellRegistry:
    """The cell of each tensor, found by identity."""

    def __init__(self):
        self._cells: dict[int, tuple[weakref.ref, Cell]] = {}

    def cell(self, tensor: torch.Tensor) -> Cell:
        """The tensor's cell, made on first use."""
        found = self._cells.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        cell = Cell(tensor)
        self._register(tensor, cell)
        return cell

    def tensor_for(self, array: jax.Array, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor over an array that a step has returned, adopted as it is."""
        cell = Cell.__new__(Cell)
        tensor = tensor_over(array, cell, dtype)
        cell.tensor, cell.shared, cell._array, cell._address = weakref.ref(tensor), False, array, tensor.data_ptr()
        self._register(tensor, cell)
        return tensor

    def _register(self, tensor: torch.Tensor, cell: Cell) -> None:
        key = id(tensor)
        self._cells[key] = (weakref.ref(tensor, lambda _: self._cells.pop(key, None)), cell)


def input_array(tensor: torch.Tensor) -> jax.Array:
    """A snapshot of a tensor's values."""
    return snapshot(numpy_view(tensor))


def _is_shared(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    if tensor._is_view() or storage.nbytes() != tensor.numel() * tensor.element_size():
        return True
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor's own reference and `storage`'s
