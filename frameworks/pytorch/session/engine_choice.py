"""Who runs the next step: the compiled program or torch, by the user's word or by measurement."""

import time
import weakref

import torch

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.frameworks.pytorch.session.engine_trial import EngineTrial
from trainingcompiler.reporting.events import EngineChosen, Note, emit
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target

_SHORT_STEP_S = 0.05
_FEW, _MANY = 3, 10  # steps of each engine that are timed; more where they are short or close to each other
_CLEAR = 1.3  # one engine is so many times as fast as the other
_LONGEST_TURN = 64  # steps of torch's, between attempts at steps that are new each time
_NOISE = 1.05  # two engines within 5% are equal: repeated runs of the same step differ by that much


def engine_of(config: TrainingCompilerConfig, target: Target) -> str:
    """Who the user wants to run steps.

    torch has no step for several devices with which ours could be compared, and workers that each measured would choose
    each for itself.
    """
    together = target.device_count > 1 or target.workers > 1
    return "xla" if config.engine == "auto" and together else config.engine


class EngineSelector:
    """Decides before every step who runs it.

    With `auto`, the two engines take turns on the script's own first steps, so that drift of the machine hits both
    alike and no batch is skipped or used twice; then the faster one keeps the run. The first step, which has no
    beginning, and every step that compiled something are left out.

    Args:
        engine: `"xla"`, `"eager"` or `"auto"`, as the user said.
        turns: How they take turns on the device; None is as on a CPU.

    Attributes:
        engine: Likewise.
        chosen: The engine that has won, or None while it is open.
    """

    def __init__(self, engine: str, turns: EngineTrial | None = None):
        self.engine = engine
        self.chosen = None if engine == "auto" else engine
        self._times_s: dict[str, list[float]] = {"xla": [], "eager": []}
        self._optimizer: torch.optim.Optimizer | None = None  # whose step ends a batch
        self._earlier: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._last_end_s = 0.0
        self._compiles = 0
        self._turns = turns or EngineTrial()
        self._turn = "xla"
        self._in_turn = 0
        self._fruitless = 0
        self._eager_steps = self._turns.steps
        self._has_waited = False

    @property
    def defers(self) -> bool:
        """Whether the next step is recorded for the compiled program."""
        return (self.chosen or self._turn) == "xla"

    def stepped(
        self, optimizer: torch.optim.Optimizer, engine: str, is_same_batch: bool = False, waited: bool = False
    ) -> None:
        """Notes a finished step: who ran it, and how long it took since the last one.

        Args:
            optimizer: Whose. Where several step, the batch ends with the last one: the engine changes between batches.
            engine: `"xla"` or `"eager"`.
            is_same_batch: Whether the step before was of the same batch.
            waited: Whether torch ran it because it was not worth a program yet: nothing follows from that.
        """
        if self.chosen is not None:
            return
        # Which optimizer ends a batch: of several that step in one, the last.
        self._turns.finish()
        now_s = time.perf_counter()
        if self._optimizer is None or (is_same_batch and self._is_later(optimizer)):
            self._optimizer = optimizer
        elif optimizer is not self._optimizer:
            return
        # A step counts if the engine whose turn it is ran it, and nothing was compiled meanwhile. The first of a turn
        # does not, since memory and caches are the other's, unless turns are of one step.
        elif self._compiles == statistics().compiles and engine == self._turn:
            if self._in_turn or self._turns.steps == 1:
                self._times_s[engine].append(now_s - self._last_end_s)
        elif engine != self._turn and not waited:
            self._fruitless += 1
        self._has_waited |= waited
        self._compiles = statistics().compiles
        self._last_end_s = now_s
        self._in_turn += 1
        # Turns change, until both have been timed often enough.
        if self._in_turn >= (self._turns.steps if self._turn == "xla" else self._eager_steps):
            self._change()
        if self._fruitless > 3:  # nothing is being compiled: there is nothing to choose
            self.chosen = "xla"
        elif self.chosen is None and all(len(times) >= _FEW for times in self._times_s.values()):
            self._decide()

    def _is_later(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this one, and not the one that was taken for it, steps last; nobody is taken for it twice."""
        if optimizer is self._optimizer or optimizer in self._earlier:
            return False
        assert self._optimizer is not None
        self._earlier.add(self._optimizer)
        return True

    def _change(self) -> None:
        self._turn, self._in_turn = "eager" if self._turn == "xla" else "xla", 0
        if self._turn == "eager":  # what is recorded, and then torch's, takes longer than what is torch's at once
            longer = min(2 * self._eager_steps, _LONGEST_TURN)
            self._eager_steps, self._has_waited = longer if self._has_waited else self._turns.steps, False
        if self._turn == "eager" and not self._turns.has_room():
            self.chosen = "xla"
            text = "PyTorch's own step is not tried and timed: it may need more memory than there is"
            emit(Note(text=f"{text}. --engine=eager has it run"))
        else:
            self._turns.begin(self._turn)

    def _decide(self) -> None:
        # The fastest of each: what else runs on the machine only ever adds time.
        eager_s, xla_s = (min(self._times_s[engine]) for engine in ("eager", "xla"))
        is_clear = eager_s > _SHORT_STEP_S and not 1 / _CLEAR < xla_s / eager_s < _CLEAR
        if not is_clear and min(map(len, self._times_s.values())) < _MANY:
            return
        self.chosen = "xla" if xla_s <= eager_s * _NOISE else "eager"
        self._turns.begin(self.chosen)
        emit(EngineChosen(engine=self.chosen, times_ms={"eager": eager_s * 1000, "xla": xla_s * 1000}))
