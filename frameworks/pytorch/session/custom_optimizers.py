"""The step of an optimizer that is not one of torch.optim's: its Python runs at every step.

Nobody knows what such a step depends on: counters, lists, random numbers, the clock. So it is recorded as a forward is.
Gradients that only the tape knows are given to it as results of the tape, and what it asks torch for is compared with
the recording. The program of the step then has the forward, the backward and these calls.
"""

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import real_gradient
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.frameworks.pytorch.tape.tape import Tape

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter.grad`, as an entry of the tape.

    Raises:
        CaptureError: No gradient has reached the parameter.
    """
    gradient = parameter.grad
    if gradient is None:
        raise CaptureError("no gradient reaches a parameter that backward() goes through", user_line())
    return gradient


class End(enum.Enum):
    """How a recorded step has ended.

    `RECORDED` is on the tape as a whole. `ENDED_EARLY` is where the tape has run in the middle of it, because the step
    has asked for a value. `NOTHING` is a step that has asked torch for nothing.
    """

    RECORDED = enum.auto()
    ENDED_EARLY = enum.auto()
    NOTHING = enum.auto()


class CustomSteps:
    """Records the steps of optimizers whose Python has to run.

    Args:
        session: Whose optimizers these are.

    Attributes:
        optimizer: The one that is stepping now.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self.optimizer: torch.optim.Optimizer | None = None
        self._gradients: dict[int, DeferredTensor] = {}  # that the step has read, by the parameter's identity
        self._reached: set[int] = set()
        self._tape: Tape | None = None  # while a step is recorded: it would be kept with all it refers to
        self._states: Any = WeakIdKeyDictionary()

    @property
    def is_over(self) -> bool:
        """Whether torch runs the rest of the step that is being made: the tape has ended in the middle of it."""
        return self.optimizer is not None and self._session.tape is not self._tape

    def run(self, optimizer: torch.optim.Optimizer, original: Callable, args: tuple, kwargs: dict) -> tuple[Any, End]:
        """Runs `optimizer.step(...)`, and records what it asks torch for.

        Args:
            optimizer: Whose step it is.
            original: The class's own `step`.
            args: For it; a closure runs as it does outside of a step.
            kwargs: Likewise.

        Returns:
            What the step returns, and how it has ended.
        """
        session = self._session
        outer, depth, buffers = self.optimizer, session.depth, session.buffers
        args = tuple(self._outside(argument) if callable(argument) else argument for argument in args)
        kwargs = {key: self._outside(value) if callable(value) else value for key, value in kwargs.items()}
        self.optimizer, session.depth, session.buffers = optimizer, depth + 1, self._kept(optimizer)
        self._begin()
        try:
            with section.outside():
                result = original(optimizer, *args, **kwargs)
            if self.is_over:
                return result, End.ENDED_EARLY
            return result, End.RECORDED if session.tape else End.NOTHING
        finally:
            self.optimizer, session.depth, session.buffers = outer, depth, buffers
            self._gradients, self._reached = {}, set()
            self._tape = None if outer is None else session.tape

    def gradient(self, parameter: torch.Tensor) -> DeferredTensor | None:
        """The gradient of a parameter, if a step reads it that the tape alone knows."""
        if self.optimizer is None or self.is_over or section.handling:
            return None
        known = self._gradients.get(id(parameter))
        if known is None and parameter.requires_grad and self._has_gradient(parameter):
            known = self._session.record(gradient_of, (parameter,), {}, gradients_exist=True)
            self._gradients[id(parameter)] = known
        return known

    def _has_gradient(self, parameter: torch.Tensor) -> bool:
        if self._session.has_backward:
            return id(parameter) in self._reached
        return self._session.backward_compiled and real_gradient(parameter) is not None

    def _begin(self) -> None:
        self._tape = tape = self._session.tape
        self._gradients, self._reached = {}, tape.with_gradients()

    def _outside(self, closure: Callable) -> Callable:
        """A closure that runs as one that the loop calls itself."""

        def called(*args: Any, **kwargs: Any) -> Any:
            with self._left():
                result = closure(*args, **kwargs)
            self._begin()
            return result

        return called

    @contextlib.contextmanager
    def _left(self) -> Iterator[None]:
        session = self._session
        kept = self.optimizer, session.depth, session.buffers
        self.optimizer, session.depth = None, 0
        try:
            yield
        finally:
            self.optimizer, session.depth, session.buffers = kept

    def _kept(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """The tensors that the optimizer keeps and writes to, by identity; not those that it replaces at every step."""
        before, replaced = self._states.get(optimizer, ({}, set()))
        now = {
            (id(parameter), name): value
            for parameter, state in optimizer.state.items()
            if isinstance(state, dict)
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        replaced = replaced | {place for place, value in now.items() if place in before and before[place] != id(value)}
        self._states[optimizer] = {place: id(value) for place, value in now.items()}, replaced
        return {id(value) for place, value in now.items() if place not in replaced}
