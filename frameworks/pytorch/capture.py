"""Captures entries of a tape as one graph over named inputs."""

import contextlib
import copy
import functools
import operator
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch import first_steps, optimizers, tensor_hooks
from trainingcompiler.frameworks.pytorch.graph import Graph
from trainingcompiler.frameworks.pytorch.host import Place, attributes_of, frozen
from trainingcompiler.frameworks.pytorch.numbers import TracedNumber
from trainingcompiler.frameworks.pytorch.structure import flatten
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot, replay, tensors_in
from trainingcompiler.frameworks.pytorch.twins import Twins

_CONTAINERS = (list, dict, set)


@dataclass(frozen=True, slots=True, eq=False)
class Lifted:
    """A real tensor that the step reads, by identity.

    Attributes:
        tensor: Refers to the real tensor.
        gradient_of: Refers to the tensor whose `.grad` it was; a gradient is found again through it, not by identity.
        value: Its number when the step starts.
        new_value: Its number when the step ends; equal to `value` if the step does not write it.
    """

    tensor: weakref.ref
    gradient_of: weakref.ref | None
    value: int
    new_value: int


@dataclass(frozen=True, slots=True)
class NumberSource:
    """A Python number that the step reads: a leaf of an entry, an optimizer's hyperparameter, or a module's attribute.

    Attributes:
        entry: The index of the entry.
        position: The leaf's position, the path of the hyperparameter in the optimizer's `param_groups`, or the index
            of the number among those that the entry's modules read.
        optimizer: Refers to the optimizer, for a hyperparameter.
        host: Where the number is, if a module reads it.
    """

    entry: int
    position: Any
    optimizer: weakref.ref | None = None
    host: Place | None = None


@dataclass(slots=True)
class CapturedStep:
    """Entries as a graph.

    Attributes:
        graph: The functional ATen graph.
        lifted: The real tensors it reads and writes.
        leaves: `(entry index, leaf position, value)` of every snapshot it reads.
        seeds: `(entry index, value)` of every seed.
        numbers: `(source, value)` of every number.
        outputs: The value number of each output slot of each entry, in order of the entries.
        gradients: `(parameter, value)`: what the parameter's `.grad` is when the step ends, where the step has
            put a new tensor there; the value is None where it has put None there.
    """

    graph: Graph
    lifted: list[Lifted]
    leaves: list[tuple[int, int, int]]
    seeds: list[tuple[int, int]]
    numbers: list[tuple[NumberSource, int]]
    outputs: dict[Slot, int]
    gradients: list[tuple[weakref.ref, int | None]]


def capture(
    entries: list[Entry], constants: Callable[[torch.optim.Optimizer], frozenset] = lambda _: frozenset()
) -> CapturedStep:
    """Replays entries on stand-ins and records what torch dispatches.

    Args:
        entries: What to capture; the slots that they read must be their own or have values.
        constants: Gives the paths of an optimizer's hyperparameters that have to be constants.

    Returns:
        The graph and what its inputs and outputs are.

    Raises:
        CaptureError: The entries cannot be expressed as a pure function of tensors and numbers.
        NumberUsed: A number has to be a constant.
    """
    twins = Twins()
    recorder = twins.recorder
    recorder.until = replay.__code__
    fakes: dict[Any, torch.Tensor] = {}
    leaves: list[tuple[int, int, int]] = []
    seeds: list[tuple[int, int]] = []
    numbers: list[tuple[NumberSource, int]] = []

    def number(source: NumberSource, value: float) -> TracedNumber:
        fake = twins.fake_like((), torch.float64)
        numbers.append((source, recorder.value_of(fake)))
        return TracedNumber(value, fake, source)

    def hyperparameter(index: int, optimizer: weakref.ref, path: tuple, value: float) -> TracedNumber:
        return number(NumberSource(index, path, optimizer), value)

    def resolve_in(index: int, entry: Entry):
        def resolve(leaf: Any, position: int) -> Any:
            if isinstance(leaf, Slot):
                if leaf not in fakes:
                    assert leaf.value is not None
                    fakes[leaf] = twins.fake_like(tuple(leaf.meta.shape), leaf.meta.dtype)
                    leaves.append((index, position, recorder.value_of(fakes[leaf])))
                return fakes[leaf]
            if isinstance(leaf, Input):
                if leaf not in fakes:
                    fakes[leaf] = twins.fake_like(leaf.shape, leaf.dtype)
                    leaves.append((index, position, recorder.value_of(fakes[leaf])))
                return fakes[leaf]
            if position in entry.numbers:
                return number(NumberSource(index, position), leaf)
            return leaf

        return resolve

    with contextlib.ExitStack() as stack:
        stack.enter_context(unchanged_host(entries))
        for index, entry in enumerate(entries):
            for place, (tensor, snapshot) in enumerate(entry.closure):
                fake = twins.fake_like(snapshot.shape, snapshot.dtype)
                twins.stand_in(tensor, fake)
                leaves.append((index, len(entry.leaves) + place, recorder.value_of(fake)))
            for optimizer in entry.optimizers:
                if entry.outputs is not None:
                    first_steps.prepare(optimizer, twins.has_gradient)
            recorder.where = entry.where
            twins.device = entry.device
            with twins.recording():
                if entry.seed is not None:
                    seed = twins.fake_like((), torch.int64)
                    seeds.append((index, recorder.value_of(seed)))
                    recorder.seed_with(seed)
                with contextlib.ExitStack() as prepared:
                    for optimizer in entry.optimizers:
                        of = functools.partial(hyperparameter, index, weakref.ref(optimizer))
                        prepared.enter_context(optimizers.traced(optimizer, of, constants(optimizer)))
                    prepared.enter_context(twins.numbers_in_steps())
                    for fingerprint in entry.prints:
                        prepared.enter_context(fingerprint.restored())
                    traced = [
                        (place, number(NumberSource(index, position, host=place), value))
                        for position, (place, value) in enumerate(entry.host_numbers())
                    ]
                    prepared.enter_context(_in_places(traced, entry.where))
                    result = replay(entry, resolve_in(index, entry))
                recorder.seed_with(None)
            for tensor, _ in entry.closure:
                twins.stand_in(tensor, None)
            results = tensors_in(result)
            if entry.outputs is None:
                _find_outputs(entry, result, results)
            assert entry.outputs is not None and len(results) >= len(entry.outputs)
            for slot, fake in zip(entry.outputs, results, strict=False):
                fakes[slot] = fake
        with twins.recording():
            outputs = {
                slot: recorder.value_of(twins.twin(fakes[slot])) for entry in entries for slot in entry.outputs or ()
            }
            lifted, gradients = _state(twins)
        fakes.clear()
        del results, result
    twins.let_go()
    if recorder.missing is not None:
        raise recorder.missing
    if any(item.tensor() is None for item in lifted):
        raise CaptureError(
            reason="the step makes a tensor of host data while it runs (torch.from_numpy and the like); a compiled "
            "step would use the first data for ever"
        )
    return CapturedStep(recorder.graph, lifted, leaves, seeds, numbers, outputs, gradients)


def _find_outputs(entry: Entry, result: Any, results: list[torch.Tensor]) -> None:
    slots = {id(fake): Slot(fake, entry.device) for fake in results}
    leaves, structure = flatten(result)
    entry.outputs = list(slots.values())
    entry.result = structure, [slots.get(id(leaf), leaf) for leaf in leaves]


def _state(twins: Twins) -> tuple[list[Lifted], list[tuple[weakref.ref, int | None]]]:
    recorder = twins.recorder
    owners = {
        id(gradient): weakref.ref(real)
        for real in twins.lifted
        if real.is_leaf and (gradient := tensor_hooks.real_gradient(real)) is not None
    }
    gradients: list[tuple[weakref.ref, int | None]] = []
    for real in twins.lifted:
        before = tensor_hooks.real_gradient(real) if real.is_leaf else None
        after = twins.gradient(real)
        if after is None:
            if before is not None:
                gradients.append((weakref.ref(real), None))
        elif before is None or after is not twins.twin(before):
            gradients.append((weakref.ref(real), recorder.value_of(after)))
    lifted = [
        Lifted(weakref.ref(real), owners.get(id(real)), twins.first_value(real), recorder.value_of(twins.twin(real)))
        for real in twins.lifted
    ]
    return lifted, gradients


@contextlib.contextmanager
def _in_places(numbers: list[tuple[Place, TracedNumber]], where: str | None) -> Iterator[None]:
    """Puts traced numbers where the forward reads the real ones."""
    before = [place.get() for place, _ in numbers]
    for place, number in numbers:
        place.set(number)
    try:
        yield
        for place, number in numbers:
            if place.get() is not number:
                raise CaptureError(reason=f"forward changes {place.label}, which compiled code cannot do", where=where)
    finally:
        for (place, _), value in zip(numbers, before, strict=True):
            place.set(value)


@contextlib.contextmanager
def unchanged_host(entries: list[Entry]) -> Iterator[None]:
    """Puts back whatever running the entries changes besides tensors, and fails if it has changed anything.

    Raises:
        CaptureError: A module's attribute, an optimizer's state or a random generator of the host has changed.
    """
    roots = [module for entry in entries for module in entry.modules]
    before = [(module, attributes_of(module)) for root in roots for module in root.modules()]
    outer = [
        (place, place.get(), frozen(place.get())) for entry in entries for p in entry.prints for place, _ in p.values
    ]
    contents = [(value, copy.copy(value)) for _, old in before for value in old.values() if type(value) in _CONTAINERS]
    contents += [(value, copy.copy(value)) for _, value, _ in outer if type(value) in _CONTAINERS]
    stateful = [(optimizer, optimizers.HostState(optimizer)) for entry in entries for optimizer in entry.optimizers]
    counters: list[torch.optim.Optimizer] = []
    python_state, numpy_state = random.getstate(), np.random.get_state(legacy=True)
    reasons: list[str] = []
    try:
        yield
        counters = [optimizer for optimizer, host_state in stateful if host_state.changed()]
        reasons = _changes(before, contents, outer, stateful, python_state, numpy_state)
    finally:
        for module, old in before:
            for name in set(attributes_of(module)) - set(old):
                del module.__dict__[name]
            module.__dict__.update(old)
        for place, value, _ in outer:
            if place.get() is not value:
                place.set(value)
        for container, old in contents:
            _refill(container, old)
        for optimizer, host_state in stateful:
            optimizers.drop_fake_state(optimizer)
            host_state.restore()
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    if counters and reasons in ([], [optimizers.NEW_STATE]):  # one that counts in Python cannot be compiled anyway
        raise optimizers.counts_in_python(counters[0])
    if reasons:
        kind = PassingCaptureError if reasons[0] == optimizers.NEW_STATE else CaptureError
        raise kind(reason=reasons[0], where=next((entry.where for entry in entries if entry.where), None))


def _changes(before, contents, outer, stateful, python_state, numpy_state) -> list[str]:
    reasons = []
    if any(optimizers.has_fake_state(optimizer) for optimizer, _ in stateful):
        reasons.append(optimizers.NEW_STATE)
    changed = {
        f"{type(module).__name__}.{name}"
        for module, old in before
        for name, value in attributes_of(module).items()
        if name not in old or (old[name] is not value and not _equal(old[name], value))
    }
    changed |= {place.label for place, _, image in outer if frozen(place.get()) != image}
    changed |= {f"a {type(container).__name__} of a module" for container, old in contents if not _same(container, old)}
    if changed:
        reasons.append(f"forward changes {', '.join(sorted(changed)[:3])}, which compiled code cannot do")
    if random.getstate() != python_state or not _same_numpy_state(np.random.get_state(legacy=True), numpy_state):
        reasons.append("forward draws random numbers from Python's or NumPy's generator")
    return reasons


def _same(container: Any, old: Any) -> bool:
    if len(container) != len(old):
        return False
    if isinstance(container, dict):
        return all(name in container and container[name] is value for name, value in old.items())
    return container == old if isinstance(container, set) else all(map(operator.is_, container, old))


def _refill(container: Any, old: Any) -> None:
    if not _same(container, old):
        container.clear()
        container.extend(old) if isinstance(container, list) else container.update(old)


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor) or type(old) is not type(new):
        return False
    return isinstance(old, str | int | float | bool | tuple | list | dict | set | frozenset) and old == new


def _same_numpy_state(one: Any, other: Any) -> bool:
    return one[2:] == other[2:] and bool((one[1] == other[1]).all())
