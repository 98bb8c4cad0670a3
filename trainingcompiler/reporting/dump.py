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

    def __call__(self, event: events.Event) -> None:
        """Writes one stage. A program that comes to a stage again is another program of that name."""
        if not isinstance(event, events.StageReached):
            return
        folder, stages = self._written.get(event.program, (self._folder, {event.stage}))
        if event.stage in stages:
            self._count += 1
            folder, stages = self._folder / f"{self._count:03}-{_plain(event.program)}", set()
            self._written[event.program] = folder, stages
        stages.add(event.stage)
        path = folder / f"{len(stages)}-{_plain(event.stage)}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, (event.text() + "\n").encode())
        except OSError as error:  # a full disk is no reason for a training to fail
            events.emit(events.Note(text=f"{path} was not written: {error}"))


def begin(folder: str) -> Callable[[], None]:
    """Writes the stages of all programs from now on; returns what ends it."""
    path, worker = Path(folder).expanduser().absolute(), rendezvous.current()
    return events.subscribe(Dump(path if worker is None else path / f"worker-{worker.rank}"))


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
