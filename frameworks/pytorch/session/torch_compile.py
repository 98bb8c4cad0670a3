"""Scripts that use `torch.compile`: a recorded step reads what they gave to it, as it was written.

Where torch runs a step, `torch.compile`'s own code runs, as it does without us. That is also what `--engine=auto` then
compares compiled steps with.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.interop.dynamo import left_out
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten
from trainingcompiler.reporting.events import Note, emit

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


class TorchCompile:
    """What becomes of `torch.compile` while a session is hooked into torch.

    Args:
        session: Whose.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self._older: Any = None
        self._told: set[str] = set()

    def begin(self) -> None:
        """Has functions that were compiled before run as they were written: nobody is asked when they are called."""
        if "torch._dynamo" in sys.modules:
            self._older = left_out()

    def end(self) -> None:
        """Leaves all as it was."""
        if self._older is not None:
            self._older.__exit__(None, None, None)
            self._older = None

    def in_torch(self, module: nn.Module) -> AbstractContextManager:
        """For a call of a module that torch runs.

        Inside, all runs as it was compiled, unless this is a first step, behind which compiled ones follow: to make
        Inductor's code for it alone would take longer than all else.
        """
        session = self._session
        if not self._told and self._older is None:  # nothing has been compiled
            return contextlib.nullcontext()
        begins = session.deferring and session.registry.begins(session.modules.tensors(module).parameters)
        return left_out() if begins else self._in_force()

    def _in_force(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self._older is None else torch.compiler.set_stance("default")

    def hooked(self, original: Callable, when_used: Callable[[], None]) -> Callable:
        """`torch.compile`, whose functions run as they were written where the session records what they call."""

        @functools.wraps(original)
        def compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
            compiled = original(model, *args, **kwargs)
            if model is None:  # a decorator, which calls `torch.compile` again
                return compiled
            when_used()
            self._tell(getattr(model, "__name__", type(model).__name__))
            return compiled if isinstance(model, nn.Module) else self._unless_recorded(model, compiled)

        return compile

    def _unless_recorded(self, function: Callable, compiled: Callable) -> Callable:
        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling() or self._session.reads_inside(flatten((args, kwargs))[0]):
                return function(*args, **kwargs)
            if self._older is None or in_passthrough():
                return compiled(*args, **kwargs)
            with self._in_force():
                return compiled(*args, **kwargs)

        return call

    def _tell(self, name: str) -> None:
        if name not in self._told:
            self._told.add(name)
            text = f"torch.compile({name}) is left out of compiled steps, which read {name} as it is written"
            emit(Note(text=f"{text}; steps that PyTorch runs have it"))
