"""One compiled tape: what it computes, how its arguments are found, and what becomes of its results."""

import contextlib
import enum
import functools
import itertools
import time
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from jax import lax
from torch import nn

from trainingcompiler.compiling import compiler
from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.capture import inspection, optimizers
from trainingcompiler.frameworks.pytorch.capture.capture import CapturedStep, FloatSource, LiftedTensor
from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, references
from trainingcompiler.frameworks.pytorch.graph.passes import PASSES, run_passes
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.arrays import tensor_of
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import real_gradient, store_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.lowering.cache_key import graph_cache_key
from trainingcompiler.frameworks.pytorch.lowering.fsdp_split import common_inputs
from trainingcompiler.frameworks.pytorch.lowering.interpreter import lower
from trainingcompiler.frameworks.pytorch.operators import value_checks
from trainingcompiler.frameworks.pytorch.operators.dtypes import jax_dtype
from trainingcompiler.frameworks.pytorch.runtime.bindings import Bindings
from trainingcompiler.frameworks.pytorch.runtime.tensor_names import gradient_names, tensor_names, written_names
from trainingcompiler.frameworks.pytorch.state.ownership import overlapping
from trainingcompiler.frameworks.pytorch.state.prefetch import StatePrefetcher
from trainingcompiler.frameworks.pytorch.state.sharded import ShardedState
from trainingcompiler.frameworks.pytorch.state.shared_tensors import input_array
from trainingcompiler.frameworks.pytorch.tape.tape import Entry, Input, Slot, step_ends
from trainingcompiler.frameworks.pytorch.verify.sentinel import Sentinel
from trainingcompiler.parallel import spmd
from trainingcompiler.program import Role, StepProgram, TensorSpec
from trainingcompiler.reporting.events import StageReached, emit
from trainingcompiler.reporting.statistics import current as statistics

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache

_REFUSED = "a value is out of range, such as an index: torch is to say which"


class Purpose(enum.Enum):
    """What becomes of the state and gradients that entries write.

    `COMMIT` updates them, in place. `PEEK` does not compute them. `HOLD` computes them beside the old ones, to be
    applied when the loop has asked for them.
    """

    COMMIT = enum.auto()
    PEEK = enum.auto()
    HOLD = enum.auto()


class CompiledStep:
    """One executable and how its arguments are found.

    Attributes:
        exported: Numbers of the slots that it computes.
        program: What is compiled; None where calls whose results nobody holds, of modules without buffers, leave
            nothing to do.
    """

    def __init__(
        self, cache: "ProgramCache", name, entries, captured: CapturedStep, exports: list[Slot], purpose: Purpose
    ):
        self.cache = cache
        slots = [slot for entry in entries for slot in entry.outputs]
        wanted = set(exports)
        # What a checkpointed block computes for itself alone has no value outside of it.
        self.exported = {number for number, slot in enumerate(slots) if slot in wanted and slot in captured.outputs}
        self._exports = sorted(self.exported)
        self._purpose = purpose
        self._name, self._steps = name, any(entry.optimizers for entry in entries)
        self._where = next((entry.where for entry in entries if entry.where), None)
        self._tensor_dims = self._divided(entries, captured)
        self._plan_gradients(entries, captured)
        output_values = [captured.outputs[slots[index]] for index in self._exports]
        gradient_values = [value for _, value in self._new_gradients]
        self._writes_gradients = purpose is Purpose.COMMIT and cache.gradients is not None
        if not self._writes_gradients:
            output_values, gradient_values = output_values + gradient_values, []
        written = [item for item in captured.lifted if item.new_value != item.value and id(item) not in self._dropped]
        if purpose is Purpose.PEEK:
            written = []
        if purpose is Purpose.HOLD:
            if any(item.tensor().requires_grad or item.gradient_of for item in written):
                raise CaptureError(reason="parameters or gradients would be held twice")
            output_values += [item.new_value for item in written]
        results = [item.new_value for item in written] + gradient_values + output_values
        used = {number for node in captured.graph.live_nodes(results) for number in references(node)} | set(results)
        donated = written if purpose is Purpose.COMMIT else []
        read = [item for item in captured.lifted if item not in donated and item.value in used]
        held = written if purpose is Purpose.HOLD else []
        self._donated, self._read = len(donated), len(read)
        # The Python of a recorded step has run, and may have put other tensors into the optimizer's state.
        stepped = [o for entry in entries if entry.function is not step_ends for o in entry.optimizers]
        self._bindings = Bindings([*donated, *read, *held], stepped)
        self._leaves = [(entry, place) for entry, place, _ in captured.leaves]
        self._seeds = [entry for entry, _ in captured.seeds]
        self._numbers = [source for source, _ in captured.numbers]
        precisions = sorted({entry.ambient.precision for entry in entries})
        returned = [item.new_value for item in donated] + gradient_values + output_values
        live = captured.graph.live_nodes(results)
        # Whether other workers have to run it at the same time.
        self._waits = any(node.operator in spmd.OPERATORS for node in live)
        self._common = self._values_in_common(entries, captured, live, [*donated, *read])
        function = lower(captured.graph, returned, precisions, self._common)
        common = None if self._common is None else sorted(self._common)
        state_values = [item.value for item in donated]
        memory_values = [-2 - index for index in range(len(gradient_values))]  # written, and never read; -1 is nothing
        state_count = len(state_values) + len(memory_values)
        input_values = [item.value for item in read]
        input_values += [value for _, _, value in captured.leaves]
        seed_values = [value for _, value in captured.seeds]
        number_values = [value for _, value in captured.numbers]

        def step(state, inputs):
            *arrays, seeds, numbers = inputs
            values = dict(zip(state_values, state, strict=False))
            values.update(zip(input_values, arrays, strict=True))
            values.update({value: seeds[index] for index, value in enumerate(seed_values)})
            values.update({value: numbers[index] for index, value in enumerate(number_values)})
            with value_checks.collecting() as conditions:
                results = function(values)
            new_state, outputs = tuple(results[:state_count]), tuple(results[state_count:])
            if not conditions:
                return new_state, outputs
            # The selection is fused into the update, which reads the old value anyway.
            holds = conditions.all()
            pairs = zip(new_state[: len(state_values)], state, strict=False)
            kept = (
                new if conditions.keeps(new) else lax.select(lax.broadcast(holds, old.shape), new, old)
                for new, old in pairs
            )
            return (*kept, *new_state[len(state_values) :]), (*outputs, holds)

        self._outputs = len(output_values)
        self._has_run = False
        given = [*state_values, *memory_values, *input_values, *seed_values, *number_values]
        names = written_names(entries, written) | gradient_names(entries, self._new_gradients)
        replaced = dict(zip(returned, state_values, strict=False))
        self._sentinel = Sentinel(name, self._where, captured.graph, given, returned, names, replaced)
        self._inspected: tuple | None = None
        if inspection.inspector is not None:
            self._inspected = captured.graph, given, returned, names, replaced
        leaves = [entries[entry].leaves[place] for entry, place in self._leaves]
        arguments = [leaf if isinstance(leaf, Input) else leaf.meta for leaf in leaves]
        program = StepProgram(
            name=name,
            function=step,
            state=(*self._state_specs(donated, entries), *(self._gradient_specs() if self._writes_gradients else ())),
            inputs=(
                *(self._spec_of(f"constant {i}", t.tensor(), "constant", t.value) for i, t in enumerate(read)),
                *(_spec(f"input {i}", a.shape, a.dtype, "batch") for i, a in enumerate(arguments)),
                _spec("seeds", (len(self._seeds),), torch.int64, "rng"),
                _spec("numbers", (len(self._numbers),), torch.float64, "hyperparameter"),
            ),
            outputs=self._output_specs([slots[index] for index in self._exports]),
            digest=graph_cache_key(
                captured.graph,
                returned,
                [state_values, memory_values, input_values, seed_values, number_values, *precisions, common],
            ),
            is_deterministic=any(entry.ambient.deterministic for entry in entries),
            recomputes=any(node.operator == BARRIER for node in captured.graph.nodes),
            tells_apart=self._common is not None,
        )
        self.program = program if results else None
        self._executable: compiler.Executable | None = None
        self._tell_stages(entries, captured.graph, returned)

    def _tell_stages(self, entries: list[Entry], graph: Graph, results: list[int]) -> None:
        """Lets whoever writes stages down know of those that lie before StableHLO."""
        platform = self.cache.target.platform

        def after(name: str) -> str:
            return str(dict(run_passes(graph, results, platform))[name])

        emit(StageReached(program=self._name, stage="tape", text=lambda: "\n".join(map(str, entries))))
        emit(StageReached(program=self._name, stage="graph", text=lambda: str(graph)))
        for name in ("live", *(one.name for one in PASSES if one.platform in ("", platform))):
            emit(StageReached(program=self._name, stage=f"graph after {name}", text=functools.partial(after, name)))

    def _divided(self, entries: list[Entry], captured: CapturedStep) -> dict[int, int]:
        """The dims of tensors that devices which share a layer divide, by identity."""
        layers = self.cache.layers
        layers.see({id(module): module for entry in entries for module in entry.modules}.values())
        return layers.dims([o for entry in entries for o in entry.optimizers], captured.lifted)

    def _output_specs(self, exports: list[Slot]) -> tuple[TensorSpec, ...]:
        of_slots = [_spec("output", slot.meta.shape, slot.meta.dtype, "output") for slot in exports]
        return (*of_slots, *(() if self._writes_gradients else self._gradient_specs()))

    def _gradient_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(self._spec_of("gradient", parameter(), "gradient") for parameter, _ in self._new_gradients)

    def _spec_of(self, name: str, tensor: torch.Tensor, role: Role, value: int | None = None) -> TensorSpec:
        """Describes a tensor that may be divided between devices which share its layer, or between workers."""
        common = self._common is not None and value in self._common
        spec = _spec(name, tensor.shape, tensor.dtype, role)
        return replace(spec, tensor_dim=self._tensor_dims.get(id(tensor)), is_common=common)

    def _values_in_common(
        self, entries: list[Entry], captured: CapturedStep, nodes: list[Node], items: list[LiftedTensor]
    ) -> set[int] | None:
        """The inputs that workers divide, as all have them alike; None where each has the program for itself.

        What trains is run by all together. What only looks is not: one of them may be alone in looking.
        """
        sharded_state = self.cache.sharded_state
        trains = self._purpose is Purpose.COMMIT and any(entry.ambient.grad for entry in entries)
        if sharded_state is None or not (self._waits or trains):
            return None
        tensors = sharded_state.common([o for entry in entries for o in entry.optimizers])
        numbers = [*(value for _, value in captured.numbers), *captured.graph.constants]
        found = common_inputs(nodes, items, tensors, numbers)
        sharded_state.forget(
            [i.tensor() for i in items if id(i.tensor()) in tensors and i.value not in found], self._where
        )
        self._version = sharded_state.version
        return found

    def _state_specs(self, items: list[LiftedTensor], entries: list[Entry]) -> tuple[TensorSpec, ...]:
        stepped = {id(optimizer): optimizer for entry in entries for optimizer in entry.optimizers}.values()
        kept = {id(value) for o in stepped for state in o.state.values() for value in state.values()}

        def role(tensor: torch.Tensor) -> Role:
            return "parameter" if isinstance(tensor, nn.Parameter) else "optimizer" if id(tensor) in kept else "buffer"

        names = tensor_names(entries)
        return tuple(
            self._spec_of(names.get(id(tensor), f"state {index}"), tensor, role(tensor), value)
            for index, (tensor, value) in enumerate((item.tensor(), item.value) for item in items)
        )

    def compile(self, prefetcher: StatePrefetcher) -> None:
        """Compiles the program for this process's devices, while `prefetcher` moves the state."""
        if self.program is not None:
            if self._waits and self.cache.sharded_state is None:
                self.cache.agreement.meet(self._name, self._where, self._batches())
            tensors = self.bound() if self._donated else None
            if tensors is not None:
                prefetcher.move(tensors[: self._donated])
            self._executable = compiler.compile(self.program, self.cache.target)
            prefetcher.wait()
            self._sentinel.begin(self._executable, self.cache.verify)

    @property
    def added_bytes(self) -> int:
        """What a run needs besides its arguments."""
        return 0 if self._executable is None else self._executable.memory.added_bytes

    def _batches(self) -> list[str]:
        assert self.program is not None
        return [f"a batch of {s.dtype.name}{list(s.shape)}" for s in self.program.inputs if s.role == "batch"]

    def _plan_gradients(self, entries, captured: CapturedStep) -> None:
        """Decides which gradients are stored, which are dropped and which become None."""
        stepped = {id(optimizer) for entry in entries for optimizer in entry.optimizers}
        self._new_gradients: list[tuple[weakref.ref, int]] = []
        self._consumed: list[weakref.ref] = []
        self._cleared: list[weakref.ref] = []
        self._dropped: set[int] = set()
        self._without_gradient: list[weakref.ref] = []
        if self._purpose is Purpose.PEEK:
            return
        registry = self.cache.registry
        cleared = _cleared_inside(captured) if not registry.keep_gradients else set()

        def keeps(parameter) -> bool:
            if id(registry.owner(parameter)) not in stepped:
                return True
            return registry.keeps_gradient(parameter) and id(parameter) not in cleared

        for parameter, value in captured.gradients:
            if value is None:
                self._cleared.append(parameter)
            elif keeps(parameter()):
                self._new_gradients.append((parameter, value))
            else:
                self._consumed.append(parameter)
            if value is not None and real_gradient(parameter()) is None:
                self._without_gradient.append(parameter)
        for item in captured.lifted:
            if item.gradient_of is not None and not keeps(item.gradient_of()):
                self._dropped.add(id(item))
                self._consumed.append(item.gradient_of)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.program is None

    def bound(self) -> list[torch.Tensor] | None:
        """The tensors that the program reads and writes; None if it was captured for others, or for other workers."""
        if self._common is not None and self.cache.sharded_state.version != self._version:
            return None
        for reference in self._without_gradient:
            parameter = reference()
            if parameter is None or stored_gradient(parameter) is not None:
                return None
        return self._bindings.tensors()

    @section.around
    def run(self, entries: list[Entry], tensors: list[torch.Tensor]) -> "Held | None":
        """Runs the program on what the entries hold, and gives their slots values.

        Args:
            entries: Of the signature that the program was compiled for.
            tensors: What `bound` has returned.
        """
        if self._executable is None:
            return None
        shared = self.cache.state.of
        state_tensors = [shared(tensor) for tensor in tensors[: self._donated]]
        read = tensors[self._donated : self._donated + self._read]
        of_state = self._executable.state_shardings or itertools.repeat(None)
        of_read = self._executable.input_shardings or itertools.repeat(None)
        if self.cache.sharded_state is not None:
            placed = itertools.chain(
                zip(state_tensors, of_state, strict=False), zip(map(shared, read), of_read, strict=False)
            )
            self._come_together(self.cache.sharded_state, list(placed))
        gradients = self._gradient_tensors()
        gradient_tensors = list(map(shared, gradients))
        state = tuple(one.array(where, written=True) for one, where in zip(state_tensors, of_state, strict=False))
        state += tuple(one.array(None, written=True) for one in gradient_tensors)
        read_tensors = list(map(shared, read))
        inputs: list[Any] = [one.array(where) for one, where in zip(read_tensors, of_read, strict=False)]
        if any(one.stays for one in state_tensors) or any(one.stays for one in read_tensors):
            self._check_apart(tensors)
        for entry, place in self._leaves:
            leaf = entries[entry].leaves[place]
            inputs.append(leaf.array if isinstance(leaf, Input) else input_array(leaf.value))
        inputs.append(np.array([entries[entry].seed for entry in self._seeds], np.int64))
        inputs.append(np.array([number_of(entries, source) for source in self._numbers], np.float64))
        if self.cache.target.platform == "cuda":
            self._get_ready(entries)
        given = (
            [np.array(array) for array in (*state, *inputs[:-2], *inputs[-2], *inputs[-1])] if self._inspected else []
        )
        watched = self.cache.agreement.running(self._name, self._where) if self._waits else contextlib.nullcontext()
        with self._sentinel.watching(self._executable, state, inputs) as watch:
            on_cpu = self.cache.target.platform == "cpu"
            with watched, jax.enable_x64(True):
                started_s = time.perf_counter()
                new_state, outputs = self._executable(state, tuple(inputs))
                if on_cpu:  # where a call may run the program itself
                    jax.block_until_ready((new_state, outputs))
                    statistics().waited_s += time.perf_counter() - started_s
            statistics().launches += 1
            for updated, array in zip([*state_tensors, *gradient_tensors], new_state, strict=True):
                updated.update(array)
            if len(outputs) > self._outputs:
                outputs, holds = outputs[:-1], outputs[-1]
            else:
                holds = None
            if not on_cpu:
                self.cache.dispatch_queue.launched(inputs, (new_state, outputs), holds, self._where)
            elif holds is not None and not holds:
                raise PassingCaptureError(reason=_REFUSED, where=self._where)
            watch.ran(state_tensors, new_state, outputs)
        if self._inspected is not None:
            self._show(given, [*new_state, *outputs])
        torch.autograd.graph.increment_version(
            [*tensors[: self._donated], *gradients]
        )  # as torch's own in-place updates do
        slots = [slot for entry in entries for slot in entry.outputs]
        for index, array in zip(self._exports, outputs, strict=False):
            slots[index].value = tensor_of(array, slots[index].device)
        held = Held(self, outputs[len(self._exports) :], tensors[self._donated + self._read :])
        for (parameter, _), gradient in zip(self._new_gradients, gradients, strict=False):
            store_gradient(parameter(), gradient)
        if self._purpose is Purpose.COMMIT:
            held.apply()
        return held if self._purpose is Purpose.HOLD else None

    def _gradient_tensors(self) -> list[torch.Tensor]:
        """Where the program is to write gradients."""
        memory = self.cache.gradients
        return [memory.tensor_for(parameter()) for parameter, _ in self._new_gradients if self._writes_gradients]

    def _check_apart(self, tensors: list[torch.Tensor]) -> None:
        """Refuses tensors over one memory: what the program writes to one of them, it would not read from the other."""
        found = overlapping(tensors[: self._donated], tensors[self._donated : self._donated + self._read])
        if found is not None:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in found)
            raise CaptureError(
                f"two tensors of the step, of shapes {shapes}, lie in the same memory (`b.data = a.data`), to which it "
                "writes; `b = a`, one parameter in two places, is compiled",
                self._where,
            )

    def _get_ready(self, entries: list[Entry]) -> None:
        """What has to be before a program runs on a GPU, where torch may be computing still."""
        device = entries[0].device
        if device.type == "cuda":
            if not self._has_run:
                torch.cuda.empty_cache()  # what torch keeps of the memory of moved tensors, XLA cannot use
            # A tensor that is handed over brings an event, for which XLA's queue waits. Without one the host waits: XLA
            # may be about to use the memory of results again that torch still reads.
            if not any(entries[entry].leaves[place].device.type == "cuda" for entry, place in self._leaves):
                devices.finish(device)
        self._has_run = True

    def _come_together(self, sharded_state: ShardedState, placed: list[tuple]) -> None:
        """Makes whole what has to be, and sees that all workers are at the same program, if it is run by all."""
        assert self.program is not None
        name = f"{self._name} at {self._where}" if self._where else self._name
        sharded_state.fetch([one for one, where in placed if where.is_fully_replicated and one.is_divided], name)
        if self._common is not None:
            sharded_state.meet(f"{name}, {', '.join(self._batches())}")

    def _show(self, given: list[np.ndarray], results: list[jax.Array]) -> None:
        if inspection.inspector is None:
            return
        assert self._inspected is not None
        graph, given_values, result_values, names, replaced = self._inspected
        inspection.inspector(
            inspection.Inspection(
                name=self._name,
                where=self._where,
                steps=self._steps,
                graph=graph,
                inputs=dict(zip(given_values, given, strict=True)),
                results=dict(zip(result_values, map(np.array, results), strict=True)),
                names=names,
                replaced=replaced,
            )
        )

    def apply(self, arrays: tuple, tensors: list[torch.Tensor]) -> None:
        """Stores gradients, and the state that was computed beside the old one, into `tensors`."""
        returned = [] if self._writes_gradients else self._new_gradients
        gradients, held = arrays[: len(returned)], arrays[len(returned) :]
        for (parameter, _), array in zip(returned, gradients, strict=True):
            tensor = parameter()
            # On top of a gradient that was not kept (a GAN's generator reaches the discriminator after its step), the
            # sum stays unknown: reading it, or stepping by it, is an error until it is cleared.
            if not self.cache.registry.is_consumed(tensor):
                store_gradient(tensor, self.cache.state.tensor_for(array, tensor.dtype, tensor.device))
        for tensor, array in zip(tensors, held, strict=True):
            tensor.copy_(tensor_of(array, tensor.device))
        for parameter in self._cleared + self._consumed:
            store_gradient(parameter(), None)
        self.cache.registry.consume(self._consumed)


@dataclass(frozen=True, slots=True)
class Held:
    """What a program has computed and nobody has asked for yet."""

    program: CompiledStep
    arrays: tuple
    tensors: list[torch.Tensor]

    def apply(self) -> None:
        """Makes it so."""
        self.program.apply(self.arrays, self.tensors)


def _tensors(lifted: list[LiftedTensor]) -> list[torch.Tensor]:
    return [item.tensor() for item in lifted]


def _cleared_inside(captured: CapturedStep) -> set[int]:
    """The parameters whose gradients the step replaces without adding to the old ones: by `zero_grad`, first of all."""
    new = [value for _, value in captured.gradients if value is not None]
    used = {number for node in captured.graph.live_nodes(new) for number in references(node)}
    replaced = {id(item.gradient_of()) for item in captured.lifted if item.gradient_of and item.value not in used}
    return replaced & {id(parameter()) for parameter, value in captured.gradients if value is not None}


def number_of(entries: list[Entry], source: FloatSource) -> float:
    """The value of a number that entries read."""
    if source.optimizer is not None:
        entry = entries[source.entry]
        groups = next(g for o, g in zip(entry.optimizers, entry.groups, strict=True) if o is source.optimizer())
        return optimizers.number_at(groups, source.position)
    return entries[source.entry].leaves[source.position]


def _spec(name: str, shape, dtype: torch.dtype, role) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(shape), dtype=jax_dtype(dtype), role=role)
