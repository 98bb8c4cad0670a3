"""What a step would need in plain PyTorch: the tape replayed on stand-ins, every allocation counted, none made."""

import contextlib
import functools
import weakref
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainingcompiler.frameworks.pytorch.capture import optimizers
from trainingcompiler.frameworks.pytorch.capture.fake_mode import FakeTensors
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot
from trainingcompiler.frameworks.pytorch.tape.replay import replay, results_of

_BLOCK = 512  # bytes: what torch's allocator for CUDA rounds to


def peak_bytes(entries: list[Entry]) -> int:
    """The most bytes that PyTorch would hold at once while it runs entries, state included: an estimate.

    What is counted is storages, from when an operator makes one until nobody refers to it, as in
    `torch.distributed._tools.mem_tracker`. Not counted are workspaces of libraries, fragmentation, and the driver's
    context. Attention is counted as the fused kernel that a GPU has, with or without dropout; an optimizer as its
    fused kernel.

    Args:
        entries: A whole step, as for `capture`; optimizers have their state.

    Raises:
        CaptureError: The entries cannot be replayed.
    """
    counter = _Counter()
    fake_tensors = _CountedFakeTensors(counter)
    values: dict[Any, torch.Tensor] = {}
    last_reader = {leaf: index for index, entry in enumerate(entries) for leaf in entry.slots()}

    def resolve(leaf: Any, _: int) -> Any:
        if isinstance(leaf, Slot | Input):
            if leaf not in values:
                shape = leaf.shape if isinstance(leaf, Input) else tuple(leaf.meta.shape)
                values[leaf] = fake_tensors.fake_like(shape, leaf.dtype if isinstance(leaf, Input) else leaf.meta.dtype)
            return values[leaf]
        return leaf

    for state in _state(entries):
        fake_tensors.fake(state)
    try:
        for index, entry in enumerate(entries):
            with fake_tensors.recording(), contextlib.ExitStack() as prepared:
                for optimizer in entry.optimizers:
                    prepared.enter_context(optimizers.traced(optimizer, lambda _, value: value, frozenset()))
                prepared.enter_context(fake_tensors.numbers_in_steps())
                result = replay(entry, resolve)
            values |= dict(zip(entry.outputs or (), results_of(entry, result), strict=False))
            del result
            # The loop holds what it still has a name for; the rest goes with its last reader.
            for slot in [slot for slot in values if isinstance(slot, Slot)]:
                if not slot.live and last_reader.get(slot, -1) <= index:
                    del values[slot]
    finally:
        for entry in entries:
            for optimizer in entry.optimizers:
                optimizers.drop_fake_state(optimizer)
    fake_tensors.let_go()
    return counter.peak_bytes


def _state(entries: list[Entry]) -> list[torch.Tensor]:
    """What there is before the step, whether or not the step reads it: a module's frozen layers, too."""
    found: list[Any] = []
    for entry in entries:
        for module in entry.modules:
            found += [*module.parameters(), *module.buffers()]
        for optimizer in entry.optimizers:
            found += [value for state in optimizer.state.values() for value in state.values()]
            found += optimizers.parameters_of(optimizer)
    return list({id(value): value for value in found if isinstance(value, torch.Tensor)}.values())


class _CountedFakeTensors(FakeTensors):
    """Stand-ins whose attention never needs the matrix of scores: PyTorch on a GPU drops out inside its kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            kwargs = {**(kwargs or {}), "dropout_p": 0.0}
            args = (*args[:4], *args[5:]) if len(args) > 4 else args
        return super().__torch_function__(func, types, args, kwargs)


class _Counter(TorchDispatchMode):
    """Counts the memory behind every tensor that is made while it is entered; in the place of a `FunctionalRecorder`.

    Attributes:
        peak_bytes: The most there was.
    """

    def __init__(self):
        super().__init__()
        self.peak_bytes = 0
        self._held_bytes = 0
        self._known: dict[int, weakref.ref] = {}
        self.draws = None  # random numbers take no seed here

    def add_input(self, fake: torch.Tensor) -> None:
        """Counts a tensor that nobody's operator has made."""
        self._count(fake)

    def value_of(self, fake: torch.Tensor) -> int:
        """Values have no numbers here."""
        return 0

    def seed_with(self, fake: torch.Tensor | None) -> None:
        """Random numbers take no seed here."""

    def emit(self, operator: str, args: tuple, kwargs: dict, outputs: list) -> None:
        """A fused kernel updates in place."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, list | tuple) else (result,):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        self._known[key] = weakref.ref(storage, functools.partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self._held_bytes -= size
