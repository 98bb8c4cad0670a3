"""Sees parameters being touched while their gradients are only on the tape."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from trainingcompiler.frameworks.pytorch.replaying import is_replaying


class ParameterGuard(TorchFunctionMode):
    """Calls `on_touch` before torch does anything with a parameter, between a recorded backward and its step.

    A loop that edits parameters there (`p.data.clamp_()`) means the backward to have seen the old values. Modes are a
    stack: the guard goes up only on an empty one, and comes down only from the top.
    """

    def __init__(self, on_touch: Callable[[], None]):
        super().__init__()
        self._on_touch = on_touch
        self._wanted = False
        self._is_up = False

    def watch(self, wanted: bool) -> None:
        """Starts or ends watching."""
        self._wanted = wanted
        if wanted and not self._is_up and _get_current_function_mode() is None:
            self.__enter__()
            self._is_up = True
        elif not wanted and self._is_up and _get_current_function_mode() is self:
            self.__exit__(None, None, None)
            self._is_up = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self._wanted and not is_replaying() and any(isinstance(argument, nn.Parameter) for argument in args):
            name = getattr(func, "__name__", "")
            if name != "__get__" or getattr(getattr(func, "__self__", None), "__name__", "") == "data":
                self._on_touch()  # anything but a look at an attribute
        return func(*args, **(kwargs or {}))


def versions(parameters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """torch's counts of in-place writes to each parameter."""
    return tuple(parameter._version for parameter in parameters)
