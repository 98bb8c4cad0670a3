"""Several workers on this machine, looked after: signals passed on, failures told, nothing left behind."""

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from trainingcompiler.cli.job import Job
from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.launchers.group import KILL_GRACE_S, POLL_S, Group, Worker
from trainingcompiler.launchers.messages import described, exit_code, say
from trainingcompiler.launchers.output import Output
from trainingcompiler.launchers.reaper import guarding

BAD_INPUT = 2
_STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_FORWARDED = (*_STOPPING, "SIGUSR1", "SIGUSR2")
_LATE_NOTE_S = 10.0

Environments = Callable[[int, Mapping[int, Path]], list[dict[str, str]]]


class Supervisor:
    """Runs a job's workers until they are done.

    Args:
        job: What to run.
        environments: Called for each attempt with its number and with where each worker is to write its error;
            returns the workers' environments.
    """

    def __init__(self, job: Job, environments: Environments) -> None:
        self._job = job
        self._environments = environments
        self._arrived: list[int] = []  # signals that have not been passed on
        self._received: list[int] = []
        self._output = Output(job)

    def run(self) -> int:
        """Runs the workers, and again after a failure as often as the job allows; returns the exit code."""
        if self._output.folder is not None:
            say(f"output of the workers: {self._output.folder}")
        with (
            tempfile.TemporaryDirectory(prefix="trainingcompiler-") as folder,
            guarding(folder) as tell,
            self._listening(),
        ):
            for attempt in range(self._job.max_restarts + 1):
                code, may_restart = self._attempt(Path(folder), attempt, tell)
                if not may_restart or attempt == self._job.max_restarts:
                    break
                say(f"all workers are started again: restart {attempt + 1} of {self._job.max_restarts}")
        return code

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def arrived(number: int, frame: FrameType | None) -> None:
            self._arrived.append(number)

        numbers = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
        before = {number: signal.signal(number, arrived) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempt(self, folder: Path, attempt: int, tell: Callable[[int], None]) -> tuple[int, bool]:
        """Runs the group once; returns the exit code, and whether another attempt makes sense."""
        count = self._job.nproc_per_node or 1
        paths = {rank: folder / f"attempt-{attempt}-rank-{rank}" for rank in range(count)}
        environments = self._environments(attempt, paths)
        group = Group(self._job.command, environments, paths.values(), self._output, attempt, tell)
        late = False
        try:
            late = self._watch(group)
            group.look_for_causes()  # whoever failed because of another did so after it
            failed = group.failures()
            if failed or late:
                if self._is_stopping:
                    group.kill()
                else:
                    group.stop(failed)
                failed += [worker for worker in group.failures() if worker.error and worker not in failed]
        finally:
            group.kill()
            self._output.finish()
        return self._verdict(group, failed, late)

    @property
    def _is_stopping(self) -> bool:
        return any(signal.Signals(number).name in _STOPPING for number in self._received)

    def _watch(self, group: Group) -> bool:
        """Waits for the end of all, for a failure, or for those who are left alone too long; returns whether these."""
        limit_s = self._job.exit_timeout_s or float("inf")
        alone_s: float | None = None
        told = False
        while True:
            group.look()
            self._pass_on(group)
            if not group.running or (group.failures() and not self._is_stopping):
                return False
            if len(group.running) == len(group.workers):
                time.sleep(POLL_S)
                continue
            alone_s = alone_s or time.monotonic()
            waited_s = time.monotonic() - alone_s
            if self._is_stopping and waited_s > KILL_GRACE_S:
                return False
            if waited_s > limit_s:
                say(
                    f"{_ranks(group.running)} still running {limit_s:g} s after the first worker finished, and ended "
                    "now. If it has work to do alone, give --exit-timeout=SECONDS, or 0 for no limit"
                )
                return True
            if waited_s > min(_LATE_NOTE_S, limit_s) and not told and not self._is_stopping:
                told = True
                end = f"may go on for {limit_s:g} s (--exit-timeout)" if limit_s < float("inf") else "may go on"
                say(f"{_ranks(group.running)} still running after others finished, and {end}")
            time.sleep(POLL_S)

    def _pass_on(self, group: Group) -> None:
        while self._arrived:
            number = self._arrived.pop(0)
            if number == signal.SIGINT and number in self._received:
                group.kill()  # Ctrl-C twice: whatever it was waiting for
            self._received.append(number)
            group.send(number)

    def _verdict(self, group: Group, failed: list[Worker], late: bool) -> tuple[int, bool]:
        requeued = any(worker.code == REQUEUE for worker in group.workers)
        # Where one has saved and asks to go on later, those that the same signal has ended do not speak against it.
        if requeued:
            failed = [worker for worker in failed if worker.code is None or -worker.code not in self._received]
        if not failed:
            killed = next((worker.code for worker in group.workers if worker.code not in (0, REQUEUE)), 0)
            return (REQUEUE if requeued else 1 if late else exit_code(killed) if killed else 0), False
        self._tell(failed)
        code = exit_code(failed[0].code)
        return code, code != BAD_INPUT and not self._received

    def _tell(self, failed: list[Worker]) -> None:
        """Says who has failed, the first one last and whole."""
        first, *others = failed
        alike = [worker for worker in others if worker.error and worker.error == first.error]
        for worker in others:
            if worker in alike:
                continue
            last_line = (worker.error.strip().splitlines() or [described(worker.code)])[-1]
            say(f"rank {worker.rank} failed after that: {last_line}")
        if first.error:
            also = ", and others with the same error" if alike else ""
            say(f"rank {first.rank} failed first ({described(first.code)}){also}:")
            sys.stderr.write(first.error)
        else:
            said = f"in {self._output.folder}" if self._output.folder else "above"
            say(
                f"rank {first.rank} failed first: {described(first.code)}; it left no traceback, what it said is {said}"
            )


def _ranks(workers: list[Worker]) -> str:
    ranks = ", ".join(str(worker.rank) for worker in workers)
    return f"rank {ranks} is" if len(workers) == 1 else f"ranks {ranks} are"
