"""The error that ends a worker, written where its launcher shows it: once, last, and with the rank.

Of several workers all fail when one does, in any order on the console. A launcher that looks after them names a file
for each, and shows the first error at the end; so a worker that is given a file does not show its error itself.
"""

import contextlib
import json
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

from trainingcompiler.config import FAILURE

_TORCHS = "TORCHELASTIC_ERROR_FILE"  # the same, from torch's agent

_path: Path | None = None


def begin(environ: MutableMapping[str, str]) -> None:
    """Takes note of the file this worker was given; processes that it starts have none."""
    global _path
    given = environ.pop(FAILURE, None)
    _path = Path(given) if given else None


def are_told_elsewhere() -> bool:
    """Whether somebody waits for the error of this process."""
    return _path is not None or _TORCHS in os.environ


def tell(text: str, error: BaseException | None = None) -> bool:
    """Hands the error to whoever looks after this worker.

    Args:
        text: As Python shows it.
        error: The exception, where it was one of the script's.

    Returns:
        Whether it will be shown; if not, that is left to the caller.
    """
    if _path is None:
        if _TORCHS in os.environ and error is not None:
            _tell_torch(Path(os.environ[_TORCHS]), text, error)
        return False
    with contextlib.suppress(OSError):  # the launcher is gone, and its folder with it
        _write(_path, text)
        return True
    return False


def _tell_torch(path: Path, text: str, error: BaseException) -> None:
    if path.exists():  # the script's own, from torch's `record`
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    with contextlib.suppress(OSError):
        _write(path, json.dumps({"message": message}))


def _write(path: Path, text: str) -> None:
    """Whole or not at all: somebody is looking."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)
