"""Gradients, watched: one property in the place of torch's `Tensor.grad`, so that whoever reads or sets one is seen.

Functions are imported by name before anyone can replace them (`from torch.nn.utils import clip_grad_norm_`); the
attribute they all use cannot be.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.frameworks.pytorch.capture.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.interop.gradients import STORED, store_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, passthrough


class _Gradient(property):
    """What stands in for `Tensor.grad`. Before torch 2.13, Dynamo asks every attribute of the kind who defines it."""

    __objclass__ = torch.Tensor


class GradientWatcher(Protocol):
    """Who has to know of every look at a gradient."""

    def reads_gradient(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Is called before `tensor.grad` is read, and returns it if torch does not have it.

        It raises an error if it is not there to be read.
        """

    def writes_gradient(self, tensor: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Is called for `tensor.grad = gradient`; returns what to store."""

    def clears_gradients(self, owner: Any, parameters: list[torch.Tensor], set_to_none: bool) -> None:
        """Is called before the `zero_grad` of an optimizer or a module, the owner."""


_watchers: list[GradientWatcher] = []
_patches = Patches()


def watch_gradients(watcher: GradientWatcher) -> None:
    """Tells `watcher` of every read and write of `.grad`, but for those of torch code that we run."""
    _watchers.append(watcher)
    if not _patches:
        gradient = _Gradient(_read, _write, lambda tensor: _write(tensor, None), STORED.__doc__)
        _patches.replace(torch.Tensor, "grad", gradient, "who reads or sets a gradient is seen")
        for owner, zero_grad in _ZERO_GRADS.items():
            _patches.replace(owner, "zero_grad", zero_grad, "gradients are cleared without being made")


def unwatch_gradients(watcher: GradientWatcher) -> None:
    """Stops telling `watcher`; after the last one, torch's own property is back."""
    if watcher in _watchers:
        _watchers.remove(watcher)
    if not _watchers:
        _patches.restore()


def skipped_by_dynamo() -> None:
    """Keeps `torch.compile` out of what stands in for `tensor.grad`, which it would call there, without end."""
    from torch._dynamo.decorators import skip  # 2 s to import, and there already once `torch.compile` was called

    for function in (_read, _write, stored_gradient, store_gradient):
        skip(function)


def _watched(zero_grad: Any, parameters_of: Callable[[Any], list[torch.Tensor]]) -> Any:
    @functools.wraps(zero_grad)
    def watched(owner: Any, set_to_none: bool = True) -> None:
        if not in_passthrough():
            for watcher in _watchers:
                watcher.clears_gradients(owner, parameters_of(owner), set_to_none)
        with passthrough(), torch._C.DisableTorchFunction():
            zero_grad(owner, set_to_none)

    return watched


_ZERO_GRADS = {
    nn.Module: _watched(nn.Module.zero_grad, lambda module: list(module.parameters())),
    torch.optim.Optimizer: _watched(torch.optim.Optimizer.zero_grad, parameters_of),
}


def _read(tensor: torch.Tensor) -> torch.Tensor | None:
    if not in_passthrough():
        for watcher in _watchers:
            gradient = watcher.reads_gradient(tensor)
            if gradient is not None:
                return gradient
    return stored_gradient(tensor)


def _write(tensor: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if not in_passthrough():
        for watcher in _watchers:
            gradient = watcher.writes_gradient(tensor, gradient)
    store_gradient(tensor, gradient)
