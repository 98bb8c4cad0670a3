"""Files that are there whole, or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes plain data to a temporary name beside `path`, makes its folder where there is none, and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:  # a full disk, which should not be left fuller
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
