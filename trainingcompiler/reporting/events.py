"""What happens during a run, as values: the engine emits them, the console and reports subscribe."""

import atexit
import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trainingcompiler.reporting.statistics import RunStatistics, current


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of the events."""


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Training is about to be watched.

    Attributes:
        versions: Package name -> version, of the framework and of JAX.
        device: What the programs run on, as a person would name it.
        compiled: Whether steps will be compiled.
        reason: Why not, or under which condition; may be empty when `compiled`.
    """

    versions: Mapping[str, str]
    device: str
    compiled: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """A phase ("capture", "lower", "compile", "first step") has begun."""

    name: str


@dataclass(frozen=True, kw_only=True)
class PhaseEnded(Event):
    """A phase is over, after `duration_s` seconds; `detail` says on what it worked and with what result."""

    name: str
    duration_s: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Recompiled(Event):
    """A further program was compiled.

    Attributes:
        changed: What differs from the program before, with both values: "x float32[16, 8] -> float32[7, 8]".
        where: The script's line, where it is known.
        count: How many programs there are now.
        compile_time_s: What this one cost.
        cure: What the script can do to avoid it; may be empty.
    """

    changed: str
    where: str | None
    count: int
    compile_time_s: float
    cure: str = ""


@dataclass(frozen=True, kw_only=True)
class FellBack(Event):
    """A step ran eagerly, or `how` else its framework runs it; with `permanent`, so will every later one like it.

    `operator` is the one without a lowering, if that is the reason.
    """

    reason: str
    where: str | None
    permanent: bool
    operator: str | None = None
    how: str = "eagerly"


@dataclass(frozen=True, kw_only=True)
class EngineChosen(Event):
    """The engines in `times_ms` were timed on real steps, in milliseconds, and `engine` goes on."""

    engine: str
    times_ms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CacheDamaged(Event):
    """A cached executable could not be read: it was removed, and the program is compiled again."""

    path: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something worth one line."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run was told to stop by a signal, has saved, and leaves to be started again."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The run is over."""

    statistics: RunStatistics


Subscriber = Callable[[Event], None]

_subscribers: list[Subscriber] = []
_LOG = logging.getLogger("trainingcompiler")


def subscribe(callback: Subscriber) -> Callable[[], None]:
    """Calls `callback` with every event from now on; returns the function that ends this."""
    _subscribers.append(callback)
    return lambda: _subscribers.remove(callback)


def emit(event: Event) -> None:
    """Hands `event` to every subscriber, in the order they came, in the calling thread; and to `logging`.

    Example:
        >>> logging.basicConfig(); logging.getLogger("trainingcompiler").setLevel(logging.DEBUG)
    """
    _LOG.debug("%s", event)
    for callback in tuple(_subscribers):
        callback(event)


@dataclass
class Phase:
    """A running phase; the code inside may complete `detail` until it ends."""

    name: str
    detail: str = ""


@contextlib.contextmanager
def phase(name: str, detail: str = "") -> Iterator[Phase]:
    """Emits `PhaseStarted` and `PhaseEnded` around a block, also when an exception passes.

    Example:
        >>> with phase("capture", "train step at train.py:88") as running:
        ...     running.detail += ", 1,204 ops"
    """
    running = Phase(name, detail)
    began_s = time.monotonic()
    emit(PhaseStarted(name=name))
    outcome = " (failed)"
    try:
        yield running
        outcome = ""
    finally:
        duration_s = time.monotonic() - began_s
        emit(PhaseEnded(name=name, duration_s=duration_s, detail=(running.detail + outcome).strip()))


def end_at_exit() -> None:
    """Emits `Ended` when this process exits, unless `end` or `forget_end` has been called before."""
    if multiprocessing.parent_process() is None:  # a worker of the script's own has no run to sum up
        atexit.register(_end_of, os.getpid())


def end() -> None:
    """Emits `Ended` for this run, and not again at exit."""
    forget_end()
    emit(Ended(statistics=current()))


def forget_end() -> None:
    """Lets this process exit without `Ended`."""
    atexit.unregister(_end_of)


def _end_of(process: int) -> None:
    if os.getpid() == process:  # a forked child inherits what is to be done at exit
        end()
