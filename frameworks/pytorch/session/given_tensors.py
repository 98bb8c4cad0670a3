"""Real tensors that calls are given: whether they can be recorded, and whether they are still what was read of them."""

from typing import Any

import numpy as np
import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.state.ownership import is_foreign
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.frameworks.pytorch.tape.entries import Input, Slot


def geometry(leaf: Any) -> tuple:
    """What the shapes of a call's results depend on, of a leaf that is a tensor."""
    if type(leaf) is Slot:
        return "tensor", tuple(leaf.meta.shape), leaf.meta.dtype, leaf.meta.stride(), leaf.requires_grad
    if type(leaf) is Input:
        return "input", leaf.shape, leaf.dtype, leaf.strides
    return "state", tuple(leaf.shape), leaf.dtype, leaf.stride(), leaf.requires_grad


def check_plain(tensor: torch.Tensor) -> None:
    """Refuses a tensor that no program can be given.

    Raises:
        CaptureError: It lies where nothing is compiled for, or is sparse.
    """
    if not devices.is_reachable(tensor.device) or tensor.layout is not torch.strided:
        layout = "" if tensor.layout is torch.strided else f" with the layout {tensor.layout}"
        cure = devices.cure(tensor.device)
        reason = f"a {type(tensor).__name__} on {tensor.device}{layout} is passed to the model{cure}"
        raise CaptureError(reason=reason, where=user_line())


def still_is(tensor: torch.Tensor, encoded: Input) -> bool:
    """Whether a tensor has the values that were read of it; NumPy writes to memory without a new version."""
    if not is_foreign(tensor):
        return True
    with torch._C.DisableTorchFunction():
        now = numpy_view(tensor)
    return now.tobytes() == np.asarray(encoded.array).tobytes()  # bytes: NaN is NaN


def is_alone(tensor: torch.Tensor) -> bool:
    """Whether nobody else sees the tensor's memory."""
    if type(tensor) is not torch.Tensor or tensor._is_view():
        return False
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= 2  # the tensor's own reference and `storage`'s


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor has been written to; another number once it has become a result of the tape."""
    if type(tensor) is DeferredTensor:  # has become a result of the tape when it was written to
        return -2
    return -1 if tensor.is_inference() else tensor._version
