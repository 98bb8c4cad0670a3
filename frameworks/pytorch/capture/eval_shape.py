"""Makes a `CallShape`: runs one call on fake tensors, without values."""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.fake_mode import FakeTensors
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.tape.call_shape import Argument, CallShape, Output
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Geometry, Input, Slot
from trainingcompiler.frameworks.pytorch.tape.replay import replay

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def call_shape(entry: Entry, gradients_exist: bool) -> CallShape:
    """Runs an entry on fake tensors.

    Args:
        entry: The call; its outputs are not known yet.
        gradients_exist: Whether to give every leaf that requires one a `.grad`, as for a call that clips them.

    Returns:
        What the call returns.

    Raises:
        Exception: Whatever the call raises.
    """
    fake_tensors = FakeTensors()
    fake_tensors.device = entry.device
    arguments: dict[int, torch.Tensor] = {}
    same: dict[Any, torch.Tensor] = {}

    def resolve(leaf: Any, position: int) -> Any:
        if type(leaf) is Slot:
            if leaf not in same:
                meta = leaf.meta
                fake = fake_tensors.fake_like(tuple(meta.shape), meta.dtype, meta.stride())
                same[leaf] = with_gradient(fake) if meta.requires_grad else fake
            arguments[position] = same[leaf]
        elif type(leaf) is Input:
            if leaf not in same:
                same[leaf] = fake_tensors.fake_like(leaf.shape, leaf.dtype, leaf.strides)
            arguments[position] = same[leaf]
        elif isinstance(leaf, torch.Tensor):
            arguments[position] = fake = fake_tensors.fake(leaf)
            if gradients_exist and fake.requires_grad:
                with torch._C.DisableTorchFunction():
                    fake.grad = fake_tensors.fake_like(fake.shape, fake.dtype)
        else:
            return leaf
        return arguments[position]

    # Run it, on fake tensors of the leaves' shapes: the same one wherever the same leaf is given twice.
    with fake_tensors.recording():
        fake_tensors.recorder.seed_with(fake_tensors.fake_like((), torch.int64))
        result = replay(entry, resolve)
        written = tuple(position for position, fake in arguments.items() if fake_tensors.recorder.was_written(fake))
        gains = tuple(p for p in written if arguments[p].requires_grad and not _had_history(entry.leaves[p]))
    # What it returns is a new tensor, an argument handed back, or a plain value.
    leaves, structure = flatten(result)
    positions = {id(fake): position for position, fake in reversed(arguments.items())}
    storages = {fake.untyped_storage()._cdata: position for position, fake in reversed(arguments.items())}
    metas: dict[int, tuple[int, torch.Tensor]] = {}
    distinct: dict[int, int] = {}
    found: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            if not isinstance(leaf, _PLAIN):
                raise CaptureError(f"{entry.function} returns a {type(leaf).__name__}", user_line())
            found.append(leaf)
            continue
        distinct.setdefault(id(leaf), len(distinct))
        real = fake_tensors.fake(leaf)  # a state tensor that is handed back is the real one
        if id(real) in positions:
            found.append(Argument(positions[id(real)]))
        else:
            index, _ = metas.setdefault(id(leaf), (len(metas), leaf))
            found.append(Output(index))
    # Of new tensors: which are the same, and which lie in an argument's memory.
    fresh = tuple(distinct[id(meta)] for _, meta in metas.values())
    views = tuple(storages.get(meta.untyped_storage()._cdata, -1) for _, meta in metas.values())
    results = tuple(_cut(fake_tensors, meta) for _, meta in metas.values())
    return CallShape(
        structure=structure,
        leaves=tuple(found),
        metas=results,
        geometries=tuple(map(Geometry.of, results)),
        fresh=fresh,
        writes=written,
        views=views,
        has_views=any(position >= 0 for position in views),
        random=any(node.seed is not None for node in fake_tensors.recorder.graph.nodes),
        gains=gains,
        is_single=structure.kind is None and isinstance(found[0], Output),
    )


def _cut(fake_tensors: FakeTensors, fake: torch.Tensor) -> torch.Tensor:
    """A fake tensor like `fake` that does not keep the graph behind it alive."""
    with fake_tensors.fake_mode:
        empty = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
    return with_gradient(empty) if fake.requires_grad else empty


def _had_history(leaf: Any) -> bool:
    return type(leaf) is not Input and leaf.requires_grad


_grown: Any = WeakIdKeyDictionary()


def gain_history(slot: Slot) -> None:
    """Notes that something with a gradient has been written to a result's memory, as torch tells of it from then on."""
    if slot.meta not in _grown:
        _grown[slot.meta] = with_gradient(slot.meta)
    slot.meta, slot.requires_grad = _grown[slot.meta], True
    slot.geometry = slot.geometry._replace(requires_grad=True)


def with_gradient(fake: torch.Tensor) -> torch.Tensor:
    """A fake tensor like another one, of the same strides, that is computed from something that is trained."""
    with passthrough(), torch.enable_grad(), fake.fake_mode:  # type: ignore[attr-defined]
        return _Computed.apply(torch.empty((), requires_grad=True), fake)


class _Computed(torch.autograd.Function):
    """Gives a tensor a history; a clone of one whose elements do not lie side by side would have other strides."""

    @staticmethod
    def forward(ctx: Any, trained: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise AssertionError("nobody differentiates what only has a shape")
