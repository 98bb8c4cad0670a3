"""Which tensors are among the arguments of a call."""

import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor

PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
"""Kinds of arguments that are no tensors, and have none."""


def tensors_among(args: tuple, kwargs: dict) -> tuple[list[torch.Tensor], bool]:
    """The real tensors among arguments and the lists in them, and whether there are deferred ones."""
    found: list[torch.Tensor] = []
    is_deferred = False
    for argument in (*args, *kwargs.values()) if kwargs else args:
        kind = type(argument)
        if kind is DeferredTensor:
            is_deferred = True
        elif kind in PLAIN:
            continue
        elif kind is torch.Tensor or kind is nn.Parameter or isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple | dict):
            items = tuple(argument.values()) if isinstance(argument, dict) else tuple(argument)
            inner, inner_deferred = tensors_among(items, {})
            found += inner
            is_deferred |= inner_deferred
    return found, is_deferred


def is_pending(args: tuple, kwargs: dict) -> bool:
    """Whether there is a deferred tensor among arguments, or the lists in them, that nobody has computed for good."""
    for argument in (*args, *kwargs.values()) if kwargs else args:
        kind = type(argument)
        if kind is DeferredTensor:
            if not argument.slot.committed:
                return True
        elif kind not in PLAIN and isinstance(argument, list | tuple | dict):
            items = tuple(argument.values()) if isinstance(argument, dict) else tuple(argument)
            if is_pending(items, {}):
                return True
    return False
