"""What one call will return, found once by running it on stand-ins."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainingcompiler.frameworks.pytorch import tensor_hooks
from trainingcompiler.frameworks.pytorch.capture import unchanged_host
from trainingcompiler.frameworks.pytorch.structure import Structure, flatten
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot, replay
from trainingcompiler.frameworks.pytorch.twins import Twins


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call returns.

    Attributes:
        structure: Of the result.
        leaves: The result's leaves: an `Output`, an `Argument`, or the value itself.
        metas: A fake tensor for each distinct tensor that the call makes.
        writes: Positions of the leaves that the call writes to.
        random: Whether the call draws random numbers.
        closure: Refers to the tensors, other than state, that the call reads without being given them.
    """

    structure: Structure
    leaves: tuple[Any, ...]
    metas: tuple[torch.Tensor, ...]
    writes: tuple[int, ...]
    random: bool
    closure: tuple[weakref.ref, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """The call's `index`-th tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class Argument:
    """The tensor that the call got as its leaf number `position`."""

    position: int


def plan(entry: Entry, gradients_exist: bool) -> Plan:
    """Runs an entry on stand-ins.

    Args:
        entry: The call; its outputs are not known yet.
        gradients_exist: Whether to give every leaf that requires one a `.grad`, as for a call that clips them.

    Returns:
        What the call returns.

    Raises:
        Exception: Whatever the call raises.
    """
    twins = Twins()
    twins.device = entry.device
    arguments: dict[int, torch.Tensor] = {}

    def resolve(leaf: Any, position: int) -> Any:
        if isinstance(leaf, Slot):
            fake = twins.fake_like(tuple(leaf.meta.shape), leaf.meta.dtype, leaf.meta.stride(), leaf.meta.requires_grad)
            arguments[position] = fake.clone() if leaf.meta.requires_grad else fake
        elif isinstance(leaf, Input):
            arguments[position] = twins.fake_like(leaf.shape, leaf.dtype)
        elif isinstance(leaf, torch.Tensor):
            arguments[position] = twin = twins.twin(leaf)
            if gradients_exist and twin.requires_grad:
                with torch._C.DisableTorchFunction():
                    twin.grad = twins.fake_like(twin.shape, twin.dtype)
        else:
            return leaf
        return arguments[position]

    with unchanged_host([entry]), twins.recording():
        twins.recorder.seed_with(twins.fake_like((), torch.int64))
        result = replay(entry, resolve)
        written = tuple(position for position, fake in arguments.items() if twins.recorder.was_written(fake))
    leaves, structure = flatten(result)
    positions = {id(fake): position for position, fake in arguments.items()}
    metas: dict[int, tuple[int, torch.Tensor]] = {}
    planned: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            planned.append(leaf)
        elif id(leaf) in positions:
            planned.append(Argument(positions[id(leaf)]))
        else:
            index, _ = metas.setdefault(id(leaf), (len(metas), leaf))
            planned.append(Output(index))
    return Plan(
        structure=structure,
        leaves=tuple(planned),
        metas=tuple(_cut(twins, meta) for _, meta in metas.values()),
        writes=written,
        random=any(node.seed is not None for node in twins.recorder.graph.nodes),
        closure=_closure(entry, twins),
    )


def _closure(entry: Entry, twins: Twins) -> tuple[weakref.ref, ...]:
    state = set(map(id, entry.function.buffers())) if isinstance(entry.function, nn.Module) else set()
    state |= {id(tensor_hooks.real_gradient(real)) for real in twins.lifted if real.is_leaf}
    return tuple(
        weakref.ref(real)
        for real in twins.lifted
        if not real.requires_grad
        and not isinstance(real, nn.Parameter)
        and id(real) not in state
        and not twins.recorder.was_written(twins.twin(real))
    )


def _cut(twins: Twins, fake: torch.Tensor) -> torch.Tensor:
    """A fake tensor like `fake` that does not keep the graph behind it alive."""
    with twins.fake_mode:
        empty = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        with torch.enable_grad():
            return empty.requires_grad_().clone() if fake.requires_grad else empty
