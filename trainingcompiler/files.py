"""Files that are there whole, or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes plain data whole, and makes its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file to a temporary name beside `path`, and renames it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:  # a full disk, which should not be left fuller
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
