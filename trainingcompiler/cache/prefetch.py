"""Executables loaded while the script is getting ready: those that its last run began with.

A second start knows which program it will run only when the first step has been captured. Until then the script imports
its framework, makes its model and reads its data, which takes seconds; loading GPT-2 small's executable takes 0.8 s.
"""

import contextlib
import functools
import hashlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from trainingcompiler.files import write_whole

LIST = "-began"  # the suffix of the file that names the entries which a run began with, one a line
_MOST = 4  # programs of a usual run: one or two kinds of step, an evaluation, a last and smaller batch


class ExecutablePrefetcher:
    """What one script begins with.

    Loading goes on in a thread of its own. A fork waits for it, as the child would inherit what it has locked.

    Args:
        folder: Where the entries are.
        surroundings: Whatever else than the script decides which entries it is going to use.
        load: Loads an entry by its path; None, or an exception, where it cannot be.
    """

    def __init__(self, folder: Path, surroundings: Iterable[Any], load: Callable[[Path], Any]):
        script = getattr(sys.modules.get("__main__"), "__file__", None)
        parts = [os.path.realpath(script or ""), *surroundings]
        name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:40]
        self._list = folder / f"{name}{LIST}" if script else None  # a prompt or notebook begins with anything
        self._load = load
        self._used: list[str] = []
        self._loading: dict[str, Future] = {}
        self._process = os.getpid()

    def begin(self) -> None:
        """Begins to load what the last run used first."""
        paths = [path for path in self._listed() if path.is_file()]
        if paths:
            self._loading = {path.name: Future() for path in paths}
            futures = dict(zip(paths, self._loading.values(), strict=True))
            threading.Thread(target=self._load_all, args=(futures,), name="trainingcompiler loading").start()
            _begun.add(self)
            _watch_forks()

    def _listed(self) -> list[Path]:
        if self._list is None:
            return []
        try:
            names = self._list.read_text(encoding="utf-8").splitlines()
            os.utime(self._list)
        except (OSError, UnicodeDecodeError):
            return []
        return [self._list.parent / name for name in names[:_MOST] if Path(name).name == name]

    def _load_all(self, futures: Mapping[Path, Future]) -> None:
        for path, future in futures.items():
            if not threading.main_thread().is_alive():
                return  # a script that ends at once (`--help`) has waited for one entry, which is enough
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._load(path))
                except Exception as error:
                    future.set_exception(error)

    def take(self, path: Path) -> Any:
        """What has been loaded of an entry, waiting for it where it is being loaded; None if nothing has been."""
        found = self._loading.pop(path.name, None)
        if found is None or found.cancel() or found.exception() is not None:
            return None
        return found.result()

    def used(self, path: Path) -> None:
        """Notes that this run has used an entry, for the next one to begin with."""
        if self._list is None or path.name in self._used or len(self._used) == _MOST or os.getpid() != self._process:
            return
        self._used.append(path.name)
        with contextlib.suppress(OSError):  # the next run takes longer to begin, and the entry itself was told of
            write_whole(self._list, "".join(f"{name}\n" for name in self._used).encode())

    def end(self) -> None:
        """Loads no further entry, and returns when none is being loaded."""
        for future in [future for future in self._loading.values() if not future.cancel()]:
            future.exception()


_begun: weakref.WeakSet[ExecutablePrefetcher] = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(before=_end_all)  # for the life of the process


def _end_all() -> None:
    for ahead in _begun:
        ahead.end()
