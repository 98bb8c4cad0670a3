"""Leaves a model's weights as the system hands out their memory: pages that take none until they are written."""

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_LEAST_ELEMENTS = 2**16  # smaller ones cost nothing, and stay what the script has made them


class SkipParameterInit(TorchFunctionMode):
    """While it is entered, nothing writes to a large parameter: no initializer, no loading of a checkpoint.

    For a run that takes no step, and so needs shapes and no values: a model of 7 billion parameters is made in two
    seconds, and in no memory. What the script computes from its weights in the meantime means nothing.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Returns the parameter that the function would have written to, or runs the function."""
        kwargs = kwargs or {}
        # torch.nn.init's functions hand themselves over before they write, with the tensor by name.
        written = args[0] if args else kwargs.get("tensor")
        name = getattr(function, "__name__", "")
        if isinstance(written, nn.Parameter) and written.numel() >= _LEAST_ELEMENTS and _writes(name):
            return written
        return function(*args, **kwargs)


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
