"""The thread that trains, the only one whose calls are recorded, and forks of the process."""

import threading
import time
from typing import TYPE_CHECKING

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.reporting.statistics import current as statistics

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


class _Local(threading.local):
    trains: object = None


class TrainingThread:
    """Which thread trains: the one that makes the first step, and the next one when it has ended.

    Attributes:
        local: What each thread has: `trains` is the token, in the one that trains. Quicker to ask than which one it is.
        token: Likewise.
        is_forked: Whether this process is a fork's child, in which nothing is recorded.

    Args:
        session: Whose calls are recorded.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self.local = _Local()
        self.is_forked = False
        self._begin_here()

    @property
    def is_here(self) -> bool:
        """Whether it is this one."""
        return self.local.trains is self.token

    def _begin_here(self) -> None:
        self._thread = threading.current_thread()
        self.token = self.local.trains = object()

    @section.around
    def stepped_elsewhere(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes that torch has made a step in another thread than the one that is watched."""
        session = self._session
        if session.is_closed:
            return
        if not session.tape and (not session.registry.has_stepped or not self._thread.is_alive()):
            self._begin_here()
            session.deferring = session.deferring  # which puts the mode up
            session.registry.stepped(optimizer, "eager")
            return
        statistics().step_finished("eager", time.monotonic())
        name, trains = threading.current_thread().name, self._thread.name
        reason = f"thread {name} trains while {trains} does, and the steps of one thread are compiled"
        session.fallbacks.say(CaptureError(reason, user_line()))

    @section.around
    def before_fork(self) -> None:
        """Computes what the child may look at: it has no XLA to compute it with."""
        session = self._session
        if not is_inside_torch():
            if session.workers is None:
                session.commit()
            for slot in session.tape.live_slots():
                session.value(slot)

    def leave_child(self) -> None:
        """Records nothing more, in a forked child; what is pending is torch's where a gradient has to pass it."""
        self.is_forked = True
        self._begin_here()
        self._session.deferring = False


def is_inside_torch() -> bool:
    """Whether torch runs for us in this thread, or is in its own backward, which calls checkpointed blocks again."""
    return in_passthrough() or torch._C._current_graph_task_id() != -1  # in this order: Dynamo reads no further
