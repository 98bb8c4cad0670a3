"""The lines a person reads during a run: banner, phases, recompiles, fallbacks, summary. All go to stderr.

Nothing here may stop a training run: a stream that is closed or cannot take a character is ignored.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from trainingcompiler._version import __version__
from trainingcompiler.processes import rendezvous
from trainingcompiler.reporting import events
from trainingcompiler.reporting.statistics import milliseconds

HEARTBEAT_S = 10.0
_FRAME_S = 0.2
_LABEL_WIDTH = 13
_LINE_WIDTH = 88
_BAR_WIDTH = 20
_CLEAR_LINE = "\r\x1b[K"
# A closed stream raises ValueError, a broken pipe OSError; a process without a console has None for a stream.
_BROKEN_STREAM = (OSError, ValueError, AttributeError)

NOTHING_TRAINED = (
    "no optimizer.step() of PyTorch and no training step of Keras was seen in this process: nothing was compiled. "
    "Is this the script that trains? A loop written by hand in TensorFlow is compiled by "
    "trainingcompiler.compile(train_step); --no-compile runs the script as it is."
)
_ENGINES = {"xla": "compiled"}  # how a sentence calls them


class Console:
    """Renders events as lines, and shows that a long phase is still running.

    On a terminal a running phase is one live line with a bar; elsewhere it is a plain line every `HEARTBEAT_S`
    seconds.

    Args:
        stream: Where to write; None is what `sys.stderr` is now.
        is_terminal: Whether the stream can redraw a line; None asks the stream.
        clock: A monotonic clock in seconds.
        quiet: Leave out everything that does not change the run.
        rank: Which of several workers this is. What would be the same from each is left to rank 0.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
        rank: int = 0,
    ) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = _is_a_terminal(self._stream) if is_terminal is None else is_terminal
        self._clock = clock
        self.quiet = quiet
        self._rank = rank
        self._running: list[tuple[str, float]] = []
        self._lock = threading.Lock()
        self._heart: threading.Event | None = None

    def __call__(self, event: events.Event) -> None:
        """Renders one event; pass the console itself to `events.subscribe`."""
        if isinstance(event, events.PhaseStarted):
            self._phase_started(event)
        elif isinstance(event, events.PhaseEnded):
            self._phase_ended(event)
        lines = _WARNINGS if self.quiet else _LINES
        line = lines[type(event)](event) if type(event) in lines else None
        if line and not self._rank:
            self._write_line(line)
        elif line and not isinstance(event, events.Ended):
            self._write_line(f"rank {self._rank}: {line}")

    def tick(self) -> None:
        """Shows the innermost running phase and how long it has been running."""
        with self._lock:
            if not self._running or self.quiet:
                return
            name, began_s = self._running[-1]
            elapsed_s = self._clock() - began_s
            if self._is_terminal:
                self._write(f"{_CLEAR_LINE}{_labelled(name, _bar(elapsed_s))} {_minutes(elapsed_s)}")
            else:
                self._write(f"{_labelled(name, f'still running after {elapsed_s:.0f} s')}\n")

    def _phase_started(self, event: events.PhaseStarted) -> None:
        with self._lock:
            self._running.append((event.name, self._clock()))
            if self._heart is None:
                self._heart = threading.Event()
                interval_s = _FRAME_S if self._is_terminal else HEARTBEAT_S
                threading.Thread(target=self._beat, args=(self._heart, interval_s), daemon=True).start()

    def _phase_ended(self, event: events.PhaseEnded) -> None:
        with self._lock:
            names = [name for name, _ in self._running]
            if event.name in names:
                del self._running[len(names) - 1 - names[::-1].index(event.name)]
            if not self._running and self._heart is not None:
                self._heart.set()
                self._heart = None

    def _beat(self, stopped: threading.Event, interval_s: float) -> None:
        while not stopped.wait(interval_s):
            self.tick()

    def _write_line(self, line: str) -> None:
        with self._lock:
            self._write(f"{_CLEAR_LINE if self._is_terminal else ''}{line}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(*_BROKEN_STREAM):
            self._stream.write(text)
            self._stream.flush()


_attached: Console | None = None


def attach(quiet: bool = False) -> None:
    """Shows this process's events on stderr; a second call only changes `quiet`.

    Of several workers, all but rank 0 say only what changes their run, with their rank in front.
    """
    global _attached
    worker = rendezvous.current()
    rank = worker.rank if worker is not None else 0
    if _attached is None:
        _attached = Console(rank=rank)
        events.subscribe(_attached)
    _attached.quiet = quiet or rank > 0


def _is_a_terminal(stream: TextIO) -> bool:
    with contextlib.suppress(*_BROKEN_STREAM):
        return stream.isatty()
    return False


def _labelled(label: str, text: str, duration_s: float | None = None) -> str:
    line = f"{f'[{label}]':<{_LABEL_WIDTH}}{text}"
    return line if duration_s is None else f"{line:<{_LINE_WIDTH - 10}} {duration_s:>7,.1f} s"


def _bar(elapsed_s: float) -> str:
    """Returns a bar whose block wanders: how long a compile will take is not known."""
    room = _BAR_WIDTH - 4
    position = int(elapsed_s / _FRAME_S) % (2 * room)
    left = min(position, 2 * room - position)
    return f"|{' ' * left}===={' ' * (room - left)}|"


def _minutes(elapsed_s: float) -> str:
    return f"{int(elapsed_s) // 60:02d}:{int(elapsed_s) % 60:02d}"


def _at(where: str | None) -> str:
    return f" at {where}" if where else ""


def _started(event: events.Started) -> str:
    versions = [f"{name} {version}" for name, version in event.versions.items()]
    reason = f" because {event.reason}" if event.reason else ""
    verdict = f"compiled: {'yes' if event.compiled else 'no'}{reason}"
    facts = [f"trainingcompiler {__version__}", *versions, event.device, verdict]
    return "  ".join(fact for fact in facts if fact)


def _recompiled(event: events.Recompiled) -> str:
    cure = f"; to avoid it: {event.cure}" if event.cure else ""
    return _labelled("recompile", f"#{event.count}{_at(event.where)}: {event.changed}{cure}", event.compile_time_s)


def _fell_back(event: events.FellBack) -> str:
    what = f"this step runs {event.how} from now on" if event.permanent else f"one step ran {event.how}"
    return _labelled("fallback", f"{what}{_at(event.where)}: {event.reason}")


def _engine_chosen(event: events.EngineChosen) -> str:
    times = [f"{milliseconds(time_ms)} {_ENGINES.get(name, name)}" for name, time_ms in event.times_ms.items()]
    return _labelled("engine", f"{event.engine} from now on: a step took {', '.join(times)}")


def _ended(event: events.Ended) -> str:
    done = event.statistics.steps > 0
    return _labelled("done" if done else "nothing", event.statistics.summary() if done else NOTHING_TRAINED)


def _nothing_trained(event: events.Ended) -> str | None:
    return None if event.statistics.steps else _ended(event)


_WARNINGS: dict[type[events.Event], Callable] = {
    events.Recompiled: _recompiled,
    events.FellBack: _fell_back,
    events.CacheDamaged: lambda event: _labelled(
        "cache", f"a damaged entry was removed, its program is compiled again: {event.path} ({event.error})"
    ),
    events.Stopped: lambda event: _labelled("stop", event.text),
    events.Ended: _nothing_trained,
}
_LINES: dict[type[events.Event], Callable] = _WARNINGS | {
    events.Started: _started,
    events.PhaseEnded: lambda event: _labelled(event.name, event.detail, event.duration_s),
    events.EngineChosen: _engine_chosen,
    events.Note: lambda event: _labelled("note", event.text),
    events.Ended: _ended,
}
