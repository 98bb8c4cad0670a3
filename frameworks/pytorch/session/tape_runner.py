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
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, outside_transforms, passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.runtime.optimizer_registry import OptimizerRegistry
from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose
from trainingcompiler.frameworks.pytorch.runtime.torch_peek import value_of
from trainingcompiler.frameworks.pytorch.session.backward_pieces import LeftToTorch
from trainingcompiler.frameworks.pytorch.session.ddp import DdpHandler
from trainingcompiler.frameworks.pytorch.session.fallback import FallbackPolicy
from trainingcompiler.frameworks.pytorch.session.speculation import Speculation
from trainingcompiler.frameworks.pytorch.session.tape_in_torch import run_in_torch
from trainingcompiler.frameworks.pytorch.state.shared_tensors import input_array
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import take_contents
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, live_among, memory_of, step_ends
from trainingcompiler.frameworks.pytorch.tape.recording import Recording, numbers_of
from trainingcompiler.frameworks.pytorch.tape.replay import as_called
from trainingcompiler.frameworks.pytorch.tape.tape import Tape
from trainingcompiler.planning import planner
from trainingcompiler.planning.memory_advice import with_memory_advice
from trainingcompiler.targets.target import Target

_FEW_CALLS = 64  # as many are computed by torch for a look at a value; more are worth a program


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
        self.programs = ProgramCache(self.registry, target, config.verify)
        self.fallbacks = FallbackPolicy(config)
        self.workers: DdpHandler | None = None
        self.backward_compiled = False
        self.is_in_torch = False
        self.depth = 0
        self.buffers: set[int] = set()
        self.replaced: set[int] = set()  # buffers that are known by their values, until they are written to
        self._has_backward = False
        self._called_since_backward: set[int] = set()
        self._speculation = Speculation(self.programs, self.recording)

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
        is_a_look = self._is_a_look(entries) and planner.current is None
        if is_a_look and (all(slot.value is not None for slot in exports) or self._peek_in_torch(entries)):
            return self._committed(entries, rest)
        if planner.current is not None and self._planned(entries, planner.current):
            return self._committed(entries, rest)
        # All others run as a program; one that cannot be made, or does not fit, has torch run them, or another try.
        try:
            with passthrough():
                self.programs.run(entries, exports, Purpose.COMMIT, self.tape.grad_flags)
        except (CaptureError, NotEnoughMemoryError, ConcretizationError) as error:
            return self.commit() if self._tries_again(error, entries) else None
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
        if slot.value is not None:
            return slot.value
        if self.tape.is_in_backward:
            return self._value_in_backward(slot)
        producers = self.tape.producers()
        if slot not in producers:
            raise AssertionError("a deferred tensor lost its tape")
        if self.tape.second_run is not None and self.tape.entries[producers[slot]].second is not None:
            raise LeftToTorch("a checkpointed block that computes something else when it runs again asks for a value")
        apart = self.workers is not None and self.workers.may_be_looked_at(self.tape, slot)
        if self.depth and self._peek_few(slot):
            return slot.value
        if len(self.tape.roots) > 1 and not self._has_backward and not self.depth:
            self._forget_unread(slot)
            producers = self.tape.producers()
        if producers[slot] < self.tape.committable() and not apart:
            self.commit()
        else:
            self._peek(slot, apart)
        assert slot.value is not None
        return slot.value

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
        self._begin_in_torch()

    def _check_not_in_backward(self, what: str) -> None:
        """Has torch run a backward whose Python wants what a tape that is being recorded cannot give.

        Raises:
            LeftToTorch: Such Python is running.
        """
        if self.tape.is_in_backward:
            raise LeftToTorch(f"Python that backward() runs {what}")

    def _is_undecided(self) -> bool:
        """Whether a first step turns out to be torch's: the script has not cleared gradients before it."""
        return self.registry.is_undecided(tensor for tensor, _ in self.tape.grad_flags.values())

    def _begin_in_torch(self) -> None:
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
        self._called_since_backward = set()
        self._has_backward = False
        self._speculation.forget()
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

    def _value_in_backward(self, slot: Slot) -> torch.Tensor:
        """A value that Python in backward asks for: torch computes it from the tape up to there.

        When all of that Python has run, once, torch runs the step, and those that follow.

        Raises:
            LeftToTorch: It cannot be computed now: torch has to run that Python again.
        """
        what = "Python that backward() runs asks for a value"
        if not self.programs.target.is_one_cpu or self.workers is not None:
            raise LeftToTorch(what)
        try:
            with passthrough(), outside_transforms():
                constants = lambda optimizer: self.registry.habits(optimizer).constants  # noqa: E731
                slot.value = value_of(list(self.tape.entries), slot, constants, self.tape.grad_flags)
        except (CaptureError, ConcretizationError):
            raise LeftToTorch(what) from None
        self.tape.asked = self.tape.asked or CaptureError(what, user_line())
        return slot.value

    def _peek(self, slot: Slot, apart: bool = False) -> None:
        """Computes values without ending the tape: nothing is committed, the entries will be replayed.

        Args:
            slot: The value that is looked at.
            apart: Whether to compute no other one.
        """
        inside = self.depth > 0
        if not inside and self._is_undecided():
            self._begin_in_torch()
            return None
        entries = self.tape.slice_for([slot])
        if self._is_a_look(entries) and self._peek_in_torch(entries):
            return None
        # A worker that looks must not average gradients which the others do not come to average.
        if self.workers is None and not inside and self._speculation.look(self.tape, slot):
            return None
        slots = [] if apart or inside else [other for other in self.tape.live_slots() if other.value is None]
        if slot not in slots:
            slots.append(slot)
        entries = self.tape.slice_for(slots)
        try:
            with passthrough():
                self.programs.run(entries, slots, Purpose.PEEK, self.tape.grad_flags)
        except (CaptureError, NotEnoughMemoryError, ConcretizationError) as error:
            return self._peek(slot, apart) if self._tries_again(error, entries) else None
        return None

    def _forget_unread(self, slot: Slot) -> None:
        """Takes calls off the tape whose results nobody holds any more: forwards of batches that were skipped."""
        if any(entry.writes or entry.optimizers or entry.acts_on_graph for entry in self.tape.entries):
            return
        if self.tape.blocks:  # a block that runs again is compared with all of its first run
            return
        needed = self.tape.behind([slot, *self.tape.live_slots()])
        if len(needed) < len(self.tape.entries):
            read, stays = self.tape.read, [self.tape.entries[index] for index in sorted(needed)]
            self._rebuild(stays)
            leaves = {id(leaf) for entry in stays for leaf in entry.leaves}
            self.tape.read = [one for one in read if id(one[2]) in leaves]

    def _peek_few(self, slot: Slot) -> bool:
        """Has torch compute a value that a forward asks for, if few calls are behind it; returns whether it has."""
        entries = self.tape.slice_for([slot])
        return len(entries) <= _FEW_CALLS and self._peek_in_torch(entries)

    def _is_a_look(self, entries: list[Entry]) -> bool:
        """Whether entries only look at state: `sum(p.norm() for p in model.parameters())` in a line of a log."""
        if len(entries) > _FEW_CALLS or self.tape.roots:
            return False
        return not any(entry.seed is not None or entry.writes_state for entry in entries)

    def _peek_in_torch(self, entries: list[Entry]) -> bool:
        """Computes a value that the script's Python asks for from the few calls behind it; returns whether it could."""
        if any(entry.seed is not None or entry.writes_state for entry in entries):
            return False
        with passthrough(), torch.no_grad():
            run_in_torch(entries)
        for entry in entries:
            for slot in entry.outputs:
                slot.committed = False
        return True

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
        self._rebuild(rest)
        for entry in entries:
            for slot in entry.outputs:
                if not slot.requires_grad:
                    materialize(slot)

    def _rebuild(self, entries: list[Entry]) -> None:
        """Makes a tape of entries that are left of one."""
        old = self.tape
        self.tape = tape = Tape(self.recording.root)
        self._called_since_backward = set()
        self._has_backward = False
        self._speculation.forget()
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
            for entry in entries:
                self._append_again(tape, entry)

    def _append_again(self, tape: Tape, entry: Entry) -> None:
        kinds: list[tuple] = []
        old: Any = entry.call
        for position, leaf in enumerate(entry.leaves):
            if type(leaf) is Slot and leaf.committed:
                leaf = entry.leaves[position] = self._as_input(leaf)
                laid_out = () if leaf.strides is None else (leaf.strides,)
                kinds.append(("input", leaf.shape, leaf.dtype, leaf.device, *laid_out))
            elif type(leaf) is Slot:
                kinds.append(("slot", leaf.number))
            elif position in old.numbers and type(leaf) is float:
                kinds.append((float, leaf))
            else:
                kind = old.kinds[position]
                if isinstance(leaf, torch.Tensor):
                    tape.grad_flags.setdefault(id(leaf), (leaf, kind[-1]))
                kinds.append(kind)
        call = self.recording.follow(
            tape.place,
            entry.function,
            entry.structure,
            tuple(kinds),
            entry.leaves,
            entry.modes,
            entry.region,
            self._patterns(entry),
        )
        call.shape = old.shape
        entry.call, entry.numbers = call, numbers_of(call, entry.leaves)
        for slot in entry.outputs:
            slot.number = tape.slot_count
            slot.kind = ("slot", slot.number)
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
            self._has_backward = True
            self._called_since_backward = {id(module) for module in tape.roots}
            self._note_gradients(tape)

    @staticmethod
    def _note_gradients(tape: Tape) -> list[torch.Tensor]:
        """Notes the memory of the gradients that a backward adds to, which a script may know by another tensor.

        Returns:
            These gradients.
        """
        found = []
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

    def _tries_again(self, error: Exception, entries: list[Entry]) -> bool:
        """Answers why entries are no program: true if they may be one now, and else torch has run the tape.

        Raises:
            NotEnoughMemoryError: `error` is one; what would need less is said with it.
            FallbackError: The user wants no fallback.
        """
        if isinstance(error, NotEnoughMemoryError):
            self._give_up(error, entries)
        if isinstance(error, ConcretizationError) and self._make_constant(entries, error):
            return True
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
            has_backward, called = self._has_backward, self._called_since_backward
            self._rebuild(self.tape.entries)
            self._has_backward, self._called_since_backward = has_backward, called
        return fixed

    def _as_input(self, slot: Slot) -> Input:
        """A slot whose entries have left the tape, as the value it is."""
        assert slot.value is not None
        array = input_array(slot.value, self.programs.target.is_one_cpu)
        strides = None if slot.value.is_contiguous() else slot.value.stride()
        return Input(array, tuple(slot.value.shape), slot.value.dtype, device=slot.device, strides=strides)


def materialize(slot: Slot) -> None:
    """Makes the deferred tensor that the loop holds of a slot the real one: every library can look at it then."""
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
