"""Runs the tape: as programs, for good or for a look, and in torch where no program can be made of it."""

import weakref
from typing import Any, NoReturn

import torch
from torch import nn

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, FallbackError, NotEnoughMemoryError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.aot.recorded_step import RecordedStep, pretend
from trainingcompiler.frameworks.pytorch.capture.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD, stored_gradient
from trainingcompiler.frameworks.pytorch.interop.module_tensors import ModuleIndex
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.runtime.compile_policy import CompilePolicy, NotWorthCompilingError
from trainingcompiler.frameworks.pytorch.runtime.optimizer_registry import OptimizerRegistry
from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose
from trainingcompiler.frameworks.pytorch.session.backward_pieces import LeftToTorch
from trainingcompiler.frameworks.pytorch.session.ddp import DdpHandler
from trainingcompiler.frameworks.pytorch.session.fallback import FallbackPolicy
from trainingcompiler.frameworks.pytorch.session.peeks import Peeks
from trainingcompiler.frameworks.pytorch.session.tape_in_torch import run_in_torch
from trainingcompiler.frameworks.pytorch.state.ownership import is_foreign, is_referred_to
from trainingcompiler.frameworks.pytorch.state.shared_tensors import input_array
from trainingcompiler.frameworks.pytorch.tape.call_key import (
    CallKey,
    InputKey,
    StateKey,
    again_key,
    constant_key,
    is_met,
    slot_key,
)
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import take_contents
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, live_among, memory_of, step_ends
from trainingcompiler.frameworks.pytorch.tape.recording import Recording, numbers_of
from trainingcompiler.frameworks.pytorch.tape.replay import as_called
from trainingcompiler.frameworks.pytorch.tape.tape import Tape
from trainingcompiler.planning import planner
from trainingcompiler.planning.memory_advice import with_memory_advice
from trainingcompiler.targets.target import Target


class TapeRunner:
    """The tape, and what becomes of its entries.

    Attributes:
        tape: What has been recorded and not been committed.
        recording: Every path that a tape has taken.
        modules: The tensors of modules.
        device: Where the tensors of the last module that has any are.
        programs: What has been compiled.
        registry: What is known of optimizers.
        fallbacks: What is left to torch.
        workers: Of a script of several processes.
        peeks: Looks at values while the tape goes on.
        called_since_backward: The modules whose calls a backward on the tape went through, by identity.
        backward_compiled: Whether the last backward ran as a program.
        is_in_torch: Whether torch runs the rest of this step, since it has run its beginning.
        depth: How many calls of modules, or steps of optimizers, are being recorded, one inside another.
        buffers: The tensors that the innermost of them knows by identity because they are kept, by identity.
    """

    deferring: bool

    def __init__(self, config: TrainingCompilerConfig):
        self.recording = Recording()
        self.tape = Tape(self.recording.root)
        self.modules = ModuleIndex()
        self.device = devices.CPU
        target = Target.of(config)
        self.registry = OptimizerRegistry(config.keep_gradients or target.is_one_cpu)
        is_alone = target.device_count == target.workers == 1
        self.programs = ProgramCache(self.registry, target, config.verify, CompilePolicy(config.engine, is_alone))
        self.fallbacks = FallbackPolicy(config)
        self.workers: DdpHandler | None = None
        self.backward_compiled = False
        self.is_in_torch = False
        self.depth = 0
        self.buffers: set[int] = set()
        self.replaced: set[int] = set()  # buffers that are known by their values, until they are written to
        self._has_backward = False
        self.called_since_backward: set[int] = set()
        self.peeks = Peeks(self)

    @section.around
    def commit(self) -> None:
        """Runs the entries that no live value needs a gradient through, for good."""
        count = self.tape.committable()
        if count == 0:
            return
        self._check_not_in_backward("reads or changes the model's state")
        if self._has_backward and any(slot.live for slot in self.tape.new_leaves):
            return self.run_eagerly(CaptureError("the gradient of a result may be read", user_line()))
        entries, rest = self.tape.entries[:count], self.tape.entries[count:]
        # Wanted are the values that the rest of the tape reads, and those that the script still holds.
        exports = live_among(entries)
        if rest:
            needed = {slot for entry in rest for slot in entry.slots()}.union(exports)
            exports = [slot for entry in entries for slot in entry.outputs if slot in needed]
        self._check_gradients(entries)
        # Entries that leave nothing behind: their values are there already, or torch computes a few sooner than XLA.
        is_a_look = self.peeks.is_a_look(entries) and planner.current is None
        if is_a_look and (all(slot.value is not None for slot in exports) or self.peeks.in_torch(entries)):
            return self._committed(entries, rest)
        if planner.current is not None and self._planned(entries, planner.current):
            return self._committed(entries, rest)
        # All others run as a program; one that cannot be made, or does not fit, has torch run them, or another try.
        try:
            with passthrough():
                self.programs.run(entries, exports, Purpose.COMMIT, self.tape.grad_flags)
        except (CaptureError, NotEnoughMemoryError, ConcretizationError) as error:
            return self.commit() if self.tries_again(error, entries) else None
        self._committed(entries, rest)
        return None

    def state_is_read(self) -> None:
        """Brings the buffers and parameters of modules up to date, before somebody reads all of them."""
        if (self.tape.written or self.has_backward) and not in_passthrough():
            self.settle()

    @section.around
    def settle(self) -> None:
        """Sees to it that nothing is pending: what cannot be committed, torch runs."""
        self.commit()
        if self.tape:
            reason = "the model's state is read or changed between a call and its backward()"
            self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))

    @section.around
    def value(self, slot: Slot) -> torch.Tensor:
        """The real tensor of a slot, computed now if it has not been."""
        return self.peeks.value(slot) if slot.value is None else slot.value

    @section.around
    def run_eagerly(self, error: CaptureError, culprit: nn.Module | torch.optim.Optimizer | None = None) -> None:
        """Runs the tape in torch, with its gradient history, and leaves what is on it to torch from now on.

        Args:
            error: Why. A `PassingCaptureError` is a reason for one step only.
            culprit: A module or optimizer, not on the tape, that is left to torch too.

        Raises:
            FallbackError: The user wants no fallback.
        """
        self._check_not_in_backward(f"does what only torch can: {error.reason}")
        items: list[Any] = [*self.tape.roots, *(o for entry in self.tape.entries for o in entry.optimizers)]
        if not self.tape.roots:
            owners = (self.registry.owner(tensor) for tensor, _ in self.tape.grad_flags.values())
            items += {id(owner): owner for owner in owners if owner is not None}.values()
        if error.culprit is not None:
            items = [error.culprit]
        try:
            self.fallbacks.leave(error, [item for item in (*items, culprit) if item is not None])
        except FallbackError:
            self._drop()
            raise
        self._check_gradients(self.tape.entries)
        self.begin_in_torch()

    def _check_not_in_backward(self, what: str) -> None:
        """Has torch run a backward whose Python wants what a tape that is being recorded cannot give.

        Raises:
            LeftToTorch: Such Python is running.
        """
        if self.tape.is_in_backward:
            raise LeftToTorch(f"Python that backward() runs {what}")

    def is_undecided(self) -> bool:
        """Whether a first step turns out to be torch's: the script has not cleared gradients before it."""
        return self.registry.is_undecided(tensor for tensor, _ in self.tape.grad_flags.values())

    def begin_in_torch(self) -> None:
        """Runs the tape in torch, and lets torch run what follows until the step ends."""
        entries, flags = self.tape.entries, self.tape.grad_flags
        blocks = {
            region: None if block.has_inner or region in self.tape.ran_again else block.again
            for region, block in self.tape.blocks.items()
        }
        self._drop()
        self.is_in_torch = True
        self.backward_compiled = False
        with passthrough():
            for tensor, flag in flags.values():
                if tensor.requires_grad != flag and tensor.is_leaf:
                    tensor.requires_grad_(flag)
            run_in_torch(entries, blocks)
        for entry in entries:
            for slot in entry.outputs:
                materialize(slot)

    def _drop(self) -> None:
        self.tape = Tape(self.recording.root)
        self.called_since_backward = set()
        self._has_backward = False
        self.peeks.speculation.forget()
        self.emptied()

    @section.around
    def finish(self) -> None:
        """Computes everything that has been asked for, gradients of a step that was aborted half-way included."""
        self.commit()
        for slot in self.tape.live_slots():
            self.value(slot)
        self.programs.dispatch_queue.settle()
        if self.programs.sharded_state is not None:
            self.programs.sharded_state.end()
        self.deferring = False

    @property
    def has_backward(self) -> bool:
        """Whether a backward is on the tape, so that only the tape knows the gradients."""
        return self._has_backward

    def emptied(self) -> None:
        """Is called when nothing is pending any more."""

    def _planned(self, entries: list[Entry], waiting: planner.Planner) -> bool:
        """Hands a step over to who plans it, and passes over a batch that only adds to gradients."""
        backwards = [entry.where for entry in entries if entry.function is BACKWARD]
        waiting.backwards.update(backwards)
        if any(entry.optimizers for entry in entries):
            waiting.take(RecordedStep(self.programs, entries))
        if backwards:
            with passthrough():
                pretend(entries)
        return bool(backwards)

    def _committed(self, entries: list[Entry], rest: list[Entry]) -> None:
        self.backward_compiled |= self.has_backward
        for entry in entries:
            for slot in entry.outputs:
                slot.committed = True
        self.rebuild(rest)
        for entry in entries:
            for slot in entry.outputs:
                if not slot.requires_grad:
                    materialize(slot)

    def rebuild(self, entries: list[Entry]) -> None:
        """Makes a tape of entries that are left of one."""
        old = self.tape
        self.tape = tape = Tape(self.recording.root)
        self.called_since_backward = set()
        self._has_backward = False
        self.peeks.speculation.forget()
        if not entries:
            self.emptied()
            return
        tape.roots, tape.state, tape.region_count = old.roots, old.state, old.region_count
        tape.new_leaves, tape.has_pieces = old.new_leaves, old.has_pieces
        stays = set(map(id, entries))
        gone = {entry.region for entry in old.entries if id(entry) not in stays}
        tape.blocks = {region: block for region, block in old.blocks.items() if region not in gone}
        tape.ran_again = old.ran_again
        with torch._C.DisableTorchFunction():  # our own looks at tensors that the tape writes to
            met: dict[Input, int] = {}
            for entry in entries:
                self._append_again(tape, entry, met)

    def _append_again(self, tape: Tape, entry: Entry, met: dict[Input, int]) -> None:
        """Writes an entry on a new tape, its results and inputs numbered anew.

        Args:
            tape: The new one.
            entry: Of the old one.
            met: The numbers of inputs that the new one has met.
        """
        old = entry.call
        assert old is not None
        keys: list[tuple] = []
        for position, leaf in enumerate(entry.leaves):
            if type(leaf) is Slot and leaf.committed:
                leaf = entry.leaves[position] = self._as_input(leaf)
                keys.append(InputKey(leaf.shape, leaf.dtype, leaf.device, leaf.strides))
            elif type(leaf) is Slot:
                keys.append(leaf.key)
            elif position in old.numbers and type(leaf) is float:
                keys.append(constant_key(leaf))
            elif type(leaf) is Input and leaf in met:
                keys.append(again_key(met[leaf]))
            elif type(leaf) is Input and is_met(old.key.leaves[position]):
                met[leaf], tape.input_count = tape.input_count, tape.input_count + 1
                keys.append(InputKey(leaf.shape, leaf.dtype, leaf.device, leaf.strides, met[leaf]))
            else:
                known = old.key.leaves[position]
                if isinstance(known, StateKey) and isinstance(leaf, torch.Tensor):
                    tape.grad_flags.setdefault(id(leaf), (leaf, known.requires_grad))
                keys.append(known)
        key = CallKey(entry.function, entry.structure, tuple(keys), entry.modes, entry.region, self._patterns(entry))
        call = self.recording.follow(tape.place, key, entry.leaves)
        call.shape = old.shape
        entry.call, entry.numbers = call, numbers_of(call, entry.leaves)
        for slot in entry.outputs:
            slot.number, slot.producer = tape.slot_count, len(tape.entries)
            slot.key = slot_key(slot.number)
            tape.slot_count += 1
        tape.entries.append(entry)
        tape.places.append(tape.place)
        tape.place = call
        if entry.writes:
            tape.mutated = True
        for position in entry.writes:
            memory = memory_of(entry.leaves[position])
            if isinstance(memory, torch.Tensor):
                tape.written.add(memory.untyped_storage()._cdata)
        if entry.function is BACKWARD:
            self._note_backward()

    def backward_recorded(self, entry: Entry) -> None:
        """Takes note of a backward, the tape's last entry: stores gradients that a look before has computed already."""
        gradients = self._note_backward()
        held = self.peeks.speculation.backward(self.tape, entry)
        if held is not None and self.tape.committable() == len(self.tape.entries):
            self._check_gradients(self.tape.entries)
            with passthrough():
                held.apply()
            self._committed(self.tape.entries, [])
        elif any(map(_is_seen_elsewhere, gradients)):  # by NumPy it may be, of whose looks nobody is told
            self.commit()
            if self._has_backward:
                self.settle()

    def _note_backward(self) -> list[torch.Tensor]:
        """Notes that gradients are pending, and the memory of those that are added to, which others may know.

        Returns:
            The gradients that are added to.
        """
        tape, found = self.tape, []
        self._has_backward = True
        self.called_since_backward = {id(module) for module in tape.roots}
        with torch._C.DisableTorchFunction():
            for leaf, _ in tape.grad_flags.values():
                gradient = stored_gradient(leaf) if leaf.requires_grad else None
                if gradient is not None and gradient.layout is torch.strided:
                    tape.written.add(gradient.untyped_storage()._cdata)
                    found.append(gradient)
        return found

    def _patterns(self, entry: Entry) -> tuple:
        with as_called(entry):
            return self.patterns(entry.function, entry.optimizers)

    def patterns(self, function: Any, optimizers: tuple[torch.optim.Optimizer, ...]) -> tuple:
        """What is known of the optimizers whose step an entry is; nothing where their Python has run."""
        return () if function is step_ends else tuple(map(self.registry.pattern, optimizers))

    def _check_gradients(self, entries: list[Entry]) -> None:
        for entry in entries:
            for optimizer in entry.optimizers:
                self.registry.check_unconsumed(parameters_of(optimizer))

    def tries_again(self, error: Exception, entries: list[Entry]) -> bool:
        """Answers why entries are no program: true if they may be one now, and else torch has run the tape.

        Raises:
            NotEnoughMemoryError: `error` is one; what would need less is said with it.
            FallbackError: The user wants no fallback.
        """
        if isinstance(error, NotEnoughMemoryError):
            self._give_up(error, entries)
        if isinstance(error, ConcretizationError) and self._make_constant(entries, error):
            return True
        if isinstance(error, NotWorthCompilingError):
            self._check_gradients(self.tape.entries)
            self.programs.policy.begin_in_torch(entries)
            self.begin_in_torch()
            return False
        self.run_eagerly(error if isinstance(error, CaptureError) else _unusable(error))
        return False

    def _give_up(self, error: NotEnoughMemoryError, entries: list[Entry]) -> NoReturn:
        self._drop()
        with passthrough():
            raise with_memory_advice(error, RecordedStep(self.programs, entries), self.programs.target) from None

    def _make_constant(self, entries: list[Entry], error: ConcretizationError) -> bool:
        source: Any = error.source
        if source is None:
            return False
        if source.optimizer is not None:
            fixed = self.registry.fix_number(source.optimizer(), source.position)
        else:
            entry = entries[source.entry]
            index = self.tape.entries.index(entry)
            assert entry.call is not None
            self.recording.fix_number(self.tape.places[index], entry.call, source.position)
            fixed = True
        if fixed:  # the path is another one now
            has_backward, called = self._has_backward, self.called_since_backward
            self.rebuild(self.tape.entries)
            self._has_backward, self.called_since_backward = has_backward, called
        return fixed

    def _as_input(self, slot: Slot) -> Input:
        """A slot whose entries have left the tape, as the value it is."""
        assert slot.value is not None
        array = input_array(slot.value, self.programs.target.is_one_cpu)
        strides = None if slot.value.is_contiguous() else slot.value.stride()
        return Input(array, tuple(slot.value.shape), slot.value.dtype, device=slot.device, strides=strides)


def _is_seen_elsewhere(gradient: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return is_referred_to(gradient.untyped_storage()) or is_foreign(gradient)


def materialize(slot: Slot) -> None:
    """Makes the deferred tensor that the loop holds of a slot the real one: every library can look at it then.

    No leaf of a graph: torch forbids the node that accumulates its gradient, once contents have been swapped.
    """
    if slot.value is not None and not (slot.value.requires_grad and slot.value.is_leaf):
        become_real(slot)


def become_real(slot: Slot) -> None:
    """`materialize`, of a leaf too, which is in no graph."""
    wrapper = None if slot.wrapper is None else slot.wrapper()
    if wrapper is None or slot.value is None:
        return
    slot.wrapper = None  # a tensor with weak references cannot be swapped
    value = slot.value
    try:
        with torch._C.DisableTorchFunction():
            take_contents(wrapper, value)
    except RuntimeError:  # somebody else refers to it weakly
        slot.wrapper = weakref.ref(wrapper)
        return
    slot.value = wrapper


def _unusable(error: Exception) -> CaptureError:
    unusable = CaptureError("the step decides by the value of a number that is computed in it", user_line())
    unusable.__cause__ = error  # shown by --debug
    return unusable
