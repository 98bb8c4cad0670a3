"""Where the output of workers goes: straight through, with the rank in front, into files, or nowhere."""

import os
import re
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO

from trainingcompiler.cli.job import Job

_NAMES = {1: "stdout", 2: "stderr"}
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r(?!\n)|\n)")  # a progress bar ends its lines with \r
_CHUNK = 2**16
_LAST_WORDS_S = 2.0


class Output:
    """The streams of one host's workers.

    Without `--tee` and `--log-dir` they are the launcher's own, so that a terminal is one for them as well. With
    `--log-dir` everything is written to `FOLDER/NAME_TIME/attempt_N/RANK/stdout.log` and `stderr.log`, and shown with
    the rank in front, as far as `--tee` says; both streams where it says nothing.
    """

    def __init__(self, job: Job) -> None:
        self._shown_ranks = job.local_ranks_filter
        self.folder: Path | None = None
        if job.log_dir is not None:
            self.folder = Path(job.log_dir) / f"{job.name}_{datetime.now():%Y%m%d-%H%M%S}_{os.getpid()}"
        self._prefixed = job.tee if job.tee is not None else frozenset((1, 2) if self.folder else ())
        self._lock = threading.Lock()
        self._relays: list[threading.Thread] = []

    def start(self, command: list[str], environment: dict[str, str], rank: int, attempt: int) -> subprocess.Popen:
        """Starts a worker in a process group of its own, its streams where they belong."""
        plans = {stream: self._plan(stream, rank, attempt) for stream in _NAMES}
        given: dict[str, Any] = {_NAMES[stream]: where for stream, (where, _) in plans.items()}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **given)
        for stream, (where, file) in plans.items():
            pipe: IO[bytes] | None = getattr(process, _NAMES[stream])
            if pipe is not None:
                console = (sys.stdout if stream == 1 else sys.stderr).buffer
                self._relay(pipe, console, file, f"[rank{rank}]: ".encode())
            elif not isinstance(where, int | None):
                where.close()
        return process

    def _plan(self, stream: int, rank: int, attempt: int) -> tuple[Any, Any]:
        """What `Popen` is given for a stream, and the file it is copied to."""
        is_shown = self._shown_ranks is None or rank in self._shown_ranks
        file = None
        if self.folder is not None:
            place = self.folder / f"attempt_{attempt}" / str(rank)
            place.mkdir(parents=True, exist_ok=True)
            file = (place / f"{_NAMES[stream]}.log").open("ab", buffering=0)
        if not is_shown or (file is not None and stream not in self._prefixed):
            return (subprocess.DEVNULL if file is None else file), None
        return (subprocess.PIPE, file) if stream in self._prefixed else (None, None)

    def _relay(self, pipe: IO[bytes], console: BinaryIO, file: Any, prefix: bytes) -> None:
        def run() -> None:
            rest = b""
            with pipe:
                while chunk := os.read(pipe.fileno(), _CHUNK):
                    if file is not None:
                        file.write(chunk)
                    rest += chunk
                    lines = _LINE.findall(rest)
                    rest = rest[sum(map(len, lines)) :]
                    self._show(console, b"".join(prefix + line for line in lines))
            if rest:
                self._show(console, prefix + rest + b"\n")
            if file is not None:
                file.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._relays.append(thread)

    def _show(self, console: BinaryIO, content: bytes) -> None:
        with self._lock:
            try:
                console.write(content)
                console.flush()
            except (OSError, ValueError):
                pass  # nobody reads any more; the workers go on, and so do their files

    def finish(self) -> None:
        """Waits until what the workers have said is shown."""
        for relay in self._relays:
            relay.join(_LAST_WORDS_S)
        self._relays.clear()
