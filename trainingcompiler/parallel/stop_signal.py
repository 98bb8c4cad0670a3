"""A run that is told to end by a signal: all workers agree on the step after which they save and leave.

Nothing of it depends on where a main thread is: it may be waiting in XLA for a worker that is at its next call here. So
a thread of each worker says how many calls there have been, and from then on the next call waits for what all have
said. The first call that nobody has made is the one that answers yes.
"""

import atexit
import contextlib
import itertools
import os
import queue
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.processes import rendezvous
from trainingcompiler.processes.cluster_env import Worker
from trainingcompiler.reporting import events

POLL_S = 1.0
"""How often a worker looks whether another one was told to stop."""
WAIT_S = 300.0
"""How long a worker waits for the others to say where they are."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_POLL_WHILE_WAITING_S = 0.1
_CLOSE_S = 2.0  # a store that is gone must not keep a process from leaving

_numbers = itertools.count(1)  # a second one must not find the keys of the first
_open: list["StopSignal"] = []
_unanswered = ""  # a signal that came when a loop was over: the next one answers it


def obstacle() -> str:
    """Why no `StopSignal` can be made here; "" where one can."""
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        return (
            f"this is the thread {thread.name}, and Python hands signals to the main thread only; make the StopSignal "
            "there, and ask it from here"
        )
    size = os.environ.get("WORLD_SIZE", "1")
    if rendezvous.current() is None and size not in ("", "1"):
        return (
            f"WORLD_SIZE={size}, and these workers were not started with trainingcompiler: there is nothing through "
            "which they could agree on a step. Start them with python -m trainingcompiler.launch --nproc-per-node=N "
            "train.py, or torchrun -m trainingcompiler.launch train.py"
        )
    return ""


class StopSignal:
    """Takes SIGTERM and SIGUSR1, and says to all workers at the same step that it is time to save and leave.

    Made by the main thread, before the loop, by every worker. A handler of the script's own for one of these signals is
    called as well. Until it is closed, neither signal ends the process by itself; one that comes while XLA compiles is
    answered after that step.

    Raises:
        UsageError: Another thread makes it, or the workers have no way to agree.

    Example:
        >>> stop = tc.StopSignal()
        >>> for step in range(first, steps):
        ...     train_step()
        ...     if stop.requested():
        ...         if rank == 0:
        ...             save(step + 1)
        ...         stop.exit()
    """

    def __init__(self) -> None:
        global _unanswered
        reason = obstacle()
        if reason:
            raise UsageError(f"tc.StopSignal(): {reason}")
        worker = rendezvous.current()
        self._worker = worker if worker is not None and worker.world_size > 1 else None
        self._told, _unanswered = _unanswered, ""
        self._lock = threading.Lock()
        self._calls = 0
        self._published = False
        self._agreed: int | None = None  # the first call that answers yes
        self._answered = False
        self._reason = ""
        self._closing = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` may interrupt itself: a handler calls it
        self._all_said = threading.Event()
        self._said: set[int] = set()
        self._watch: threading.Thread | None = None
        if self._worker is not None:
            client, key = rendezvous.store(), f"trainingcompiler/stop/{next(_numbers)}"
            self._watch = threading.Thread(
                target=self._watch_store, args=(client, key, self._worker), name="trainingcompiler stop", daemon=True
            )
            self._watch.start()
            # Not what a repeated signal does: one that comes while this process leaves is to end nothing.
            atexit.register(self._end_watch, os.getpid())
        if not _open:
            _register_at_fork()
        _open.append(self)
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._arrived)

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def reason(self) -> str:
        """Which signal came, and to which of several workers, as "SIGTERM at rank 1"; "" where none is agreed on."""
        return self._reason

    def requested(self) -> bool:
        """Whether to save and leave now; called once for each step, at the same place of the loop, by every worker.

        Returns:
            True at the same call on all workers, and at every later one.

        Raises:
            TrainingCompilerError: A worker does not say where it is.
            UsageError: It has been closed.
        """
        if self._closing:
            raise UsageError("requested() was called on a tc.StopSignal that is closed; make another one for this loop")
        with self._lock:
            self._calls += 1
            call, published = self._calls, self._published
        if self._worker is None and self._told and self._agreed is None:
            self._reason, self._agreed = self._told, call
        elif self._worker is not None and published and self._agreed is None:
            self._wait(self._worker)
        self._answered = self._agreed is not None and call >= self._agreed
        return self._answered

    def exit(self) -> NoReturn:
        """Leaves with exit code 75 (`trainingcompiler.REQUEUE`): what is saved, whoever started this may go on with.

        A process group of torch's is the script's to leave first, as at any other end.
        """
        if self._worker is None or self._worker.rank == 0:
            why = f"{self._reason}: " if self._reason else ""
            events.emit(
                events.Stopped(
                    text=f"{why}stopped after {self._calls} steps of this run, leaving with exit code {REQUEUE} to be "
                    "started again"
                )
            )
        sys.exit(REQUEUE)

    def close(self) -> None:
        """Gives the signals back to the handlers before. One that has not been answered is the next StopSignal's."""
        global _unanswered
        if self._closing:
            return
        self._end_watch(os.getpid())
        atexit.unregister(self._end_watch)
        for number, before in self._before.items():
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, signal.SIG_DFL if before is None else before)
        _open.remove(self)
        if self._told and not self._answered:
            _unanswered = self._told

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self._told = self._told or signal.Signals(number).name
        self._wake.put(None)
        before = self._before[number]
        if callable(before):
            before(number, frame)

    def _wait(self, worker: Worker) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not self._all_said.wait(_POLL_WHILE_WAITING_S):
            if time.monotonic() > deadline_s:
                missing = [str(rank) for rank in range(worker.world_size) if rank not in self._said]
                raise TrainingCompilerError(
                    f"the workers were told to stop, and rank {', '.join(missing)} of {worker.world_size} has not said "
                    f"within {WAIT_S:.0f} s how far it is: it has not made its tc.StopSignal(), or it is gone"
                )

    def _watch_store(self, client: Any, key: str, worker: Worker) -> None:
        """Says how far this worker is, once somebody was told to stop or it closes; learns how far the others are."""
        asked = False
        calls: int | None = None
        while self._agreed is None:
            closing = self._closing
            # A store that does not answer has its own end: JAX ends a process whose rank 0 is gone.
            with contextlib.suppress(Exception):
                if self._told and not asked:
                    client.key_value_set(f"{key}/asked/{worker.rank}", self._told, allow_overwrite=True)
                    asked = True
                found = dict(client.key_value_dir_get(f"{key}/"))
                whys = {int(at.rpartition("/")[2]): why for at, why in found.items() if at.startswith(f"{key}/asked/")}
                if (whys or closing) and worker.rank not in self._said:
                    if calls is None:  # what was said once holds, also where the store did not hear it
                        with self._lock:
                            calls, self._published = self._calls, True
                    client.key_value_set(f"{key}/at/{worker.rank}", str(calls), allow_overwrite=True)
                    self._said.add(worker.rank)
                    continue
                at = {int(at.rpartition("/")[2]): int(n) for at, n in found.items() if at.startswith(f"{key}/at/")}
                self._said |= set(at)
                if whys and len(at) == worker.world_size:
                    self._reason = ", ".join(f"{why} at rank {rank}" for rank, why in sorted(whys.items()))
                    self._agreed = max(at.values()) + 1
                    self._all_said.set()
            if closing:
                return
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=_POLL_WHILE_WAITING_S if self._published else POLL_S)

    def _end_watch(self, process: int) -> None:
        """Tells the others how far this worker has come: they must not wait for more."""
        self._closing = True
        if self._watch is not None and os.getpid() == process:
            self._wake.put(None)
            self._watch.join(_CLOSE_S)

    def _forget(self) -> None:
        """In a child of the script: a helper that a scheduler signals with its parent must not fail the last step."""
        for number, before in self._before.items():
            ignored = signal.SIG_IGN if number == getattr(signal, "SIGUSR1", None) else signal.SIG_DFL
            signal.signal(number, ignored if before in (None, signal.SIG_DFL) else before)
        self._closing = True


def _forget_all() -> None:
    while _open:
        _open.pop()._forget()


def _register_at_fork() -> None:
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(after_in_child=_forget_all)


_registered = False
