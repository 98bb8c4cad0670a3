"""`--dump DIR`: every stage of every program, written as text where a person can read and compare it."""

import re
from collections.abc import Callable
from pathlib import Path

from trainingcompiler.files import write_whole
from trainingcompiler.processes import rendezvous
from trainingcompiler.reporting import events


class Dump:
    """Writes the stages of programs, each program into a folder of its own, numbered in the order of their making.

    Args:
        folder: Where to. It is made where there is none.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._count = 0
        self._written: dict[str, tuple[Path, set[str]]] = {}  # by program: its folder, and the stages in it

    def write(self, program: str, stage: str, text: str) -> None:
        """Writes one stage. A program that comes to a stage again is another program of that name."""
        folder, stages = self._written.get(program, (self._folder, {stage}))
        if stage in stages:
            self._count += 1
            folder, stages = self._folder / f"{self._count:03}-{_plain(program)}", set()
            self._written[program] = folder, stages
        stages.add(stage)
        path = folder / f"{len(stages)}-{_plain(stage)}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, (text + "\n").encode())
        except OSError as error:  # a full disk is no reason for a training to fail
            events.emit(events.Note(text=f"{path} was not written: {error}"))


_dump: Dump | None = None


def begin(folder: str) -> Callable[[], None]:
    """Writes the stages of all programs from now on; returns what ends it."""
    global _dump
    path, worker = Path(folder).expanduser().absolute(), rendezvous.current()
    _dump = Dump(path if worker is None else path / f"worker-{worker.rank}")
    return _end


def stage(program: str, name: str, text: Callable[[], str]) -> None:
    """Notes that a program has come to a stage of its making.

    Args:
        program: Its name.
        name: "tape", "graph", "graph after PASS", "cache key", "stablehlo" or "hlo".
        text: What it is at that stage; not called, and not kept, unless somebody wants it written.
    """
    if _dump is not None:
        _dump.write(program, name, text())


def _end() -> None:
    global _dump
    _dump = None


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
