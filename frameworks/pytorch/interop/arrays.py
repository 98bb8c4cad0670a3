"""Moves values between torch tensors and JAX arrays of the same memory."""

import ctypes
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from trainingcompiler.frameworks.pytorch.interop.devices import CPU
from trainingcompiler.parallel.arrays import address


def numpy_view(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy array over the tensor's memory; bfloat16, which NumPy lacks, through ml_dtypes.

    `Tensor.numpy` would take the right to be resized from the script's tensor, which shows that it was called.
    """
    with torch._C.DisableTorchFunction():  # or a mode that records would get to see it
        tensor = tensor.detach()
        if tensor.dtype is torch.bfloat16:
            return np.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
        return np.from_dlpack(tensor)


def array_over(tensor: torch.Tensor) -> np.ndarray | jax.Array:
    """An array over a tensor's memory: a NumPy array, or on a GPU one of JAX."""
    return numpy_view(tensor) if tensor.device.type == "cpu" else gpu_array(tensor)


def gpu_array(tensor: torch.Tensor) -> jax.Array:
    """An array over a tensor's memory on a GPU; whoever reads it waits for what torch computes there."""
    with jax.enable_x64(True):
        return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def tensor_of(array: np.ndarray | jax.Array, device: torch.device = CPU) -> torch.Tensor:
    """A torch tensor over the array's memory; the tensor keeps the memory alive. It must not be written to if the
    array is used again. What several devices hold is gathered, and what is on another device than torch is to have it
    on is copied, into memory of its own."""
    if isinstance(array, np.ndarray):
        return _from_host(array).to(device)
    if len(array.sharding.device_set) > 1:
        array = array.addressable_data(0) if array.is_fully_replicated else _gathered(array)
    if device.type == "cpu" and not _is_on_cpu(array):
        return _from_host(np.array(array))
    tensor = torch.from_dlpack(array)
    return tensor if tensor.device.type == device.type else tensor.to(device)


def laid_out(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A copy of values that lies as strides say; the values themselves where elements would lie in one place."""
    with torch._C.DisableTorchFunction():
        copy = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device)
        return values if torch._debug_has_internal_overlap(copy) == 1 else copy.copy_(values)


def _is_on_cpu(array: jax.Array) -> bool:
    (device,) = array.devices()
    return device.platform == "cpu"


def _from_host(values: np.ndarray) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).data
    return torch.from_numpy(values)


def _gathered(array: jax.Array) -> jax.Array:
    first = min(array.sharding.device_set, key=_number)
    with jax.enable_x64(True):
        return jax.device_put(array, first)


def _number(device: Any) -> int:
    return device.id


def tensor_over(array: jax.Array, owner: object, dtype: torch.dtype) -> torch.Tensor:
    """A torch tensor over the raw memory of an array that will be donated and come back in the same buffer.

    Args:
        array: Its buffer is what the tensor sees.
        owner: Kept alive for as long as the tensor's memory is in use anywhere; it has to keep the buffer alive.
        dtype: The torch dtype of the array.

    Returns:
        A contiguous tensor of the array's shape. DLPack is not used: an export holds a reference, which makes XLA
        copy a donated buffer.
    """
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)

    kind: Any = type("Memory", (ctypes.c_char * array.nbytes,), {})  # a subclass: its instances can carry the owner
    memory = kind.from_address(address(array))
    memory.owner = owner
    # `data`: for torch it is no view, so that a script can `detach_()` it, as one may each tensor of its own.
    return torch.frombuffer(memory, dtype=dtype).view(array.shape).data
