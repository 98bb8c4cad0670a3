"""Torch's elastic agent, which also knows of workers that have saved and want to go on later, and passes signals on."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.launcher import api

from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.launchers.group import KILL_GRACE_S, POLL_S
from trainingcompiler.launchers.messages import say

_LATE_S = 300.0  # how long one may still save after another has left
_PASSED_ON = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Has torch's launcher use this agent, which passes on what torch's own does not."""
    kept = api.LocalElasticAgent
    vars(api)["LocalElasticAgent"] = Agent
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    try:
        yield
    finally:
        vars(api)["LocalElasticAgent"] = kept
        for number, handler in before.items():
            signal.signal(number, handler)


class Agent(LocalElasticAgent):
    """Torch's own, but for exit code 75.

    Workers that leave with it have saved, all of them. Nothing is started again, and the agent leaves with it as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late_s: float | None = None  # when the first one was seen to have left
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._codes()
        if REQUEUE in codes and all(code in (None, 0, REQUEUE) for code in codes):
            if None not in codes:
                self._leave()
            self._late_s = self._late_s or time.monotonic()
            if time.monotonic() - self._late_s < _LATE_S:
                return RunResult(state=WorkerState.HEALTHY)  # torch would end those that are still saving
        return super()._monitor_workers(worker_group)

    def _invoke_run(self, role: str = "default") -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException as received:
            # Before torch signals them with all their children, helpers of the last step among them, and kills.
            self._send(received.sigval)
            self._await_end()
            if REQUEUE in self._codes():
                self._leave()
            raise

    def _await_end(self) -> None:
        """Once one has ended, the others have as long as under our own supervisor; a second signal ends the waiting."""
        ended_s: float | None = None
        while None in (codes := self._codes()):
            if any(code is not None for code in codes):
                ended_s = ended_s or time.monotonic()
                if time.monotonic() - ended_s > KILL_GRACE_S:
                    return
            time.sleep(POLL_S)

    def _codes(self) -> list[int | None]:
        """The workers' exit codes; None of those that run."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handler.proc.poll() for handler in handlers.values()]

    def _send(self, number: int) -> None:
        for handler in getattr(self._pcontext, "subprocess_handlers", {}).values():
            with contextlib.suppress(ProcessLookupError):
                handler.proc.send_signal(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._codes():
            self._remaining_restarts = 0  # whoever signals the launcher wants an end, or one more report; no restart
            self._send(number)
            return
        signal.signal(number, signal.SIG_DFL)  # nobody is there yet
        os.kill(os.getpid(), number)

    def _leave(self) -> None:
        say("the workers were told to stop, have saved, and are to be started again")
        self._exit_barrier()  # the store of all hosts may be in this process
        sys.exit(REQUEUE)
