"""Launchers and their workers as processes, and which of them are left."""

import os
import signal
import subprocess
import time
from pathlib import Path

TIMEOUT_S = 120  # only against hanging

PRELUDE = """import os, pathlib, signal, subprocess, sys, time
rank = os.environ.get("RANK")
def note(pid):
    (pathlib.Path("pids") / str(pid)).touch()
pathlib.Path("pids").mkdir(exist_ok=True)
note(os.getpid())
def say(*words, stream=sys.stdout):
    stream.write(" ".join(map(str, words)) + "\\n")  # at once: others write to the same place
    stream.flush()
def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.02)
"""


def alive(folder: Path) -> list[int]:
    """Processes that noted themselves, and still run."""
    found = []
    for path in (folder / "pids").glob("*"):
        try:
            os.kill(int(path.name), 0)
            state = Path(f"/proc/{path.name}/stat")
            if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(path.name))
        except ProcessLookupError:
            pass
    return found


def wait_for(condition) -> bool:
    deadline_s = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


def done(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def interrupt(process: subprocess.Popen[str], folder: Path, number: signal.Signals, count: int = 2) -> None:
    """Sends the launcher a signal when `count` workers have said that they are ready."""
    assert wait_for(lambda: len(list(folder.glob("ready-*"))) == count)
    process.send_signal(number)
