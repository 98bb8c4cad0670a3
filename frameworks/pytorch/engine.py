"""Who runs the next step: the compiled program or torch, by the user's word or by measurement."""

import statistics as median_of
import time

import torch

from trainingcompiler.events import EngineChosen, emit
from trainingcompiler.statistics import current as statistics

_SHORT_STEP_S = 0.05
_NOISE = 1.05  # two engines within 5% are equal: repeated runs of the same step differ by that much


class EngineChoice:
    """Decides before every step who runs it.

    With `auto`, the two engines take turns on the script's own first steps, so that drift of the machine hits both
    alike and no batch is skipped or used twice; then the faster one keeps the run. The first step, which creates the
    optimizer's state, and every step that compiled something are left out.

    Attributes:
        engine: `"xla"`, `"eager"` or `"auto"`, as the user said.
        chosen: The engine that has won, or None while it is open.
    """

    def __init__(self, engine: str):
        self.engine = engine
        self.chosen = None if engine == "auto" else engine
        self._times_s: dict[str, list[float]] = {"xla": [], "eager": []}
        self._optimizer: torch.optim.Optimizer | None = None
        self._last_end_s = 0.0
        self._compiles = 0
        self._turn = "eager"
        self._fruitless = 0

    @property
    def defers(self) -> bool:
        """Whether the next step is recorded for the compiled program."""
        return (self.chosen or self._turn) == "xla"

    def stepped(self, optimizer: torch.optim.Optimizer, engine: str) -> None:
        """Notes a finished step: who ran it, and how long it took since the last one."""
        if self.chosen is not None:
            return
        now_s = time.perf_counter()
        if self._optimizer is None:
            self._optimizer = optimizer
        elif optimizer is not self._optimizer:
            return
        elif self._compiles == statistics().compiles and engine == self._turn:
            self._times_s[engine].append(now_s - self._last_end_s)
        elif engine != self._turn:
            self._fruitless += 1
        self._compiles = statistics().compiles
        self._last_end_s = now_s
        self._turn = "eager" if self._turn == "xla" else "xla"
        if self._fruitless > 3:  # nothing is being compiled: there is nothing to choose
            self.chosen = "xla"
        elif all(len(times) >= self._needed() for times in self._times_s.values()):
            self._choose()

    def _needed(self) -> int:
        eager = self._times_s["eager"]
        return 3 if eager and min(eager) > _SHORT_STEP_S else 10

    def _choose(self) -> None:
        eager_s, xla_s = (median_of.median(self._times_s[engine]) for engine in ("eager", "xla"))
        self.chosen = "xla" if xla_s <= eager_s * _NOISE else "eager"
        emit(EngineChosen(engine=self.chosen, eager_ms=eager_s * 1000, xla_ms=xla_s * 1000))
