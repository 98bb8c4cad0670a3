"""How the engines take turns on a device while they are timed."""

from typing import TYPE_CHECKING

import torch

from trainingcompiler.compiling.memory import available_bytes

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache

_EAGER_FACTOR = 3  # PyTorch's step took up to 1.8 times the memory of ours on an H100 (`benchmarks/results`)


class EngineTrial:
    """On a CPU: torch and XLA share the state, so that every step may be another's.

    Attributes:
        steps: How many steps an engine has in a turn. Of several the first is not timed.
    """

    steps = 1

    def finish(self) -> None:
        """Waits until the step has been computed, so that its end is the clock's."""

    def has_room(self) -> bool:
        """Whether PyTorch's own step can be tried: if it ran out of memory, the script would end."""
        return True

    def begin(self, engine: str) -> None:
        """Is called before an engine's turn."""


class GpuEngineTrial(EngineTrial):
    """On a GPU: the state moves when the engine changes, and both compute behind the loop.

    Args:
        programs: What has been compiled.
    """

    steps = 4

    def __init__(self, programs: "ProgramCache"):
        self._programs = programs

    def finish(self) -> None:
        """Waits until the step has been computed, so that its end is the clock's."""
        self._programs.dispatch_queue.settle()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def has_room(self) -> bool:
        """Whether PyTorch's own step can be tried: if it ran out of memory, the script would end."""
        there_is = available_bytes()
        return there_is is None or _EAGER_FACTOR * self._programs.added_bytes <= there_is

    def begin(self, engine: str) -> None:
        """Gives back what torch keeps of the GPU's memory, before XLA's turn."""
        if engine == "xla" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def turns_on(programs: "ProgramCache") -> EngineTrial:
    """How engines take turns on the device that programs are compiled for."""
    return EngineTrial() if programs.target.platform == "cpu" else GpuEngineTrial(programs)
