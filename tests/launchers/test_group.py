"""Who of a group failed first, where ends and errors are seen in another order than they happened."""

import signal
import time
from types import SimpleNamespace

from trainingcompiler.launchers.group import Group, Worker


class Process:
    """Ends when it has been looked at so often."""

    pid = 0

    def __init__(self, looks: int, code: int | None):
        self.looks, self.code, self.returncode = looks, code, None

    def poll(self) -> int | None:
        self.looks -= 1
        if self.looks < 0:
            self.returncode = self.code
        return self.returncode


def group_of(tmp_path, *processes: Process) -> Group:
    group = Group.__new__(Group)
    group.workers = [
        Worker(rank=rank, process=process, failure_path=tmp_path / str(rank)) for rank, process in enumerate(processes)
    ]
    return group


def test_a_killed_worker_comes_before_the_error_of_one_who_noticed_first(tmp_path):
    killed, noticed = Process(3, -signal.SIGKILL), Process(1, 1)
    group = group_of(tmp_path, killed, noticed)
    group.look()
    (tmp_path / "1").write_text("ConnectionError: rank 0 is gone\n")  # whose end cannot be seen yet
    assert [worker.rank for worker in group.failures()] == [1]
    group.look_for_causes()
    assert [(worker.rank, worker.code) for worker in group.failures()] == [(0, -signal.SIGKILL), (1, 1)]


def test_one_that_is_killed_later_comes_later(tmp_path, monkeypatch):
    killed, failed = Process(1, -signal.SIGKILL), Process(0, 1)
    group = group_of(tmp_path, killed, failed)
    (tmp_path / "1").write_text("ValueError: on purpose\n")
    monkeypatch.setattr("trainingcompiler.launchers.group.time", SimpleNamespace(time=lambda: time.time() + 10))
    group.look()
    group.look()
    assert [worker.rank for worker in group.failures()] == [1, 0]


def test_nobody_is_waited_for_where_all_have_ended(tmp_path, monkeypatch):
    group = group_of(tmp_path, Process(0, 0), Process(0, 1))
    monkeypatch.setattr("trainingcompiler.launchers.group.POLL_S", 1e9)  # would hang
    group.look_for_causes()
    assert [worker.rank for worker in group.failures()] == [1]
