"""Which checkpointed block the script's Python is in: what `torch.utils.checkpoint` computes again in backward.

Eager runs a block's Python a second time there, and so does a recorded step (`backward_python`): each call is compared
with the first run's, and answered with what that has answered. From the first call on that differs, as where a block
draws Python's random numbers, the second run has entries of its own, and torch runs the step, with those in backward.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input

_CHECKPOINT = "_checkpoint_hook.__init__.<locals>.pack_hook"


@dataclass(eq=False, slots=True)
class Block:
    """One run of a checkpointed block in forward.

    Attributes:
        tape: The tape at its beginning.
        depth: How many calls of modules it is in.
        again: Runs its Python a second time; None where that is not known.
        is_reentrant: Whether torch would run that to its end.
        has_inner: Whether there is another block in it, or around it: which runs how often is torch's to know.
    """

    tape: Any
    depth: int
    again: Callable[[], None] | None = None
    is_reentrant: bool = False
    has_inner: bool = False


@contextlib.contextmanager
def begun(session: Any) -> Iterator[Block]:
    """Notes that a block begins here, and ends with the context."""
    block = Block(session.tape, session.depth)
    for other in session.open_blocks:
        other.has_inner = block.has_inner = True
    session.open_blocks.append(block)
    try:
        yield block
    finally:
        session.open_blocks.remove(block)


def noting(session: Any, original: Callable) -> Callable:
    """torch's generator around a block that is not reentrant, which notes the block."""

    def generator(function: Callable, *args: Any, **kwargs: Any) -> Iterator[None]:
        with contextlib.nullcontext() if session.is_unwatched() else begun(session):
            yield from original(function, *args, **kwargs)

    return generator


def region_of(session: Any) -> int:
    """The number of the checkpointed block, counted on the tape; 0 outside of any.

    Raises:
        CaptureError: Somebody else's hooks want to see what autograd saves.
    """
    tape = session.tape
    if tape.region:
        return tape.region
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return 0
    pack = hooks[0]
    if getattr(pack, "__qualname__", "") != _CHECKPOINT:
        raise CaptureError("saved_tensors_hooks look at what autograd saves", user_line())
    if tape.block is not pack:
        tape.block = pack
        frame = pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents
        begin_region(session, lambda: frame.recompute_fn(*frame.get_inputs()))
    return tape.region_count


def begin_region(session: Any, again: Callable[[], None], is_reentrant: bool = False) -> int:
    """Gives the innermost block a number on the tape, and notes how its Python runs a second time."""
    tape = session.tape
    tape.region_count += 1
    block = session.open_blocks[-1] if session.open_blocks else None
    if block is not None and block.tape is tape:
        block.again, block.is_reentrant = again, is_reentrant
        tape.blocks[tape.region_count] = block
    return tape.region_count


def run_again(function: Callable, args: tuple) -> Callable[[], None]:
    """How the Python of a block of the reentrant kind, which begins now, runs a second time."""
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()

    def again() -> None:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
            torch.set_rng_state(state)
            function(*args)

    return again


class SecondRun:
    """What is known of a block while its Python runs again.

    Attributes:
        region: The block's number.
        matched: How many calls were those of the first run.
        differs: Whether one was another.

    Args:
        region: Likewise.
        entries: What the first run has put on the tape.
        stop: How many of them autograd needs: torch stops the Python in the last one. -1: it does not.
    """

    def __init__(self, region: int, entries: list[Entry], stop: int):
        self.region, self.matched, self.differs = region, 0, False
        self._entries, self._stop, self._count = entries, stop, 0

    def repeated(self, function: Callable, given: list[Any], structure: Any) -> Entry | None:
        """The entry of the first run that a call repeats; None if it is another call."""
        if self.differs or self.matched >= len(self._entries):
            self.differs = True
            return None
        entry = self._entries[self.matched]
        if entry.function != function or entry.structure != structure or not all(map(_same, given, entry.leaves)):
            self.differs = True
            return None
        self.matched += 1
        return entry

    def called(self) -> None:
        """A call has been answered.

        Raises:
            _StopRecomputationError: torch's: it is the last one that autograd needs.
        """
        self._count += 1
        if self._count == self._stop:
            raise torch.utils.checkpoint._StopRecomputationError


def _same(leaf: Any, first: Any) -> bool:
    if isinstance(leaf, DeferredTensor) and not leaf.slot.committed:
        return leaf.slot is first
    if isinstance(leaf, torch.Tensor):
        if type(first) is not Input:
            return leaf is first
        value = leaf.slot.value if isinstance(leaf, DeferredTensor) else leaf
        known = np.asarray(first.array)
        return known.shape == tuple(value.shape) and np.array_equal(known, numpy_view(value), equal_nan=False)
    if isinstance(leaf, float):
        return type(first) is float and (leaf == first or (math.isnan(leaf) and math.isnan(first)))
    return leaf is first or (type(leaf) is type(first) and leaf == first)
