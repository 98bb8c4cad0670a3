"""Whether this thread is running torch code for us, so that nothing it does is recorded."""

import contextlib
import threading
from collections.abc import Iterator

import torch


class _Depth(threading.local):
    value = 0


_depth = _Depth()


def is_replaying() -> bool:
    """Whether `undeferred` is entered in this thread, or `torch.compile` reads the code that asks."""
    return torch.compiler.is_dynamo_compiling() or _depth.value > 0


@contextlib.contextmanager
def undeferred() -> Iterator[None]:
    """Lets torch run as if nobody watched."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1
