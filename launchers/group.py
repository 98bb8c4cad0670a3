"""The workers of one host, as one group: started together, looked after, ended together."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.launchers.output import Output

POLL_S = 0.05
KILL_GRACE_S = 20.0
"""How long workers that are told to end may take, before they are killed."""
_FAILED_EXIT_S = 5.0  # for what a failed worker still does on its way out
_NOTICED_S = 0.25  # so much earlier than its end can be seen here, others may tell that a killed worker is gone
_UNPROVOKED = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")}
_CHILDREN_GRACE_S = 2.0  # for the processes that a worker left behind; with the others less than 30 s


@dataclass(kw_only=True)
class Worker:
    """One process of the group.

    Attributes:
        rank: Its local rank.
        process: It, the leader of a process group of its own.
        failure_path: Where it writes the error that ends it, if one does.
        seen_s: When it was last seen running, in seconds since the epoch.
        ended_s: When it was seen to have ended, in seconds since the epoch; None while it runs.
        was_stopped: Whether it had failed, and had to be told to end.
    """

    rank: int
    process: subprocess.Popen
    failure_path: Path
    seen_s: float = 0.0
    ended_s: float | None = None
    was_stopped: bool = False

    @property
    def is_running(self) -> bool:
        """Whether it was running when it was looked at last."""
        return self.ended_s is None

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None where it did not end by itself."""
        return None if self.is_running or self.was_stopped else self.process.returncode

    @property
    def failed_s(self) -> float | None:
        """When it failed, in seconds since the epoch: a worker that has told its error has, even if it still runs."""
        with contextlib.suppress(FileNotFoundError):
            return self.failure_path.stat().st_mtime
        if self.code is not None and -self.code in _UNPROVOKED:
            return self.seen_s - _NOTICED_S  # a worker's sockets are closed before it has ended
        return None if self.code in (None, 0, REQUEUE) else self.ended_s

    @property
    def error(self) -> str:
        """The error that ended it, as Python shows it; "" where it told none."""
        with contextlib.suppress(FileNotFoundError):
            return self.failure_path.read_text(encoding="utf-8", errors="replace")
        return ""


class Group:
    """Workers that stand and fall together.

    Args:
        command: That of each worker.
        environments: One for each.
        failure_paths: One for each.
        output: Where their streams go.
        attempt: How often the group has been started before.
        tell: Called with the id of each process group.
    """

    def __init__(
        self,
        command: list[str],
        environments: Iterable[Mapping[str, str]],
        failure_paths: Iterable[Path],
        output: Output,
        attempt: int,
        tell: Callable[[int], None],
    ) -> None:
        self.workers: list[Worker] = []
        try:
            for rank, (environment, path) in enumerate(zip(environments, failure_paths, strict=True)):
                process = output.start(command, dict(environment), rank, attempt)
                tell(process.pid)
                self.workers.append(Worker(rank=rank, process=process, failure_path=path))
        except BaseException:
            self.kill()
            raise

    @property
    def running(self) -> list[Worker]:
        """Those that run."""
        return [worker for worker in self.workers if worker.is_running]

    def look(self) -> None:
        """Finds out who has ended."""
        for worker in self.running:
            now_s = time.time()
            if worker.process.poll() is None:
                worker.seen_s = now_s
            else:
                worker.ended_s = now_s

    def look_for_causes(self) -> None:
        """Finds out who has ended, and waits a little for a killed worker that others have noticed before its end."""
        last_seen_s = [(worker, worker.seen_s) for worker in self.running]
        self.wait(self.workers, _NOTICED_S)
        for worker, seen_s in last_seen_s:
            worker.seen_s = seen_s

    def failures(self) -> list[Worker]:
        """Those that have failed, the first one first."""
        failed = [(worker.failed_s, worker.rank, worker) for worker in self.workers]
        return [worker for _, _, worker in sorted(entry for entry in failed if entry[0] is not None)]

    def send(self, number: int, spared: Sequence[Worker] = ()) -> None:
        """Sends each running worker a signal, except those spared; its own children are its own affair."""
        for worker in [worker for worker in self.running if worker not in spared]:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(number)

    def wait(self, workers: Sequence[Worker], timeout_s: float) -> bool:
        """Waits until these workers have ended; returns whether they have."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.look()
            if not any(worker.is_running for worker in workers):
                return True
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)

    def stop(self, failed: Sequence[Worker]) -> None:
        """Ends everything: the first to fail may leave by itself, the others are asked to, and killed if need be."""
        self.send(signal.SIGTERM, spared=failed[:1])
        if not self.wait(failed[:1], _FAILED_EXIT_S):
            failed[0].was_stopped = True
        self.send(signal.SIGTERM, spared=[worker for worker in self.workers if worker not in failed[:1]])
        self.wait(self.workers, KILL_GRACE_S)
        self.kill()

    def kill(self) -> None:
        """Kills what still runs, and whatever the workers have left behind."""
        for worker in self.running:
            self._signal_group(worker, signal.SIGKILL)
            worker.process.wait()
        self.look()
        deadline_s = time.monotonic() + _CHILDREN_GRACE_S
        left = [worker for worker in self.workers if self._signal_group(worker, signal.SIGTERM)]
        while left and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            left = [worker for worker in left if self._signal_group(worker, 0)]
        for worker in left:
            self._signal_group(worker, signal.SIGKILL)

    @staticmethod
    def _signal_group(worker: Worker, number: int) -> bool:
        """Returns whether there is anybody left in the worker's process group."""
        try:
            os.killpg(worker.process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS refuses to signal a group of zombies
            return False
        return True
