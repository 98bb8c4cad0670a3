"""Sees training state being touched while what was computed from it is only on the tape."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from trainingcompiler.frameworks.pytorch.deferred import METADATA_METHODS
from trainingcompiler.frameworks.pytorch.replaying import is_replaying


class StateGuard(TorchFunctionMode):
    """Calls back before torch does something with the state that recorded calls have read.

    A call has seen the values that its module's parameters and buffers had; a write to them has to wait until the call
    has been computed. Between a recorded backward and its step, anything that is done with a parameter may be about to
    change it or its gradient (`p.data.clamp_()`).

    Modes are a stack: the guard goes up only on an empty one, and comes down only from the top.

    Attributes:
        is_up: Whether it watches. Under somebody else's mode (`with torch.device("cpu")`) it cannot.
    """

    def __init__(self, on_write: Callable[[], None], on_touch: Callable[[], None]):
        super().__init__()
        self._on_write = on_write
        self._on_touch = on_touch
        self._states: list[frozenset[int]] = []
        self._after_backward = False
        self.is_up = False

    def watch(self, state: frozenset[int]) -> None:
        """Begins to watch for writes to the tensors with these identities."""
        self._states.append(state)
        self._go_up()

    def watch_all(self) -> None:
        """Begins to watch for anything that is done with a parameter."""
        self._after_backward = True
        self._go_up()

    def rest(self) -> None:
        """Ends watching."""
        self._states.clear()
        self._after_backward = False
        if self.is_up and _get_current_function_mode() is self:
            self.__exit__(None, None, None)
            self.is_up = False

    def _go_up(self) -> None:
        if not self.is_up and _get_current_function_mode() is None:
            self.__enter__()
            self.is_up = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (self._states or self._after_backward) and args and not is_replaying():
            name = getattr(func, "__name__", "")
            looks = name == "__get__" or name in METADATA_METHODS
            if looks and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
                looks, name = False, "data_"
            if not looks:
                if self._after_backward and any(isinstance(argument, nn.Parameter) for argument in args):
                    self._on_touch()
                elif name.endswith("_") and self._is_watched(args[0]):
                    self._on_write()
        return func(*args, **(kwargs or {}))

    def _is_watched(self, target: Any) -> bool:
        if isinstance(target, list | tuple):
            return any(map(self._is_watched, target))
        return any(id(target) in state for state in self._states)


def versions(parameters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """torch's counts of in-place writes to each parameter."""
    return tuple(parameter._version for parameter in parameters)
