"""Workers that are killed while they compile, rank 0 among them, and disks that are full: the run goes on, or says it.

Each script is that of `test_faults`, with a few lines before it that make the fault happen at one certain moment.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from test_faults import SCRIPT, launched

RESTART = ("--max-restarts=1",)
AT = 7

# One worker has the lock, and does not go on before the other one waits for it; then one of the two is killed.
KILLS = """
import fcntl, os, sys, time, types
from trainingcompiler.cache import executables
from trainingcompiler.reporting import events

fault, holds, replace = sys.argv[1], False, os.replace


def end():
    with open("killed", "w") as file:
        file.write(os.environ["RANK"])
    os.kill(os.getpid(), 9)


def lock(file, how):
    global holds
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        holds = True
    except BlockingIOError:
        open("waits", "w").close()
        if fault == "waiting":
            end()
        fcntl.flock(file, how)


def compiling(event):
    if holds and isinstance(event, events.PhaseStarted) and event.name == "compile":
        while not os.path.exists("waits"):
            time.sleep(0.02)
        if fault == "compiling":
            end()


def keeping(source, target):
    if holds and fault == "keeping" and str(target).endswith(executables.ENTRY):
        end()
    replace(source, target)


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    executables.fcntl = types.SimpleNamespace(flock=lock, LOCK_EX=fcntl.LOCK_EX)
    os.replace = keeping
    events.subscribe(compiling)
"""

# Python ignores SIGXFSZ, so a write beyond the limit is an error, as on a full disk.
FULL = """
import resource, sys
import torch

fault, at, save = sys.argv[1], int(sys.argv[2]), torch.save


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def saving(state, path):
    if fault == "cache":
        limit(resource.RLIM_INFINITY)
        save(state, path)
        limit(1024)
    elif state["step"] <= at or fault == "none":
        save(state, path)
    elif fault == "path":
        limit(4096)
        save(state, path)
    elif fault == "device":
        with open("/dev/full", "wb") as file:
            save(state, file)


torch.save = saving
if fault == "cache":
    limit(1024)
"""


def model(done) -> list[float]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The loss and the weights of a run that nothing interrupts."""
    return pytest.approx(model(launched(tmp_path_factory.mktemp("whole"), "none", "0")), rel=1e-9)


@pytest.mark.parametrize("fault", ["compiling", "waiting", "keeping"])
def test_a_worker_that_is_killed_where_one_compiles_for_all_keeps_nobody_waiting(fault, tmp_path, expected):
    done = launched(tmp_path, fault, "0", options=RESTART, script=KILLS + SCRIPT)
    assert model(done) == expected
    rank = (tmp_path / "killed").read_text()
    assert f"[launch]     rank {rank} failed first: ended by SIGKILL" in done.stderr
    assert done.stderr.count("all workers are started again: restart 1 of 1") == 1
    assert "damaged" not in done.stderr  # half an entry is not taken for one


def test_without_rank_0_the_others_end_and_it_is_named(tmp_path):
    done = launched(tmp_path, "meet", str(AT), "0")
    assert done.returncode == 137, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1].startswith("[launch]     rank 0 failed first: ended by SIGKILL")


@pytest.mark.parametrize("fault", ["kill", "meet"])
def test_when_rank_0_is_killed_all_go_on_from_their_checkpoint(fault, tmp_path, expected):
    done = launched(tmp_path, fault, str(AT), "0", options=RESTART)
    assert model(done) == expected
    assert "[launch]     rank 0 failed first: ended by SIGKILL" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full is Linux's")
@pytest.mark.parametrize(
    ("fault", "error"),
    [("device", "OSError: [Errno 28] No space left on device"), ("path", "RuntimeError: ")],  # torch's own file
)
def test_a_disk_that_is_full_at_a_checkpoint(fault, error, tmp_path, expected):
    done = launched(tmp_path, fault, str(AT), script=FULL + SCRIPT)
    assert done.returncode == 1, done.stderr[-3000:]
    _, told = done.stderr.split("[launch]     rank 0 failed first (exit code 1):\n")
    lines = [line.removeprefix("[rank0]: ") for line in told.rstrip().splitlines()]
    assert lines[0] == "Traceback (most recent call last):" and lines[-1].startswith(error), told
    assert '    torch.save(state, "kept.part")' in lines  # the script's own line
    kept = torch.load(tmp_path / "kept.pt")  # the one before, whole
    assert kept["step"] == AT and set(kept) == {"model", "optimizer", "step"}
    if fault == "path":
        half = tmp_path / "kept.part"
        assert 0 < half.stat().st_size <= 4096
        assert model(launched(tmp_path, "none", "0")) == expected  # which takes the whole one


def test_a_full_disk_under_the_executables_is_said_once_and_trains_on(tmp_path, expected):
    done = launched(tmp_path, "cache", "0", script=FULL + SCRIPT)
    assert model(done) == expected
    assert done.stderr.count("not kept for the next run") == 1, done.stderr[-3000:]
    assert "[Errno 27] File too large; make room, or name another folder with --cache-dir" in done.stderr
    assert not [path for path in Path(tmp_path, "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
