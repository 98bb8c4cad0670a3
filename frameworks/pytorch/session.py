"""The session: decides what is deferred, keeps the tape, and runs it.

This is where an unmodified loop meets the compiled step. The loop calls; the session records (`call`, `call_module`),
and computes when the tape ends (`commit`) or somebody looks (`value`).
"""

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainingcompiler import planner
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.cures import with_cures
from trainingcompiler.errors import CaptureError, FallbackError, NotEnoughMemoryError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.calls import CallBook, detached
from trainingcompiler.frameworks.pytorch.compiled_tape import Purpose
from trainingcompiler.frameworks.pytorch.deferred import (
    METADATA,
    METADATA_METHODS,
    READS,
    DeferredTensor,
    functional_name,
    is_in_place,
)
from trainingcompiler.frameworks.pytorch.fallback import ANOMALY, Fallbacks
from trainingcompiler.frameworks.pytorch.guard import StateGuard, versions
from trainingcompiler.frameworks.pytorch.loops import OptimizerBook
from trainingcompiler.frameworks.pytorch.numbers import NumberUsed
from trainingcompiler.frameworks.pytorch.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.planned import RecordedStep, pretend
from trainingcompiler.frameworks.pytorch.plans import Argument, Output, Plan, plan
from trainingcompiler.frameworks.pytorch.programs import ProgramCache
from trainingcompiler.frameworks.pytorch.recorder import user_line
from trainingcompiler.frameworks.pytorch.replaying import is_replaying, undeferred
from trainingcompiler.frameworks.pytorch.speculation import Speculation
from trainingcompiler.frameworks.pytorch.state import input_array
from trainingcompiler.frameworks.pytorch.stepping import Stepping
from trainingcompiler.frameworks.pytorch.structure import flatten, map_leaves, unflatten
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot, Tape, run_in_torch
from trainingcompiler.frameworks.pytorch.workers import Workers, averages_unseen, not_joined, obstacle
from trainingcompiler.statistics import current as statistics
from trainingcompiler.targets import Target

_OPAQUE = frozenset({"register_hook", "retain_grad", "__set__", "grad"})
_LONGEST_TAPE = 512  # entries; a list of results that nobody looks at must not grow one without end


class Session:
    """Everything that is known about the training loops of this process.

    Attributes:
        config: What the user asked for.
        deferring: Whether calls are recorded at this moment; the engine turns it on and off between steps.
    """

    def __init__(self, config: TrainingCompilerConfig):
        self.config = config
        self.deferring = False
        self.calls = CallBook()
        self.book = OptimizerBook(config.keep_gradients)
        self.programs = ProgramCache(self.book, Target.of(config))
        self.tape = Tape()
        self._thread = threading.get_ident()
        self._plans: dict[tuple, Plan] = {}
        self.workers = Workers(self) if self.programs.target.workers > 1 else None
        self.fallbacks = Fallbacks(config, None if self.workers is None else self.workers.left_to_torch)
        self._guard = StateGuard(self._before_write, self.commit)
        self.backward_compiled = False  # whether the last backward ran as a program
        self.stepping = Stepping(self)
        self._called_since_backward: set[int] = set()
        self._speculation = Speculation(self.programs, self.calls)

    # -- what the loop does -------------------------------------------------------------------------------------

    def call_module(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Does what calling a module does: records the call if it belongs to training, or runs it."""
        if self.is_unwatched():
            return original(module, *args, **kwargs)
        if isinstance(module, DistributedDataParallel):
            if self.workers is not None:
                return self.workers.call(original, module, args, kwargs)
            if averages_unseen(module):
                if not self.fallbacks.covers(module):
                    self.fallbacks.leave(not_joined(), [module, module.module])
            elif obstacle(module) is None:
                module = module.module  # of one process: there is nothing to average
        if not self.is_deferrable(module, args, kwargs):
            self.backward_compiled &= not torch.is_grad_enabled()
            with undeferred():
                return original(module, *self.real(args), **self.real(kwargs))
        self._sweep()
        self._bound_tape()
        if not torch.is_grad_enabled() and not self.tape:
            return self._run_at_once(module, args, kwargs)
        if id(module) in self._called_since_backward:  # gradient accumulation: one program for each micro-batch
            self.commit()
        return self.record(module, args, kwargs)

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` does, where some argument is a `DeferredTensor`."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            attribute = getattr(getattr(function, "__self__", None), "__name__", "")
            if attribute in METADATA:
                return getattr(args[0].slot.meta, attribute)
            if attribute in ("grad", "_grad"):
                return None
        elif name in METADATA_METHODS:
            return function(args[0].slot.meta, *args[1:], **kwargs)
        elif name in ("isnan", "isinf") and args[0].slot.finite:
            return torch.zeros(args[0].slot.meta.shape, dtype=torch.bool)
        if name in READS and not is_replaying():
            statistics().host_reads += 1
        if is_replaying() or name in READS or not self._any_pending(args, kwargs):
            return function(*self.real(args), **self.real(kwargs))
        if self._bound_tape():
            return function(*self.real(args), **self.real(kwargs))
        if name in _OPAQUE or kwargs.get("create_graph"):
            self.run_eagerly(CaptureError(reason=f"the loop uses {name} on a result", where=user_line()))
            return function(*self.real(args), **self.real(kwargs))
        if function in (torch.autograd.backward, torch.Tensor.backward):
            record = self._record_backward if function is torch.Tensor.backward else self._record_backwards
            record(*args, **kwargs)
            if self.workers is not None:
                self.workers.after_backward()
            return None
        return self.record(function, args, kwargs)

    def reads_gradient(self, tensor: torch.Tensor) -> None:
        """What has to happen before `tensor.grad` is read."""
        if self.is_unwatched():
            return
        if self.has_backward:
            self.commit()
        self.book.reads_gradient(tensor)

    def writes_gradient(self, tensor: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """What to store for `tensor.grad = gradient`."""
        if self.is_unwatched():
            return gradient
        if self.has_backward:
            self.commit()
        self.book.writes_gradient(tensor, gradient)
        return self.value(gradient.slot) if isinstance(gradient, DeferredTensor) else gradient

    def clears_gradients(self, owner: Any, parameters: list[torch.Tensor], set_to_none: bool) -> None:
        """What has to happen before `zero_grad`: nothing is left that only the tape knows."""
        if self.is_unwatched():
            return
        if self.has_backward and not self._drop_backward({id(parameter) for parameter in parameters}):
            self.commit()
        self.book.clears_gradients(owner, parameters, set_to_none)

    def settle(self) -> None:
        """Brings the buffers of modules up to date, as far as nothing needs a gradient through the tape."""
        if not self.is_unwatched():
            self.commit()

    def value(self, slot: Slot) -> torch.Tensor:
        """The real tensor of a slot, computed now if it has not been."""
        if slot.value is not None:
            return slot.value
        producers = self.tape.producers()
        if slot not in producers:
            raise AssertionError("a deferred tensor lost its tape")
        apart = self.workers is not None and self.workers.may_be_looked_at(self.tape, slot)
        if producers[slot] < self.tape.committable() and not apart:
            self.commit()
        else:
            self._peek(slot, apart)
        assert slot.value is not None
        return slot.value

    # -- recording ----------------------------------------------------------------------------------------------

    def record(self, function: Callable, args: tuple, kwargs: dict, gradients_exist: bool = False) -> Any:
        name = getattr(function, "__name__", "")
        target = kwargs.get("out", args[0] if args and is_in_place(name) else None)
        is_pending = isinstance(target, DeferredTensor) and not target.slot.committed
        if isinstance(target, torch.Tensor) and not is_pending:
            return self._write_real(function, args, kwargs)
        try:
            entry = self.append(function, args, kwargs)
        except CaptureError as error:
            return self._record_nothing(function, args, kwargs, error)
        entry.reads_gradients = gradients_exist
        key = (entry.key, gradients_exist, tuple(_described(leaf) for leaf in entry.leaves))
        planned = self._plans.get(key)
        if planned is None:
            try:
                with undeferred():
                    planned = self._plans[key] = plan(entry, gradients_exist)
            except CaptureError as error:
                self.tape.entries.pop()
                return self._record_nothing(function, args, kwargs, error)
            except Exception as error:  # the call's own mistake, or one of fake tensors: torch will say which
                self.tape.entries.pop()
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                failure = CaptureError(reason=reason, where=entry.where or user_line())
                return self._record_nothing(function, args, kwargs, failure)
        return self._results(entry, planned, args, kwargs)

    def append(self, function: Callable, args: tuple, kwargs: dict, optimizers: tuple = ()) -> Entry:
        entry = self.calls.entry(function, args, kwargs, optimizers, self.tape.entries)
        if self.workers is not None:
            entry.in_torch = self.workers.in_torch(function)
        self.tape.entries.append(entry)
        self._guard_state(entry)
        if entry.prints and not self._guard.is_up:
            entry.versions = versions(entry.prints[0].parameters)
        return entry

    def _guard_state(self, entry: Entry) -> None:
        for fingerprint in entry.prints:
            self._guard.watch(fingerprint.tensors)

    def _results(self, entry: Entry, planned: Plan, args: tuple, kwargs: dict) -> Any:
        if planned.random:
            entry.seed = Input(input_array(torch.empty((), dtype=torch.int64).random_()), (), torch.int64)
        closure = [tensor for reference in planned.closure if (tensor := reference()) is not None]
        entry.closure = tuple((t, Input(input_array(t), tuple(t.shape), t.dtype)) for t in closure)
        entry.outputs = [Slot(meta) for meta in planned.metas]
        arguments, _ = flatten((args, kwargs))
        if any(isinstance(leaf, DeferredTensor) and leaf.slot.is_cut for leaf in arguments):
            for slot in entry.outputs:
                slot.freed = True
        wrappers = [DeferredTensor(slot, self) for slot in entry.outputs]
        if planned.writes:
            self._forget_peeked()
        leaves: list[Any] = []
        for leaf in planned.leaves:
            if isinstance(leaf, Output):
                leaves.append(wrappers[leaf.index])
            else:
                leaves.append(arguments[leaf.position] if isinstance(leaf, Argument) else leaf)
        return unflatten(planned.structure, iter(leaves))

    def _forget_peeked(self) -> None:
        self.tape.mutated = True
        for pending in self.tape.producers():
            pending.value = None

    def _record_backward(self, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
        slot = tensor.slot if isinstance(tensor, DeferredTensor) else None
        if slot is not None and slot.freed and slot.committed:
            raise RuntimeError(
                "backward() cannot go through this tensor any more: the graph behind it was freed by an earlier "
                "backward() (pass retain_graph=True to that one), or its parameters have been updated since by "
                "optimizer.step()."
            )
        if slot is None or slot.committed or slot.freed or create_graph:
            reason = "backward() keeps a graph, or goes through a module that another one has gone through"
            self.run_eagerly(CaptureError(reason=reason, where=user_line()))
            return torch.Tensor.backward(self.real(tensor), gradient, retain_graph, create_graph, inputs)
        try:
            entry = self.append(
                torch.Tensor.backward, (tensor, gradient, retain_graph, create_graph), {"inputs": inputs}
            )
        except CaptureError as error:
            self.run_eagerly(error)
            return torch.Tensor.backward(self.real(tensor), self.real(gradient), retain_graph, inputs=inputs)
        if not retain_graph:
            self.tape.free(slot)
        self._called_since_backward = {
            id(entry.function) for entry in self.tape.entries if isinstance(entry.function, nn.Module)
        }
        self._guard.watch_all()
        held = self._speculation.backward(self.tape, entry)
        if held is not None and self.tape.committable() == len(self.tape.entries):
            self._check_gradients(self.tape.entries)
            with undeferred():
                held.apply()
            self._committed(self.tape.entries, [])
        return None

    def _record_backwards(self, tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None) -> None:
        """`torch.autograd.backward`: gradients of several results add up, so one after the other is the same."""
        gradients = [grad_tensors] if isinstance(grad_tensors, torch.Tensor) else grad_tensors or [None] * len(tensors)
        last = len(tensors) - 1
        for index, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
            self._record_backward(tensor, gradient, retain_graph if index == last else True, create_graph, inputs)
        for tensor in tensors:
            if not retain_graph and isinstance(tensor, DeferredTensor) and not tensor.slot.committed:
                self.tape.free(tensor.slot)

    def _record_nothing(self, function, args, kwargs, error: CaptureError) -> Any:
        module = function if isinstance(function, nn.Module) else None
        is_function = module is None and not is_in_place(getattr(function, "__name__", ""))
        if is_function and not (torch.is_grad_enabled() and self._needs_gradient(args, kwargs)):
            self.fallbacks.leave_part(error)  # no gradient passes it, so it is a look at values: a metric, most likely
            return function(*self.real(args), **self.real(kwargs))
        if module is not None and not self.tape and self.book.begins_in_torch(module, self.calls.modules):
            self._guard.rest()
            self.backward_compiled = False
        else:
            self.run_eagerly(error, module)
        if self.workers is not None:
            function = self.workers.in_torch(function) or function
        with undeferred() if module is not None else contextlib.nullcontext():
            return function(*self.real(args), **self.real(kwargs))

    def _write_real(self, function, args, kwargs) -> Any:
        """An in-place call on a tensor that is no result of the tape, with a deferred operand: `total += loss`."""
        total = args[0]
        functional = getattr(torch.Tensor, functional_name(function.__name__), None)
        simple = (
            type(total) in (torch.Tensor, DeferredTensor)
            and functional is not None
            and "out" not in kwargs
            and not total.requires_grad
            and not total._is_view()
            and not self._needs_gradient(args[1:], kwargs)
        )
        result = self.record(functional, args, kwargs) if simple else None
        if (
            isinstance(result, DeferredTensor)
            and torch.can_cast(result.dtype, total.dtype)
            and result.dtype != total.dtype
        ):
            result = self.record(torch.Tensor.to, (result, total.dtype), {})
        if not isinstance(result, DeferredTensor) or (result.dtype, result.shape) != (total.dtype, total.shape):
            return function(*self.real(args), **self.real(kwargs))
        slot = result.slot
        if isinstance(total, DeferredTensor):
            total.slot = slot
        else:
            slot.wrapper = None  # a tensor with weak references cannot be swapped
            torch.utils.swap_tensors(total, result)
        slot.wrapper = weakref.ref(total)
        return total

    def _drop_backward(self, cleared: set[int]) -> bool:
        """Takes back a backward, as an aborted step leaves behind, if all its gradients are being cleared."""
        leaves = [leaf for entry in self.tape.entries for leaf in entry.leaves if isinstance(leaf, torch.Tensor)]
        for entry in self.tape.entries:
            if isinstance(entry.function, nn.Module):
                leaves += self.calls.modules.fingerprint(entry.function).parameters
            elif entry.optimizers or entry.function in self.stepping.clippings:
                return False
        if any(leaf.requires_grad and id(leaf) not in cleared for leaf in leaves):
            return False
        self.tape.entries = [entry for entry in self.tape.entries if entry.function is not torch.Tensor.backward]
        self._called_since_backward = set()
        return True

    def finish(self) -> None:
        """Computes everything that has been asked for, gradients of a step that was aborted half-way included."""
        self._guard.rest()
        self.commit()
        for slot in self.tape.live_slots():
            self.value(slot)
        if self.programs.division is not None:
            self.programs.division.end()
        self.deferring = False

    # -- running ------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Runs the entries that no live value needs a gradient through, for good."""
        count = self.tape.committable()
        if count == 0:
            return
        entries, rest = self.tape.entries[:count], self.tape.entries[count:]
        live = [slot for entry in entries for slot in entry.outputs if slot.live]
        needed = {slot for entry in rest for slot in entry.slots()}
        exports = [slot for entry in entries for slot in entry.outputs if slot in needed or slot in set(live)]
        self._guard.rest()
        self._check_parameters(entries)
        self._check_gradients(entries)
        if planner.current is not None and self._planned(entries, planner.current):
            return self._committed(entries, rest)
        try:
            with undeferred():
                self.programs.run(entries, exports, Purpose.COMMIT)
        except NotEnoughMemoryError as error:
            self._give_up(error, entries)
        except (CaptureError, NumberUsed) as error:
            if isinstance(error, NumberUsed) and self._make_constant(entries, error):
                return self.commit()
            self.run_eagerly(error if isinstance(error, CaptureError) else _unusable(error))
            return None
        self._committed(entries, rest)
        return None

    def _planned(self, entries: list[Entry], waiting: planner.Planner) -> bool:
        """Hands a step over to who plans it, and passes over a batch that only adds to gradients."""
        backwards = [entry.where for entry in entries if entry.function is torch.Tensor.backward]
        waiting.backwards.update(backwards)
        if any(entry.optimizers for entry in entries):
            waiting.take(RecordedStep(self.programs, entries))
        if backwards:
            with undeferred():
                pretend(entries)
        return bool(backwards)

    def _bound_tape(self) -> bool:
        """Runs a tape in torch that has grown too long; returns whether it has."""
        if len(self.tape.entries) < _LONGEST_TAPE:
            return False
        reason = f"{_LONGEST_TAPE} calls have been made and no backward()"
        self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))
        return True

    def _before_write(self) -> None:
        """Computes what has read the state that is about to be written to."""
        if self.tape.committable() == len(self.tape.entries):
            self.commit()
        else:
            reason = "the model's state is changed between a call and its backward()"
            self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))

    def _sweep(self) -> None:
        """Commits calls whose results nobody holds any more, for what they leave behind: buffers."""
        if self.tape and not self.has_backward and not self.tape.live_slots():
            self.commit()

    def _committed(self, entries: list[Entry], rest: list[Entry]) -> None:
        self.backward_compiled |= self.has_backward
        for entry in entries:
            for slot in entry.outputs or ():
                slot.committed = True
        self._guard.rest()
        for entry in rest:
            detached(entry)
            self._guard_state(entry)
        self.tape.entries = rest
        self.tape.mutated = False
        self._called_since_backward = set()
        self._speculation.forget()

    def _check_parameters(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.versions and entry.versions != versions(entry.prints[0].parameters):
                self.tape.entries.clear()
                raise RuntimeError(
                    f"A parameter of {type(entry.function).__name__} was modified in place after the call at "
                    f"{entry.where} and before its backward(), which needs the value that the call saw. Modify it "
                    "before the call, or after optimizer.step()."
                )

    def _check_gradients(self, entries: list[Entry]) -> None:
        for entry in entries:
            for optimizer in entry.optimizers:
                self.book.check_unconsumed(parameters_of(optimizer))

    def _peek(self, slot: Slot, apart: bool = False) -> None:
        """Computes values without ending the tape: nothing is committed, the entries will be replayed.

        Args:
            slot: The value that is looked at.
            apart: Whether to compute no other one.
        """
        # A worker that looks must not average gradients which the others do not come to average.
        if self.workers is None and self._speculation.look(self.tape, slot):
            return None
        slots = [] if apart else [other for other in self.tape.live_slots() if other.value is None]
        if slot not in slots:
            slots.append(slot)
        entries = self.tape.slice_for(slots)
        try:
            with undeferred():
                self.programs.run(entries, slots, Purpose.PEEK)
        except NotEnoughMemoryError as error:
            self._give_up(error, entries)
        except (CaptureError, NumberUsed) as error:
            if isinstance(error, NumberUsed) and self._make_constant(entries, error):
                return self._peek(slot, apart)
            self.run_eagerly(error if isinstance(error, CaptureError) else _unusable(error))
        return None

    def _give_up(self, error: NotEnoughMemoryError, entries: list[Entry]) -> NoReturn:
        self.tape.entries.clear()
        with undeferred():
            raise with_cures(error, RecordedStep(self.programs, entries), self.programs.target) from None

    def run_eagerly(self, error: CaptureError, culprit: nn.Module | torch.optim.Optimizer | None = None) -> None:
        """Runs the tape in torch, with its gradient history, and leaves what is on it to torch from now on.

        Args:
            error: Why. A `PassingCaptureError` is a reason for one step only.
            culprit: A module or optimizer, not on the tape, that is left to torch too.

        Raises:
            FallbackError: The user wants no fallback.
        """
        items = [item for entry in self.tape.entries for item in (entry.function, *entry.optimizers)]
        if error.culprit is not None:
            items = [error.culprit]
        items = [item for item in (*items, culprit) if isinstance(item, nn.Module | torch.optim.Optimizer)]
        try:
            self.fallbacks.leave(error, items)
        except FallbackError:
            self.tape.entries.clear()
            raise
        self._check_gradients(self.tape.entries)
        self._guard.rest()
        entries, self.tape = self.tape.entries, Tape()
        self._called_since_backward = set()
        self.backward_compiled = False
        self._speculation.forget()
        with undeferred():
            for entry in entries:
                run_in_torch(entry)

    def _run_at_once(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A call that needs no gradient: one program, run now."""
        result = self.record(module, args, kwargs)
        self.commit()
        return map_leaves(lambda leaf: self.value(leaf.slot) if isinstance(leaf, DeferredTensor) else leaf, result)

    # -- questions ----------------------------------------------------------------------------------------------

    def is_unwatched(self) -> bool:
        # Inside torch's own backward, checkpointed blocks call their modules again.
        in_backward = torch._C._current_graph_task_id() != -1
        return is_replaying() or in_backward or not self.is_own_thread

    @property
    def is_own_thread(self) -> bool:
        """Whether this is the thread that trains."""
        return threading.get_ident() == self._thread

    def is_deferrable(self, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        if not self.deferring or self.fallbacks.covers(module):
            return False
        if not self.book.trains(module, self.calls.modules) and not self._any_pending(args, kwargs):
            return False
        if torch.is_anomaly_enabled():
            self.fallbacks.say(CaptureError(ANOMALY, user_line()))
            return False
        return True

    def _any_pending(self, args: Any, kwargs: Any) -> bool:
        return any(isinstance(leaf, DeferredTensor) and not leaf.slot.committed for leaf in flatten((args, kwargs))[0])

    def _needs_gradient(self, args: Any, kwargs: Any) -> bool:
        return any(
            isinstance(leaf, DeferredTensor) and leaf.slot.meta.requires_grad and not leaf.slot.freed
            for leaf in flatten((args, kwargs))[0]
        )

    @property
    def has_backward(self) -> bool:
        """Whether a backward is on the tape, so that only the tape knows the gradients."""
        return bool(self._called_since_backward)

    def real(self, value: Any) -> Any:
        return map_leaves(lambda leaf: self.value(leaf.slot) if isinstance(leaf, DeferredTensor) else leaf, value)

    def _make_constant(self, entries: list[Entry], error: NumberUsed) -> bool:
        source: Any = error.source
        if source is None:
            return False
        if source.optimizer is not None:
            return self.book.fix_number(source.optimizer(), source.position)
        self.calls.fix_number(entries[source.entry], source)
        return True


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Slot):
        return tuple(leaf.meta.shape), leaf.meta.dtype, leaf.meta.stride(), leaf.meta.requires_grad
    return None


def _unusable(error: NumberUsed) -> CaptureError:
    unusable = CaptureError("the step decides by the value of a number that is computed in it", user_line())
    unusable.__cause__ = error  # shown by --debug
    return unusable
