"""Runs entries of a tape again: with torch's modes and the hyperparameters of the call, and with backward's Python."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.interop.pytree import flatten, unflatten
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Slot


def replay(entry: Entry, resolve: Callable[[Any, int], Any], piece: Any = None) -> Any:
    """Runs an entry again.

    Args:
        entry: What to run.
        resolve: `(leaf, position)` to the value to pass in its place.
        piece: What backward is to run, for an entry that puts something of it into the graph.

    Returns:
        What the entry's function returns.
    """
    leaves = [resolve(leaf, position) for position, leaf in enumerate(entry.leaves)]
    args, kwargs = unflatten(entry.structure, iter(leaves))
    with entry.modes.around():
        if getattr(entry.function, "takes_piece", False):
            return entry.function(piece, *args, **kwargs)
        return entry.function(*args, **kwargs)


@contextlib.contextmanager
def as_called(entry: Entry) -> Iterator[None]:
    """Gives the optimizers that an entry steps the hyperparameters that they had at the call."""
    with contextlib.ExitStack() as stack:
        for optimizer, groups in zip(entry.optimizers, entry.groups, strict=False):
            stack.enter_context(with_groups(optimizer, groups))
        yield


@contextlib.contextmanager
def with_groups(optimizer: torch.optim.Optimizer, groups: list[dict]) -> Iterator[None]:
    """Gives an optimizer the hyperparameters of an earlier moment for a while."""
    now = [dict(group) for group in optimizer.param_groups]
    if len(now) != len(groups) or all(map(_same_items, now, groups)):
        yield
        return
    for group, then in zip(optimizer.param_groups, groups, strict=True):
        group.update(then)
    try:
        yield
    finally:
        for group, later in zip(optimizer.param_groups, now, strict=True):
            group.update(later)


def _same_items(one: dict, other: dict) -> bool:
    return len(one) == len(other) and all(name in one and one[name] is value for name, value in other.items())


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The distinct tensors in a call's result, in order; they correspond to `Entry.outputs`."""
    leaves, _ = flatten(result)
    distinct = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return list(distinct.values())


def results_of(entry: Entry, result: Any) -> list[torch.Tensor]:
    """The tensors of a call's result that `Entry.outputs` stand for: those that are not arguments handed back."""
    tensors = tensors_in(result)
    shape = None if entry.call is None else entry.call.shape
    return tensors if shape is None else [tensors[index] for index in shape.fresh if index < len(tensors)]


@dataclass(slots=True)
class Part:
    """What one piece of backward's Python has asked torch for, on the tape behind its backward.

    Attributes:
        piece: Likewise.
        given: The slots of the gradients that it was given.
        positions: Of which of its results those are the gradients.
        calls: Indices of the entries in between.
        returned: The leaves of the gradients that it has returned; None while it is still running.
        end: The index of the entry that has them.
    """

    piece: Any
    given: list[Slot]
    positions: tuple[int, ...]
    calls: list[int] = field(default_factory=list)
    returned: list[Any] | None = None
    end: int = -1


def parts_of(entries: list[Entry], backward: int) -> list[Part]:
    """The pieces of Python that the backward at an index runs, in order."""
    found: list[Part] = []
    for index in range(backward + 1, len(entries)):
        entry = entries[index]
        if not entry.is_in_backward:
            break
        if entry.second is not None:
            continue
        if entry.piece is not None and entry.outputs and entry.function.__name__ == "incoming":
            found.append(Part(entry.piece, entry.outputs, entry.leaves[-1]))
        elif entry.piece is not None and entry.function.__name__ == "outgoing":
            found[-1].returned, found[-1].end = entry.leaves, index
        else:
            found[-1].calls.append(index)
    return found


def again_of(entries: list[Entry], start: int, end: int) -> list[int]:
    """The indices of what the checkpointed block at `entries[start:end]` computes when it runs again."""
    others = [i for i, entry in enumerate(entries) if entry.second and entry.second[0] == entries[start].region]
    return [*range(start, start + entries[others[0]].second[1]), *others] if others else list(range(start, end))


class ReplayedPiece:
    """Stands for a piece of backward's Python while torch, or a capture, runs the tape."""

    _suspended: tuple[torch.Tensor, Any] | None = None

    def suspend(self, leaf: torch.Tensor) -> None:
        """Takes a parameter's own hooks away: they have run when the tape was written."""
        self._suspended = leaf, leaf._backward_hooks
        leaf._backward_hooks = None

    def resume(self) -> None:
        """Gives them back."""
        if self._suspended is not None:
            leaf, hooks = self._suspended
            leaf._backward_hooks = hooks
            self._suspended = None


def copied(entry: Entry, **changes: Any) -> Entry:
    """An entry like another one."""
    return dataclasses.replace(entry, **changes)
