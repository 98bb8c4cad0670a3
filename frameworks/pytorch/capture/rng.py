"""torch's random generator while a step is captured: saved and restored states, as checkpointing uses them.

A checkpointed block saves the generator's state, and restores it to compute the block again in backward. The second
computation has to draw what the first one drew: two unrelated masks would give wrong gradients and a right loss.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.functional_recorder import FunctionalRecorder
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line


class TracedRng:
    """Gives out states of the recorded sequence of draws, and takes them back, in place of torch's generator."""

    def __init__(self, recorder: FunctionalRecorder):
        self._recorder = recorder
        self._states: dict[int, tuple[torch.Tensor, Any]] = {}  # the tensors are kept, so that ids stay theirs

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces torch's functions on the CPU generator for a while."""
        get_state = torch.get_rng_state

        def get() -> torch.Tensor:
            state = get_state()
            self._states[id(state)] = state, self._recorder.draws
            return state

        def restore(state: torch.Tensor) -> None:
            if id(state) not in self._states:
                raise CaptureError("the step sets the state of torch's random generator", user_line())
            self._recorder.draws = self._states[id(state)][1]

        replaced: dict[str, Callable] = {"get_rng_state": get, "set_rng_state": restore}
        replaced |= {name: _refuse for name in ("manual_seed", "seed")}
        with contextlib.ExitStack() as stack:
            for owner in (torch, torch.random):
                for name, function in replaced.items():
                    stack.enter_context(mock.patch.object(owner, name, function))
            yield


def _refuse(*_: Any) -> NoReturn:
    raise CaptureError("the step seeds torch's random generator", user_line())
