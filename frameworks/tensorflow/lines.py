"""The script's line that an operation of a graph is of."""

import functools
import os
import sysconfig
from typing import Any

import tensorflow as tf


def line_of(operation: Any) -> str | None:
    """The innermost line of the traceback that is the script's own: of no package, and of neither Python nor us."""
    for frame in reversed(getattr(operation, "traceback", None) or ()):
        if not frame.filename.startswith(("<", *_foreign_folders())):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return None


@functools.cache
def _foreign_folders() -> tuple[str, ...]:
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    packages = [os.path.dirname(os.path.dirname(tf.__file__)), sysconfig.get_paths()["stdlib"]]
    return (ours, *packages)
