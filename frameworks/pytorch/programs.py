"""Compiled tapes: found by signature, bound to the training state, run."""

import inspect
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from trainingcompiler import compiler
from trainingcompiler.errors import CaptureError, GradientNotKeptError
from trainingcompiler.events import Recompiled, emit, phase
from trainingcompiler.frameworks.pytorch import optimizers, tensor_hooks
from trainingcompiler.frameworks.pytorch.arrays import tensor_of
from trainingcompiler.frameworks.pytorch.capture import CapturedStep, Lifted, NumberSource, capture
from trainingcompiler.frameworks.pytorch.loops import OptimizerBook
from trainingcompiler.frameworks.pytorch.lower.dtypes import jax_dtype
from trainingcompiler.frameworks.pytorch.lowering import lower
from trainingcompiler.frameworks.pytorch.state import CellRegistry, input_array
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.statistics import current as statistics

_MOST_PROGRAMS = 32  # for one loop; beyond, its shapes or constants change too often for compiling to pay


class ProgramCache:
    """Every tape that has been compiled in this process."""

    def __init__(self, book: OptimizerBook):
        self.book = book
        self.cells = CellRegistry()
        self._programs: dict[tuple, list[CompiledTape]] = {}
        self._loops: dict[tuple, list[tuple]] = {}

    def run(self, entries: list[Entry], exports: list[Slot], commit: bool) -> None:
        """Runs entries as one program, compiled if they are new.

        Args:
            entries: In order.
            exports: The slots to give values to.
            commit: Whether state and gradients are updated; if not, only the exports are computed.

        Raises:
            CaptureError, NumberUsed: The entries cannot be compiled; nothing has changed.
        """
        numbering: dict[Slot, int] = {}
        signature = [commit]
        for entry in entries:
            reads = tuple(
                numbering.get(slot, (tuple(slot.meta.shape), slot.meta.dtype)) for slot in entry.slots()
            )
            extra = (*map(self.book.pattern, entry.optimizers), entry.seed is not None)
            signature.append((entry.key, reads, extra))
            for slot in entry.outputs or ():
                numbering[slot] = len(numbering)
        key = tuple(signature)
        wanted = {numbering[slot] for slot in exports}
        variants = self._programs.setdefault(key, [])
        for compiled in variants:
            if wanted <= compiled.exported and compiled.binds():
                break
        else:
            # A set of live results only grows, or two loops that differ in what they hold would compile in turn.
            for older in variants:
                wanted |= older.exported
            compiled = self._compile(entries, [slot for slot in numbering if numbering[slot] in wanted], commit)
            variants.append(compiled)
        compiled.run(entries)

    def _compile(self, entries: list[Entry], exports: list[Slot], commit: bool) -> "CompiledTape":
        self.book.check_unconsumed()
        where = next((entry.where for entry in entries if entry.where), None)
        name = "train_step" if any(entry.optimizers for entry in entries) else "forward_backward"
        if all(isinstance(entry.function, nn.Module) for entry in entries) and not any(
            entry.ambient.grad for entry in entries
        ):
            name = "evaluation"
        start_s = time.perf_counter()
        with phase("capture", f"{name} at {where}" if where else name) as running:
            unknown = entries[-1].outputs is None
            captured = capture(entries)
            if unknown:
                exports = entries[-1].outputs or []
            running.detail += f"  {len(captured.graph.nodes):,} ops"
        compiled = CompiledTape(self, name, entries, captured, exports, commit)
        self._explain(entries, where, time.perf_counter() - start_s)
        statistics().compiles += 1
        statistics().compile_time_s += time.perf_counter() - start_s
        return compiled

    def _explain(self, entries: list[Entry], where: str | None, compile_time_s: float) -> None:
        loop = tuple(entry.key[0][0] if isinstance(entry.function, nn.Module) else entry.key[0] for entry in entries)
        shapes = tuple(
            (index, place, leaf.shape, leaf.dtype)
            for index, entry in enumerate(entries)
            for place, leaf in enumerate(entry.leaves)
            if isinstance(leaf, Input)
        )
        seen = self._loops.setdefault(loop, [])
        seen.append(shapes)
        if len(seen) > _MOST_PROGRAMS:
            raise CaptureError(
                reason=f"this loop has been compiled {_MOST_PROGRAMS} times for different shapes or constants",
                where=where,
            )
        if len(seen) == 1 or len(seen[-2]) != len(shapes):
            return
        for old, new in zip(seen[-2], shapes, strict=True):
            if old[2:] != new[2:]:
                emit(
                    Recompiled(
                        changed=f"{_leaf_name(entries[new[0]], new[1])}  {_described(old)} -> {_described(new)}",
                        where=where,
                        count=len(seen),
                        compile_time_s=compile_time_s,
                        cure="DataLoader(..., drop_last=True), if it is the last, smaller batch of an epoch; "
                        "pad to few lengths otherwise",
                    )
                )
                return


@dataclass(frozen=True, slots=True)
class _Binding:
    """How a lifted tensor is found again at every step."""

    find: Callable[[], torch.Tensor | None]
    shape: torch.Size
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor | None:
        found = self.find()
        return found if found is not None and found.shape == self.shape and found.dtype is self.dtype else None


class CompiledTape:
    """One executable and how its arguments are found.

    Attributes:
        exported: Numbers of the slots that it computes.
    """

    def __init__(self, cache: ProgramCache, name, entries, captured: CapturedStep, exports: list[Slot], commit: bool):
        self.cache = cache
        slots = [slot for entry in entries for slot in entry.outputs or ()]
        self.exported = {slots.index(slot) for slot in exports}
        self._exports = sorted(self.exported)
        self._commit = commit
        self._plan_gradients(entries, captured, commit)
        written, read = [], []
        for item in captured.lifted:
            is_written = commit and item.new_value != item.value and id(item) not in self._dropped
            (written if is_written else read).append(item)
        finders = _state_finders(entries)
        self._written = [_binding(item, finders) for item in written]
        self._read = [_binding(item, finders) for item in read]
        self._leaves = [(entry, place) for entry, place, _ in captured.leaves]
        self._seeds = [entry for entry, _ in captured.seeds]
        self._numbers = [source for source, _ in captured.numbers]
        output_values = [captured.outputs[slots[index]] for index in self._exports]
        output_values += [value for _, value in self._new_gradients]
        function = lower(captured.graph, [item.new_value for item in written] + output_values)
        state_values = [item.value for item in written]
        input_values = [item.value for item in read]
        input_values += [value for _, _, value in captured.leaves] + [value for _, value in captured.seeds]
        number_values = [value for _, value in captured.numbers]

        def step(state, inputs):
            *arrays, numbers = inputs
            values = dict(zip(state_values, state, strict=True))
            values.update(zip(input_values, arrays, strict=True))
            values.update({value: numbers[index] for index, value in enumerate(number_values)})
            results = function(values)
            return tuple(results[: len(state_values)]), tuple(results[len(state_values) :])

        arguments = [entries[e].leaves[p] for e, p in self._leaves]
        program = StepProgram(
            name=name,
            function=step,
            state=tuple(_spec(f"state {i}", b.shape, b.dtype, "parameter") for i, b in enumerate(self._written)),
            inputs=(
                *(_spec(f"constant {i}", b.shape, b.dtype, "constant") for i, b in enumerate(self._read)),
                *(_spec(f"input {i}", *_geometry(a), "batch") for i, a in enumerate(arguments)),
                *(_spec(f"seed {i}", (), torch.int64, "rng") for i in range(len(self._seeds))),
                _spec("numbers", (len(self._numbers),), torch.float64, "hyperparameter"),
            ),
            outputs=(),
        )
        self._executable = compiler.compile(program)

    def _plan_gradients(self, entries, captured: CapturedStep, commit: bool) -> None:
        """Decides which gradients are stored, which are dropped and which become None."""
        keep = not any(entry.optimizers for entry in entries)
        self._new_gradients: list[tuple[weakref.ref, int]] = []
        self._consumed: list[weakref.ref] = []
        self._cleared: list[weakref.ref] = []
        self._dropped: set[int] = set()
        self._without_gradient: list[weakref.ref] = []
        if not commit:
            return
        for parameter, value in captured.gradients:
            if value is None:
                self._cleared.append(parameter)
            elif keep or self.cache.book.keeps_gradient(parameter()):
                self._new_gradients.append((parameter, value))
            else:
                self._consumed.append(parameter)
            if value is not None and tensor_hooks.real_gradient(parameter()) is None:
                self._without_gradient.append(parameter)
        for item in captured.lifted:
            if item.gradient_of is not None and not keep and not self.cache.book.keeps_gradient(item.gradient_of()):
                self._dropped.add(id(item))
                self._consumed.append(item.gradient_of)

    def binds(self) -> bool:
        """Whether everything the program was captured for is still there."""
        return (
            all(binding.tensor() is not None for binding in self._written)
            and all(binding.tensor() is not None for binding in self._read)
            and all(tensor_hooks.stored_gradient(p()) is None for p in self._without_gradient)
        )

    def run(self, entries: list[Entry]) -> None:
        """Runs the program on what the entries hold, and gives their slots values."""
        if self._without_gradient or self._consumed:
            self.cache.book.check_unconsumed()
        cells = [self.cache.cells.cell(binding.tensor()) for binding in self._written]
        state = tuple(cell.array() for cell in cells)
        inputs = [self.cache.cells.cell(binding.tensor()).array() for binding in self._read]
        for entry, place in self._leaves:
            leaf = entries[entry].leaves[place]
            inputs.append(leaf.array if isinstance(leaf, Input) else input_array(leaf.value))
        inputs += [entries[entry].seed.array for entry in self._seeds]
        inputs.append(np.array([_number(entries, source) for source in self._numbers], np.float64))
        with jax.enable_x64(True):
            new_state, outputs = self._executable(state, tuple(inputs))
        jax.block_until_ready((new_state, outputs))
        for cell, array in zip(cells, new_state, strict=True):
            cell.update(array)
        slots = [slot for entry in entries for slot in entry.outputs or ()]
        for index, array in zip(self._exports, outputs, strict=False):
            slots[index].value = tensor_of(array)
        if self._commit:
            self._store_gradients(outputs[len(self._exports) :])

    def _store_gradients(self, arrays) -> None:
        for (parameter, _), array in zip(self._new_gradients, arrays, strict=True):
            tensor = parameter()
            tensor_hooks.store_gradient(tensor, self.cache.cells.tensor_for(array, tensor.dtype))
        for parameter in self._cleared + self._consumed:
            tensor_hooks.store_gradient(parameter(), None)
        self.cache.book.consume(self._consumed)


def _binding(item: Lifted, finders: dict[int, Callable]) -> _Binding:
    tensor = item.tensor()
    assert tensor is not None
    find: Callable[[], torch.Tensor | None]
    if item.gradient_of is not None:
        owner = item.gradient_of

        def find():
            parameter = owner()
            return None if parameter is None else tensor_hooks.stored_gradient(parameter)
    else:
        find = finders.get(id(tensor), item.tensor)
    return _Binding(find, tensor.shape, tensor.dtype)


def _state_finders(entries: list[Entry]) -> dict[int, Callable]:
    """How to find each tensor of the optimizers' state: `load_state_dict` replaces them."""
    finders: dict[int, Callable] = {}
    for entry in entries:
        for optimizer in entry.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        finders[id(value)] = _state_finder(weakref.ref(optimizer), weakref.ref(parameter), name)
    return finders


def _state_finder(optimizer: weakref.ref, parameter: weakref.ref, name: str) -> Callable[[], torch.Tensor | None]:
    def find():
        owner, key = optimizer(), parameter()
        if owner is None or key is None:
            return None
        return owner.state[key].get(name) if key in owner.state else None

    return find


def _number(entries: list[Entry], source: NumberSource) -> float:
    if source.optimizer is not None:
        return optimizers.number_at(source.optimizer(), source.position)
    return entries[source.entry].leaves[source.position]


def _spec(name: str, shape, dtype: torch.dtype, role) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(shape), dtype=jax_dtype(dtype), role=role)


def _geometry(leaf: Any) -> tuple:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Input) else (tuple(leaf.meta.shape), leaf.meta.dtype)


def _described(shape: tuple) -> str:
    return f"{str(shape[3]).removeprefix('torch.')}{list(shape[2])}"


def _leaf_name(entry: Entry, place: int) -> str:
    """What the user calls a leaf: the parameter of `forward`, or the key it was passed under."""
    args, kwargs = entry.structure.children
    names: list[str] = []
    function = entry.function.forward if isinstance(entry.function, nn.Module) else entry.function
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = []
    for index, child in enumerate(args.children):
        base = parameters[index] if index < len(parameters) else f"argument {index}"
        names += [base] * _leaf_count(child)
    for key, child in zip(kwargs.keys, kwargs.children, strict=True):
        names += [str(key)] * _leaf_count(child)
    called = type(entry.function).__name__ if isinstance(entry.function, nn.Module) else entry.function.__name__
    return f"{names[place]} of {called}"


def _leaf_count(structure) -> int:
    return 1 if structure.kind is None else sum(map(_leaf_count, structure.children))
