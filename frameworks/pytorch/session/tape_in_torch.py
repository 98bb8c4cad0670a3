"""Runs a tape in torch, with its gradient history: the fallback, and looks at a few calls."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD
from trainingcompiler.frameworks.pytorch.interop.passthrough import outside_transforms
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot
from trainingcompiler.frameworks.pytorch.tape.replay import (
    ReplayedPiece,
    again_of,
    as_called,
    parts_of,
    replay,
    results_of,
)


def run_in_torch(entries: list[Entry], blocks: Mapping[int, Callable[[], None] | None] | None = None) -> None:
    """Runs entries as torch would have, gradient history included, and gives their slots values.

    Args:
        entries: In order.
        blocks: How the Python of checkpointed blocks runs again in backward, by number; None where it has, so that
            what it has asked for is computed.
    """
    inputs: dict[Input, torch.Tensor] = {}
    pieces: dict[int, _Recorded] = {}

    values: dict[Slot, torch.Tensor] | None = None  # of a block that runs again

    def resolve(leaf: Any, _: int) -> Any:
        if type(leaf) is Slot:
            return leaf.value if values is None else values.get(leaf, leaf.value)
        if type(leaf) is Input:
            if leaf not in inputs:  # one tensor, if calls were given one
                inputs[leaf] = leaf.tensor()
            return inputs[leaf]
        return leaf

    def run(entry: Entry) -> None:
        piece = entry.piece and pieces.setdefault(id(entry.piece), _Recorded(entry.piece))
        with _surroundings(entry):
            results = results_of(entry, replay(entry, resolve, piece))
        if values is not None:
            values.update(zip(entry.outputs, results, strict=False))
            return
        for slot, tensor in zip(entry.outputs, results, strict=False):
            slot.value = tensor
            slot.committed = True

    def run_block(start: int, end: int) -> None:
        python, again, runs = blocks[entries[start].region], again_of(entries, start, end), [0]

        def compute() -> None:
            nonlocal values
            runs[0] += 1
            if runs[0] == 1:
                for entry in entries[start:end]:
                    run(entry)
            elif python is not None:
                python()
            else:
                values = {}
                try:
                    for index in again:
                        run(entries[index])
                finally:
                    values = None

        checkpoint(compute, use_reentrant=False, preserve_rng_state=False)

    ended = 0
    try:
        with outside_transforms():
            for index, entry in enumerate(entries):
                if entry.is_in_backward or index < ended:
                    continue
                if blocks and entry.region in blocks and entry.modes.grad:
                    ended = index + 1
                    while ended < len(entries) and entries[ended].region == entry.region:
                        ended += 1
                    run_block(index, ended)
                    continue
                if entry.function is BACKWARD:
                    for part in parts_of(entries, index):
                        if id(part.piece) in pieces:
                            pieces[id(part.piece)].queue.append((part, entries, run, resolve))
                run(entry)
    finally:
        for piece in pieces.values():
            piece.resume()


def _surroundings(entry: Entry) -> contextlib.AbstractContextManager:
    """What an entry was called in, besides torch's modes: hyperparameters of its optimizers, its random numbers."""
    if not entry.optimizers and entry.seed is None:
        return contextlib.nullcontext()
    return _as_called_then(entry)


@contextlib.contextmanager
def _as_called_then(entry: Entry) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_called(entry))
        if entry.seed is not None:
            gpus = [] if entry.device.type == "cpu" else [entry.device]
            stack.enter_context(torch.random.fork_rng(devices=gpus))
            torch.manual_seed(entry.seed)
        yield


class _Recorded(ReplayedPiece):
    """A piece of backward's Python in a graph of torch's: what it has done on the tape, and after that itself."""

    def __init__(self, piece: Any):
        self._piece = piece
        self.queue: list[tuple] = []

    def backward(self, gradients: Any) -> Any:
        if not self.queue:
            return self._piece.backward(gradients)
        part, entries, run, resolve = self.queue.pop(0)
        for slot, position in zip(part.given, part.positions, strict=True):
            slot.value, slot.committed = gradients[position], True
        for index in part.calls:
            run(entries[index])
        return part.piece.returned([resolve(leaf, 0) for leaf in part.returned or ()])
