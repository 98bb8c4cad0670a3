"""`Tensor.grad`, watched: one property in the place of torch's own, so that whoever reads or sets a gradient is seen.

Functions are imported by name before anyone can replace them (`from torch.nn.utils import clip_grad_norm_`); the
attribute they all use cannot be.
"""

from typing import Any, Protocol

import torch

_STORED: Any = torch.Tensor.grad  # torch's own property


class GradientWatcher(Protocol):
    """Who answers for gradients while a tape is pending."""

    def read_gradient(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What `tensor.grad` is."""

    def write_gradient(self, tensor: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Does `tensor.grad = gradient`."""


def stored_gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """What torch itself holds as `tensor.grad`."""
    return _STORED.__get__(tensor)


def real_gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """`stored_gradient`, unseen by any `TorchFunctionMode`."""
    with torch._C.DisableTorchFunction():
        return _STORED.__get__(tensor)


def store_gradient(tensor: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Sets what torch itself holds as `tensor.grad`."""
    _STORED.__set__(tensor, gradient)


def watch_gradients(watcher: GradientWatcher) -> None:
    """Sends every read and write of `.grad` through `watcher`."""

    def delete(tensor):
        watcher.write_gradient(tensor, None)

    watched: Any = property(watcher.read_gradient, watcher.write_gradient, delete, _STORED.__doc__)
    torch.Tensor.grad = watched


def unwatch_gradients() -> None:
    """Puts torch's own property back."""
    torch.Tensor.grad = _STORED
