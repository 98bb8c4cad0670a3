"""Which programs of steps are compiled: where every step has another shape or length, none would ever pay.

The first programs at a line of the script are. Where those that have run only once have taken long to compile, torch
runs the steps of a new path until they have taken as long as compiling it would: whatever comes, that is at most twice
the time of who knew it beforehand (the ski rental problem, Karlin et al. 1988, https://doi.org/10.1007/BF01762111). An
episode of REINFORCE on CartPole is as many forwards as the pole stood steps: 40 episodes took over 150 s in place of 8.
"""

import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.tape.entries import Entry
from trainingcompiler.frameworks.pytorch.tape.recording import Call
from trainingcompiler.planning import planner
from trainingcompiler.reporting.events import Note, emit

_FREE_PROGRAMS = 2  # at a line, whatever they cost: a first step without gradients or state, and the others
_BUDGET_S = {"auto": 10.0, "xla": 60.0}  # for compiling programs that have not run again
_MOST_CALLS = 2500  # of a first program with "auto"; more are a loop that ends elsewhere at every step, most likely
_COMPILE_TIME_OF_CALL_S = 0.005  # until a program has been compiled there; `reinforce.py`: 17 s for 3,200 calls


class NotWorthCompilingError(CaptureError):
    """A program that is not compiled yet, as its path may not come again: torch runs the step."""


@dataclass
class _Line:
    """What has been compiled of the steps that end at one line of the script.

    Attributes:
        programs: How many.
        once_s: Those that have run once, and how long each took to compile.
        call_s: How long the last one took, for each of its calls.
    """

    programs: int = 0
    once_s: weakref.WeakKeyDictionary[Any, float] = field(default_factory=weakref.WeakKeyDictionary)
    call_s: float = _COMPILE_TIME_OF_CALL_S


class CompilePolicy:
    """Whether a new program is compiled, or torch runs the step.

    Args:
        engine: `"xla"`, `"auto"` or `"eager"`. Who asks for XLA waits longer for it.
        is_alone: Whether this process trains by itself, on one device. Several have to do the same, whoever is faster.
    """

    def __init__(self, engine: str, is_alone: bool):
        self._engine = engine
        self._is_on = is_alone and engine in _BUDGET_S
        self._lines: dict[tuple, _Line] = {}
        self._waited_s: weakref.WeakKeyDictionary[Call, float] = weakref.WeakKeyDictionary()
        self._is_told = False
        self._running: tuple[weakref.ref[Call], float] | None = None

    def check(self, entries: list[Entry], name: str) -> None:
        """Refuses a new program, unless it is likely to pay.

        Args:
            entries: What it would run.
            name: `"train_step"`, ...: each has a count of its own.

        Raises:
            NotWorthCompilingError: It is not; torch is to run the step, after `begin_in_torch`.
        """
        if not self._is_on or planner.current is not None or not any(entry.modes.grad for entry in entries):
            return
        line, call = self._line(entries, name), entries[-1].call
        assert call is not None
        would_take_s = len(entries) * line.call_s
        if line.programs < _FREE_PROGRAMS and (self._engine == "xla" or len(entries) <= _MOST_CALLS):
            return
        once_s = sum(line.once_s.values())
        if line.programs and once_s + would_take_s <= _BUDGET_S[self._engine]:
            return
        if self._waited_s.setdefault(call, 0.0) >= would_take_s:
            return
        where = entries[-1].where
        if not self._is_told:
            self._is_told = True
            emit(Note(text=_text(where, len(line.once_s), once_s, len(entries), would_take_s)))
        raise NotWorthCompilingError("steps like this one are new each time", where)

    def compiled(self, entries: list[Entry], name: str, step: Any, compile_time_s: float) -> None:
        """Notes a program that was compiled, and in what time."""
        line = self._line(entries, name)
        line.programs += 1
        line.once_s[step] = compile_time_s
        line.call_s = compile_time_s / len(entries)

    def ran_again(self, step: Any) -> None:
        """Notes that a program has run a second time: its path does come again."""
        for line in self._lines.values():
            line.once_s.pop(step, None)

    def begin_in_torch(self, entries: list[Entry]) -> None:
        """Begins to count the time that torch takes for entries that are not worth a program, up to the step's end."""
        call = entries[-1].call
        assert call is not None
        self._running = weakref.ref(call), time.perf_counter()

    @property
    def is_waiting(self) -> bool:
        """Whether torch runs this step because it was not worth a program."""
        return self._running is not None

    def step_ended(self) -> bool:
        """Notes the end of a step; returns whether torch ran it because it was not worth a program."""
        running, self._running = self._running, None
        if running is None:
            return False
        call = running[0]()
        if call is not None:
            self._waited_s[call] = self._waited_s.get(call, 0.0) + time.perf_counter() - running[1]
        return True

    def _line(self, entries: list[Entry], name: str) -> _Line:
        return self._lines.setdefault((name, entries[-1].where), _Line())


def _text(where: str | None, programs: int, once_s: float, calls: int, would_take_s: float) -> str:
    if not programs:
        why = f"a step at {where} has {calls:,} calls, which would take about {would_take_s:.0f} s to compile"
    else:
        why = f"{programs} programs of steps at {where} took {once_s:.0f} s to compile and have run once each"
    return (
        f"{why}: each such step is PyTorch's until it has taken as long as compiling it. If shapes or lengths differ "
        "from step to step, pad to few"
    )
