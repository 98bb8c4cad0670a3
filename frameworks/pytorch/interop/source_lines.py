"""The script's line that asks for something, as errors and notes name it."""

import contextlib
import os
import sys
from types import CodeType
from typing import Any

import torch

from trainingcompiler import errors, frameworks

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = tuple(os.path.dirname(module.__file__) + os.sep for module in (frameworks, errors))


def user_line(until: CodeType | None = None) -> str | None:
    """The innermost line on the stack that is neither torch's nor ours, as `"train.py:88"`.

    Args:
        until: Where to stop looking, from the inside out; None looks at the whole stack.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        filename = frame.f_code.co_filename
        if not filename.startswith((_TORCH, *_HERE, contextlib.__file__, "<")):
            return f"{os.path.basename(filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return None
