"""Who else sees a tensor's memory: other tensors, or somebody whom torch knows nothing of.

Asked of the memory itself: how many refer to its storage, who frees it, and who else holds that object. What torch
could be asked instead (whether a tensor is a view) says nothing of `.data`, of NumPy and of other processes.
"""

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_WORDS = 5  # of torch's storage and of its deleter that are looked at


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether others see the tensor's memory, so that it has to stay where it is."""
    storage = tensor.untyped_storage()
    if tensor._is_view() or storage.nbytes() != tensor.numel() * tensor.element_size():
        return True
    return is_referred_to(storage) or is_foreign(tensor)


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether NumPy or another process sees the tensor's memory: they read and write it whenever they like."""
    if tensor.device.type != "cpu":
        return False
    storage = tensor.untyped_storage()
    if storage.is_shared():
        return True
    if storage.resizable() or not storage.nbytes():
        return False
    known = _known_deleters()
    if known is None:  # a torch whose storages we cannot read
        return True
    _, deleter, context = _read(storage)
    if deleter == known.own:
        return is_referred_to(storage)  # `tensor.numpy()` was called, and what it gave may be what refers to it
    words = _words(context) if deleter == known.of_objects else None
    if words is None or words[3:] not in known.functions:
        return False  # a file that was read, or a result of XLA's
    return _is_held(words[1])


def overlapping(written: list[torch.Tensor], others: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two tensors that lie in the same memory, the first of them among `written`, and the second among all."""
    if not written:
        return None
    spans = sorted((*_span(tensor), number) for number, tensor in enumerate([*written, *others]) if tensor.numel())
    furthest = spans[0]
    for span in spans[1:]:
        if span[0] < furthest[1] and min(span[2], furthest[2]) < len(written):
            first, second = sorted((span[2], furthest[2]))
            return [*written, *others][first], [*written, *others][second]
        furthest = max(furthest, span, key=lambda each: each[1])
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def is_referred_to(storage: torch.UntypedStorage) -> bool:
    """Whether more tensors lie in a tensor's storage than itself."""
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor's own reference and `storage`'s


def _is_held(owner: int, besides: int = 0) -> bool:
    """Whether somebody else holds the object at an address, which owns memory, or one whose memory it is a view of."""
    if sys.getrefcount(_object_at(owner)) > _held_once() + besides:
        return True
    base = getattr(_object_at(owner), "base", None)  # a NumPy array's
    return base is not None and _is_held(id(base), besides=1)  # `base` itself


def _object_at(address: int) -> Any:
    return ctypes.cast(address, ctypes.py_object).value


@functools.cache
def _held_once() -> int:
    """What counting says of an object to which there is one reference: the count's own are in it."""
    holder = [object()]
    return sys.getrefcount(_object_at(id(holder[0])))


def _words(at: int) -> tuple[int, ...]:
    return tuple((ctypes.c_uint64 * _WORDS).from_address(at))


def _read(storage: torch.UntypedStorage) -> tuple[int, int, int]:
    """What torch's `StorageImpl` says of its memory: address, deleter, and what that is called with."""
    _, _, address, deleter, context = _words(storage._cdata)
    return address, deleter, context


@dataclass(frozen=True)
class _Deleters:
    """How torch frees memory.

    Attributes:
        own: What frees torch's own.
        of_objects: What frees that of NumPy arrays and Python buffers, among others.
        functions: What those two give it to call; the object's address stands before that.
    """

    own: int
    of_objects: int
    functions: frozenset[tuple[int, ...]]


@functools.cache
def _known_deleters() -> _Deleters | None:
    """What this torch frees memory with; None if that cannot be told.

    There is no interface for it, so what is read of storages is compared with objects that are known.
    """
    # Two tensors of each owner: torch itself, a NumPy array, an object with a buffer.
    own = [torch.empty(size) for size in (3, 500)]
    arrays, buffers = [np.zeros(3), np.zeros(50)], [bytearray(8), bytearray(80)]
    of_arrays = [torch.from_numpy(array) for array in arrays]
    of_buffers = [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in buffers]
    tensors = [*own, *of_arrays, *of_buffers]
    found = [_read(tensor.untyped_storage()) for tensor in tensors]
    # What was read has to be what it is taken for: an address that is known, one function for each kind of owner, ...
    if any(read[0] != tensor.data_ptr() for tensor, read in zip(tensors, found, strict=True)):
        return None
    owns, of_objects = {read[1] for read in found[:2]}, {read[1] for read in found[2:]}
    if len(owns) != 1 or len(of_objects) != 1 or owns & of_objects or any(read[0] != read[2] for read in found[:2]):
        return None
    # ... and behind the context the object that is known to own the memory.
    words = [_words(context) for _, _, context in found[2:]]
    if [each[1] for each in words] != [*map(id, arrays), *map(id, buffers)]:
        return None
    if words[0][3:] != words[1][3:] or words[2][3:] != words[3][3:]:
        return None
    return _Deleters(owns.pop(), of_objects.pop(), frozenset(each[3:] for each in words))
