"""What a program of some entries computes, where its arguments come from, and where its results go; nothing runs."""

import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jax import lax
from torch import nn

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.capture import CapturedStep, FloatSource, LiftedTensor
from trainingcompiler.frameworks.pytorch.capture.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, references
from trainingcompiler.frameworks.pytorch.interop.gradients import real_gradient
from trainingcompiler.frameworks.pytorch.lowering.cache_key import graph_cache_key
from trainingcompiler.frameworks.pytorch.lowering.fsdp_split import common_inputs
from trainingcompiler.frameworks.pytorch.lowering.interpreter import lower
from trainingcompiler.frameworks.pytorch.operators import value_checks
from trainingcompiler.frameworks.pytorch.operators.dtypes import jax_dtype
from trainingcompiler.frameworks.pytorch.runtime.bindings import Bindings
from trainingcompiler.frameworks.pytorch.runtime.tensor_names import gradient_names, tensor_names, written_names
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, step_ends
from trainingcompiler.parallel import spmd
from trainingcompiler.program import Role, StepProgram, TensorSpec

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.runtime.optimizer_registry import OptimizerRegistry
    from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache


class Purpose(enum.Enum):
    """What becomes of the state and gradients that entries write.

    `COMMIT` updates them, in place. `PEEK` does not compute them. `HOLD` computes them beside the old ones, to be
    applied when the loop has asked for them.
    """

    COMMIT = enum.auto()
    PEEK = enum.auto()
    HOLD = enum.auto()


@dataclass
class GradientPlan:
    """What becomes of the gradients that a program computes.

    Attributes:
        stored: Parameters whose `.grad` it gives a value, and the value's number.
        consumed: Parameters whose gradient it computes and does not keep: the script clears it unread.
        cleared: Parameters whose `.grad` is None afterwards.
        dropped: Lifted tensors, by identity, that are gradients which are not kept: they are not written.
        missing: Parameters that had no gradient when the step was captured, of those whose gradient it computes or asks
            for: such a program is for no other case.
    """

    stored: list[tuple[weakref.ref, int]] = field(default_factory=list)
    consumed: list[weakref.ref] = field(default_factory=list)
    cleared: list[weakref.ref] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    missing: list[weakref.ref] = field(default_factory=list)


@dataclass
class StepValues:
    """The numbers of the graph's values that a program takes and gives, in its order.

    Attributes:
        state: Lifted tensors that it consumes and gives anew.
        memory: The gradients' memory, which it writes and never reads: negative numbers; -1 is nothing.
        inputs: Tensors that it reads, then the leaves of entries.
        seeds: Of random calls.
        numbers: Hyperparameters and other floats.
        returned: The new state, the gradients and the outputs.
    """

    state: list[int]
    memory: list[int]
    inputs: list[int]
    seeds: list[int]
    numbers: list[int]
    returned: list[int]

    @property
    def given(self) -> list[int]:
        """All that the program takes."""
        return [*self.state, *self.memory, *self.inputs, *self.seeds, *self.numbers]

    @property
    def groups(self) -> list[list[int]]:
        """The same by what they are, which is part of the cache key."""
        return [self.state, self.memory, self.inputs, self.seeds, self.numbers]


@dataclass
class StepPlan:
    """A program, and all that is needed to call it.

    Attributes:
        name: Of the program.
        where: The script's line.
        purpose: What becomes of state and gradients.
        steps: Whether an optimizer's step is part of it.
        graph: The captured step.
        exports: Numbers of the slots that it computes, ascending.
        donated: The state that it consumes.
        read: Tensors that it reads.
        bindings: Where these are found at every run, and the state that it computes beside the old one.
        gradients: What becomes of them.
        writes_gradients: Whether it writes them into memory that it is given.
        leaves: Which entries' leaves are inputs: entry and position.
        seeds: Which entries draw.
        numbers: Where the floats come from.
        waits: Whether other workers have to run it at the same time.
        common: The inputs that workers divide, as all have them alike; None where each has the program for itself.
        version: Of the state that workers divide, when this was planned.
        values: The numbers of what it takes and gives.
        output_count: How many outputs it has, without the sign that all values were in range.
        names: What a person calls the values, by number.
        replaced: The value that each new state takes the place of.
        program: What is compiled; None where calls whose results nobody holds, of modules without buffers, leave
            nothing to do.
    """

    name: str
    where: str | None
    purpose: Purpose
    steps: bool
    graph: Graph
    exports: list[int]
    donated: list[LiftedTensor]
    read: list[LiftedTensor]
    bindings: Bindings
    gradients: GradientPlan
    writes_gradients: bool
    leaves: list[tuple[int, int]]
    seeds: list[int]
    numbers: list[FloatSource]
    waits: bool
    common: set[int] | None
    version: int | None
    values: StepValues
    output_count: int
    names: dict[int, str]
    replaced: dict[int, int]
    program: StepProgram | None


def plan_step(
    cache: "ProgramCache",
    name: str,
    entries: list[Entry],
    captured: CapturedStep,
    exports: Sequence[Slot],
    purpose: Purpose,
) -> StepPlan:
    """Plans the program of some entries.

    Args:
        cache: Who will keep it: what is known of optimizers, devices and workers.
        name: Of the program.
        entries: In their order.
        captured: What they are as a graph.
        exports: The slots whose values are wanted.
        purpose: What becomes of state and gradients.

    Returns:
        The plan.

    Raises:
        CaptureError: Parameters or gradients would be held twice.
    """
    slots = [slot for entry in entries for slot in entry.outputs]
    exported = _exported(slots, exports, captured)
    gradients = _plan_gradients(cache.registry, entries, captured, purpose)
    writes_gradients = purpose is Purpose.COMMIT and cache.gradients is not None
    gradient_values = [value for _, value in gradients.stored]
    # A gradient is an output like any other, but where the program is given memory to write it to.
    into_memory, as_outputs = (gradient_values, []) if writes_gradients else ([], gradient_values)
    written = _written(captured, gradients, purpose)
    held = written if purpose is Purpose.HOLD else []
    donated = written if purpose is Purpose.COMMIT else []
    outputs = [captured.outputs[slots[index]] for index in exported] + as_outputs + [i.new_value for i in held]
    results = [*(item.new_value for item in written), *into_memory, *outputs]
    live = captured.graph.live_nodes(results)
    read = _read(captured, live, results, donated)
    values = _step_values(captured, donated, read, into_memory, outputs)
    plan = StepPlan(
        name=name,
        where=_first_line(entries),
        purpose=purpose,
        steps=any(entry.optimizers for entry in entries),
        graph=captured.graph,
        exports=exported,
        donated=donated,
        read=read,
        bindings=Bindings([*donated, *read, *held], _stepped(entries)),
        gradients=gradients,
        writes_gradients=writes_gradients,
        leaves=[(entry, place) for entry, place, _ in captured.leaves],
        seeds=[entry for entry, _ in captured.seeds],
        numbers=[source for source, _ in captured.numbers],
        waits=any(node.operator in spmd.OPERATORS for node in live),
        common=None,
        version=None,
        values=values,
        output_count=len(outputs),
        names=written_names(entries, written) | gradient_names(entries, gradients.stored),
        replaced=dict(zip(values.returned, values.state, strict=False)),
        program=None,
    )
    plan.common, plan.version = _values_in_common(cache, entries, captured, live, plan)
    if results:
        plan.program = _program(cache, entries, captured, slots, plan)
    return plan


def _first_line(entries: list[Entry]) -> str | None:
    return next((entry.where for entry in entries if entry.where), None)


def _stepped(entries: list[Entry]) -> list[torch.optim.Optimizer]:
    """The optimizers whose steps are operators of the graph.

    The Python of a recorded `step()` has run, and may have put other tensors into its optimizer's state.
    """
    return [o for entry in entries if entry.function is not step_ends for o in entry.optimizers]


def _exported(slots: list[Slot], exports: Sequence[Slot], captured: CapturedStep) -> list[int]:
    """Numbers of the slots that are wanted; what a checkpointed block has for itself alone has no value outside."""
    wanted = set(exports)
    return [number for number, slot in enumerate(slots) if slot in wanted and slot in captured.outputs]


def _read(
    captured: CapturedStep, live: list[Node], results: list[int], donated: list[LiftedTensor]
) -> list[LiftedTensor]:
    """The tensors that the program reads and does not consume."""
    used = {number for node in live for number in references(node)} | set(results)
    return [item for item in captured.lifted if item not in donated and item.value in used]


def _step_values(
    captured: CapturedStep,
    donated: list[LiftedTensor],
    read: list[LiftedTensor],
    gradients: list[int],
    outputs: list[int],
) -> StepValues:
    return StepValues(
        state=[item.value for item in donated],
        memory=[-2 - index for index in range(len(gradients))],
        inputs=[*(item.value for item in read), *(value for _, _, value in captured.leaves)],
        seeds=[value for _, value in captured.seeds],
        numbers=[value for _, value in captured.numbers],
        returned=[*(item.new_value for item in donated), *gradients, *outputs],
    )


def _plan_gradients(
    registry: "OptimizerRegistry", entries: list[Entry], captured: CapturedStep, purpose: Purpose
) -> GradientPlan:
    """Decides which gradients are stored, which are dropped and which become None."""
    plan = GradientPlan()
    known: set[int] = set()
    for tensor in _whose_gradients_are_read(entries):
        if id(tensor) not in known and real_gradient(tensor) is None:
            known.add(id(tensor))
            plan.missing.append(weakref.ref(tensor))
    if purpose is Purpose.PEEK:
        return plan
    stepped = {id(optimizer) for entry in entries for optimizer in entry.optimizers}
    cleared = _cleared_inside(captured) if not registry.keep_gradients else set()

    def keeps(parameter: torch.Tensor) -> bool:
        if id(registry.owner(parameter)) not in stepped:
            return True
        return registry.keeps_gradient(parameter) and id(parameter) not in cleared

    for parameter, value in captured.gradients:
        if value is None:
            plan.cleared.append(parameter)
        elif keeps(parameter()):
            plan.stored.append((parameter, value))
        else:
            plan.consumed.append(parameter)
        if value is not None and real_gradient(parameter()) is None and id(parameter()) not in known:
            plan.missing.append(parameter)
    for item in captured.lifted:
        if item.gradient_of is not None and not keeps(item.gradient_of()):
            plan.dropped.add(id(item))
            plan.consumed.append(item.gradient_of)
    return plan


def _whose_gradients_are_read(entries: list[Entry]) -> Iterator[torch.Tensor]:
    """The parameters of which entries ask whether there is a gradient: those of a step, and what is clipped."""
    for entry in entries:
        for optimizer in entry.optimizers if entry.function is not step_ends else ():
            yield from parameters_of(optimizer)
        if entry.reads_gradients:
            yield from (leaf for leaf in entry.leaves if isinstance(leaf, torch.Tensor))


def _cleared_inside(captured: CapturedStep) -> set[int]:
    """The parameters whose gradients the step replaces without adding to the old ones: by `zero_grad`, first of all."""
    new = [value for _, value in captured.gradients if value is not None]
    used = {number for node in captured.graph.live_nodes(new) for number in references(node)}
    replaced = {id(item.gradient_of()) for item in captured.lifted if item.gradient_of and item.value not in used}
    return replaced & {id(parameter()) for parameter, value in captured.gradients if value is not None}


def _written(captured: CapturedStep, gradients: GradientPlan, purpose: Purpose) -> list[LiftedTensor]:
    """The state that the program gives new values."""
    if purpose is Purpose.PEEK:
        return []
    written = [item for item in captured.lifted if item.new_value != item.value and id(item) not in gradients.dropped]
    if purpose is Purpose.HOLD and any(item.tensor().requires_grad or item.gradient_of for item in written):
        raise CaptureError(reason="parameters or gradients would be held twice")
    return written


def _values_in_common(
    cache: "ProgramCache", entries: list[Entry], captured: CapturedStep, nodes: list[Node], plan: StepPlan
) -> tuple[set[int] | None, int | None]:
    """The inputs that workers divide, as all have them alike, and the version of the divided state.

    What trains is run by all together. What only looks is not: one of them may be alone in looking.
    """
    sharded_state = cache.sharded_state
    trains = plan.purpose is Purpose.COMMIT and any(entry.modes.grad for entry in entries)
    if sharded_state is None or not (plan.waits or trains):
        return None, None
    items = [*plan.donated, *plan.read]
    tensors = sharded_state.common([o for entry in entries for o in entry.optimizers])
    numbers = [*(value for _, value in captured.numbers), *captured.graph.constants]
    found = common_inputs(nodes, items, tensors, numbers)
    sharded_state.forget([i.tensor() for i in items if id(i.tensor()) in tensors and i.value not in found], plan.where)
    return found, sharded_state.version


def _program(
    cache: "ProgramCache", entries: list[Entry], captured: CapturedStep, slots: list[Slot], plan: StepPlan
) -> StepProgram:
    """The plan as a pure function, and what its arrays are."""
    values = plan.values
    precisions = sorted({entry.modes.precision for entry in entries})
    describe = _Describer(cache, entries, captured, plan.common)
    gradients = tuple(describe("gradient", parameter(), "gradient") for parameter, _ in plan.gradients.stored)
    leaves = [entries[entry].leaves[place] for entry, place in plan.leaves]
    arguments = [leaf if isinstance(leaf, Input) else leaf.meta for leaf in leaves]
    exported = [slots[index].meta for index in plan.exports]
    common = None if plan.common is None else sorted(plan.common)
    return StepProgram(
        name=plan.name,
        function=_function_of(values, lower(captured.graph, values.returned, precisions, plan.common)),
        state=(*describe.state(plan.donated), *(gradients if plan.writes_gradients else ())),
        inputs=(
            *(describe(f"constant {i}", t.tensor(), "constant", t.value) for i, t in enumerate(plan.read)),
            *(_spec(f"input {i}", a.shape, a.dtype, "batch") for i, a in enumerate(arguments)),
            _spec("seeds", (len(plan.seeds),), torch.int64, "rng"),
            _spec("numbers", (len(plan.numbers),), torch.float64, "hyperparameter"),
        ),
        outputs=(
            *(_spec("output", meta.shape, meta.dtype, "output") for meta in exported),
            *(() if plan.writes_gradients else gradients),
        ),
        digest=graph_cache_key(captured.graph, values.returned, [*values.groups, *precisions, common]),
        is_deterministic=any(entry.modes.deterministic for entry in entries),
        recomputes=any(node.operator == BARRIER for node in captured.graph.nodes),
        tells_apart=plan.common is not None,
    )


def _function_of(values: StepValues, function: Callable[[dict[int, Any]], list[Any]]) -> Callable:
    """The step as a function of state and inputs: `(new_state, outputs)`.

    A last output says whether all values were in range, where an operator asks; the state stays where one was not.
    """
    state_count = len(values.state) + len(values.memory)

    def step(state: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        *arrays, seeds, numbers = inputs
        known = dict(zip(values.state, state, strict=False))
        known.update(zip(values.inputs, arrays, strict=True))
        known.update({value: seeds[index] for index, value in enumerate(values.seeds)})
        known.update({value: numbers[index] for index, value in enumerate(values.numbers)})
        with value_checks.collecting() as conditions:
            results = function(known)
        new_state, outputs = tuple(results[:state_count]), tuple(results[state_count:])
        if not conditions:
            return new_state, outputs
        # The selection is fused into the update, which reads the old value anyway.
        holds = conditions.all()
        pairs = zip(new_state[: len(values.state)], state, strict=False)
        kept = (
            new if conditions.keeps(new) else lax.select(lax.broadcast(holds, old.shape), new, old)
            for new, old in pairs
        )
        return (*kept, *new_state[len(values.state) :]), (*outputs, holds)

    return step


class _Describer:
    """Describes tensors that may be divided between devices which share their layer, or between workers."""

    def __init__(self, cache: "ProgramCache", entries: list[Entry], captured: CapturedStep, common: set[int] | None):
        layers = cache.layers
        layers.see({id(module): module for entry in entries for module in entry.modules}.values())
        self._dims = layers.dims([o for entry in entries for o in entry.optimizers], captured.lifted)
        self._common = common
        self._names = tensor_names(entries)
        stepped = {id(optimizer): optimizer for entry in entries for optimizer in entry.optimizers}.values()
        self._kept = {id(value) for o in stepped for state in o.state.values() for value in state.values()}

    def __call__(self, name: str, tensor: torch.Tensor, role: Role, value: int | None = None) -> TensorSpec:
        """The description of a tensor that is this value of the graph."""
        common = self._common is not None and value in self._common
        spec = _spec(name, tensor.shape, tensor.dtype, role)
        return replace(spec, tensor_dim=self._dims.get(id(tensor)), is_common=common)

    def state(self, items: list[LiftedTensor]) -> list[TensorSpec]:
        """The descriptions of training state."""
        return [
            self(self._names.get(id(tensor), f"state {index}"), tensor, self._role(tensor), value)
            for index, (tensor, value) in enumerate((item.tensor(), item.value) for item in items)
        ]

    def _role(self, tensor: torch.Tensor) -> Role:
        if isinstance(tensor, nn.Parameter):
            return "parameter"
        return "optimizer" if id(tensor) in self._kept else "buffer"


def _spec(name: str, shape, dtype: torch.dtype, role) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(shape), dtype=jax_dtype(dtype), role=role)
