"""`Tensor.grad` as torch stores it, whoever watches the property."""

from typing import Any

import torch

STORED: Any = torch.Tensor.grad  # torch's own property
BACKWARD = torch.Tensor.backward  # torch's own, whatever a script puts in its place
BACKWARD_OF_MANY = torch.autograd.backward  # likewise


def is_backward(function: Any) -> bool:
    """Whether a function is one of the two that differentiate, or what a script has put in the place of one.

    torch hands over what stands there, not itself: that has run already when torch asks.
    """
    return function in (BACKWARD, BACKWARD_OF_MANY, torch.Tensor.backward, torch.autograd.backward)


def is_backward_of_many(function: Any) -> bool:
    """Whether it is `torch.autograd.backward`, which takes several tensors."""
    return function in (BACKWARD_OF_MANY, torch.autograd.backward)


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
