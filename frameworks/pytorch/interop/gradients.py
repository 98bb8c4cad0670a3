"""`Tensor.grad` as torch stores it, whoever watches the property."""

from typing import Any

import torch

STORED: Any = torch.Tensor.grad  # torch's own property


def stored_gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """What torch itself holds as `tensor.grad`."""
    return STORED.__get__(tensor)


def real_gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """`stored_gradient`, unseen by any `TorchFunctionMode`."""
    with torch._C.DisableTorchFunction():
        return STORED.__get__(tensor)


def store_gradient(tensor: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Sets what torch itself holds as `tensor.grad`."""
    STORED.__set__(tensor, gradient)
