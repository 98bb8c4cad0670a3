"""Which indices of a batch torch would refuse at the call, where a script may catch the error.

A program finds out at the end of its step. What is known at the call, a batch's labels and words, is looked at there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor


def is_refused(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call of a function of `INDEXED` has an index of the host's that is out of range."""
    with torch._C.DisableTorchFunction():
        return INDEXED[function](*args, **kwargs)


def _refuses_word(input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> bool:
    return _is_known(input) and _is_outside(input, weight.shape[0])


def _refuses_label(
    input: torch.Tensor, target: torch.Tensor, weight=None, size_average=None, ignore_index: int = -100, *_, **__
) -> bool:
    if not _is_known(target) or input.dim() == 0:
        return False
    classes = input.shape[min(1, input.dim() - 1)]
    return _is_outside(target, classes) and _is_outside(target[target != ignore_index], classes)


def _is_known(indices: Any) -> bool:
    if not isinstance(indices, torch.Tensor) or type(indices) is DeferredTensor:
        return False
    return indices.device.type == "cpu" and indices.dtype in (torch.int64, torch.int32) and indices.numel() > 0


def _is_outside(indices: torch.Tensor, count: int) -> bool:
    if indices.numel() == 0:
        return False
    least, most = map(int, indices.aminmax())
    return least < 0 or most >= count


INDEXED: dict[Callable, Callable[..., bool]] = {
    F.embedding: _refuses_word,
    F.cross_entropy: _refuses_label,
    F.nll_loss: _refuses_label,
}
