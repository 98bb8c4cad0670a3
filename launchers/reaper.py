"""A process that outlives a launcher which was killed, only to end what it had started."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

_ALL_IS_WELL = b"done\n"  # no group's id ends like this


@contextlib.contextmanager
def guarding(folder: str) -> Iterator[Callable[[int], None]]:
    """Kills process groups, and removes a folder, if this process ends before the block does, even by SIGKILL.

    A worker could ask the kernel to die with its parent, but not for its own children.

    Args:
        folder: Files of the launcher's own.

    Yields:
        The function that is told of each group, by its id.
    """
    reading, writing = os.pipe()
    guardian = os.fork()
    if guardian == 0:
        try:
            os.close(writing)
            _guard(reading, folder)
        finally:
            os._exit(0)  # nothing that the launcher has registered is to run here
    os.close(reading)
    try:
        yield lambda group: _write(writing, f"{group}\n".encode())
    finally:
        _write(writing, _ALL_IS_WELL)
        os.close(writing)
        os.waitpid(guardian, 0)


def _write(descriptor: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # somebody killed the guardian
        os.write(descriptor, content)


def _guard(reading: int, folder: str) -> None:
    os.setsid()  # Ctrl-C in the terminal is the launcher's
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    told = b""
    while content := os.read(reading, 4096):  # returns nothing once the launcher is gone, however it went
        told += content
    if told.endswith(_ALL_IS_WELL):
        return
    for group in told.split():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(int(group), signal.SIGKILL)
    # And one that the launcher had just started, and not come to tell of.
    for process in _started_with(folder):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _started_with(folder: str) -> list[int]:
    """Processes that were started with an environment that names the folder, as workers are; Linux shows it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
    return [process for process in found if process != os.getpid()]
