"""Whether this thread is running torch code for us, so that nothing it does is recorded."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


class _Depth(threading.local):
    value = 0


_depth = _Depth()


def in_passthrough() -> bool:
    """Whether `passthrough` is entered in this thread, or torch itself traces: `torch.compile`, `torch.jit.trace`."""
    return torch.compiler.is_dynamo_compiling() or _depth.value > 0 or torch._C._is_tracing()


@contextlib.contextmanager
def passthrough() -> Iterator[None]:
    """Lets torch run as if nobody watched."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def outside_transforms() -> contextlib.AbstractContextManager:
    """Leaves `torch.func`'s transforms and inference mode for a while.

    What is computed inside of a transform belongs to it. Memory that is made in inference mode never has a gradient,
    and a parameter may be given it.
    """
    if torch.is_inference_mode_enabled():
        return _outside_inference_mode()
    if torch._C._functorch.peek_interpreter_stack() is None:
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), outside_transforms():
        yield


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Ends `passthrough` for a while: a signal handler of the script may come while torch runs for us."""
    depth, _depth.value = _depth.value, 0
    try:
        yield
    finally:
        _depth.value = depth
