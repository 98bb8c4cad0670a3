"""The session: decides what is deferred, and records it.

This is where an unmodified loop meets the compiled step. The loop calls; the session records (`call`, `call_module`),
and has the tape run when it ends (`commit`) or somebody looks (`value`).
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainingcompiler import planner
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch import devices
from trainingcompiler.frameworks.pytorch.deferred import (
    METADATA,
    METADATA_METHODS,
    READS,
    DeferredTensor,
    functional_name,
    is_in_place,
)
from trainingcompiler.frameworks.pytorch.evaluations import Evaluations, key_of
from trainingcompiler.frameworks.pytorch.fallback import ANOMALY, Fallbacks
from trainingcompiler.frameworks.pytorch.guard import versions
from trainingcompiler.frameworks.pytorch.plans import Argument, Output, Plan, plan
from trainingcompiler.frameworks.pytorch.recorder import user_line
from trainingcompiler.frameworks.pytorch.replaying import is_replaying, undeferred
from trainingcompiler.frameworks.pytorch.running import TapeRunner
from trainingcompiler.frameworks.pytorch.state import input_array, seed_array
from trainingcompiler.frameworks.pytorch.stepping import Stepping
from trainingcompiler.frameworks.pytorch.structure import flatten, map_leaves, unflatten
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot
from trainingcompiler.frameworks.pytorch.torch_compile import TorchCompile, as_written
from trainingcompiler.frameworks.pytorch.workers import Workers, averages_unseen, not_joined, obstacle
from trainingcompiler.statistics import current as statistics

_OPAQUE = frozenset({"register_hook", "retain_grad", "__set__", "grad"})
_LONGEST_TAPE = 512  # entries; a list of results that nobody looks at must not grow one without end


class Session(TapeRunner):
    """Everything that is known about the training loops of this process.

    Attributes:
        config: What the user asked for.
        stepping: What ends a step.
        torch_compile: What becomes of `torch.compile`.
    """

    def __init__(self, config: TrainingCompilerConfig):
        super().__init__(config)
        self.config = config
        if self.programs.target.workers > 1:
            self.workers = Workers(self)
            self.fallbacks = Fallbacks(config, self.workers.left_to_torch)
        self.stepping = Stepping(self)
        self.torch_compile = TorchCompile(self)
        self._evaluations = Evaluations()
        self._thread = threading.get_ident()
        self._plans: dict[tuple, Plan] = {}

    # -- what the loop does -------------------------------------------------------------------------------------

    def call_module(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Does what calling a module does: records the call if it belongs to training, or runs it."""
        if self.is_unwatched():
            return original(module, *args, **kwargs)
        in_torch, module = module, as_written(module)
        if isinstance(module, DistributedDataParallel):
            if self.workers is not None:
                return self.workers.call(original, module, args, kwargs)
            if averages_unseen(module):
                if not self.fallbacks.covers(module):
                    self.fallbacks.leave(not_joined(), [module, module.module])
            elif obstacle(module) is None:
                module = in_torch = as_written(module.module)  # of one process: there is nothing to average
        if not self.is_deferrable(module, args, kwargs):
            self.backward_compiled &= not torch.is_grad_enabled()
            return self._run_in_torch(original, in_torch, module, args, kwargs)
        self._sweep()
        self._bound_tape()
        if not torch.is_grad_enabled() and not self.tape:
            return self._run_at_once(original, in_torch, module, args, kwargs)
        if id(module) in self._called_since_backward:  # gradient accumulation: one program for each micro-batch
            self.commit()
        return self.record(module, args, kwargs)

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` does, where some argument is a `DeferredTensor`."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            attribute = getattr(getattr(function, "__self__", None), "__name__", "")
            if devices.is_shown(attribute):
                return devices.shown(attribute, args[0].slot.device)
            if attribute in METADATA:
                return getattr(args[0].slot.meta, attribute)
            if attribute in ("grad", "_grad"):
                return None
        elif devices.is_shown(name):
            return devices.shown(name, args[0].slot.device)
        elif name in METADATA_METHODS:
            return function(args[0].slot.meta, *args[1:], **kwargs)
        elif name in ("isnan", "isinf") and args[0].slot.finite:
            return torch.zeros(args[0].slot.meta.shape, dtype=torch.bool, device=args[0].slot.device)
        if name in READS and not is_replaying():
            statistics().host_reads += 1
        if is_replaying() or name in READS or not self._any_pending(args, kwargs):
            return function(*self.real(args), **self.real(kwargs))
        if self._bound_tape():
            return function(*self.real(args), **self.real(kwargs))
        first = args[0] if args else None
        if isinstance(first, DeferredTensor) and devices.leads_away(function, args, kwargs, first.slot.device):
            if self._needs_gradient(args, kwargs) and torch.is_grad_enabled():
                self.run_eagerly(CaptureError("the loop moves a result to another device", user_line()))
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
        # A tensor that is gone may have had the same number as one that has come since, by which the key knows both.
        if planned is None or any(reference() is None for reference in planned.closure):
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

    def _results(self, entry: Entry, planned: Plan, args: tuple, kwargs: dict) -> Any:
        if planned.random:
            entry.seed = Input(seed_array(entry.device), (), torch.int64)
        closure = [tensor for reference in planned.closure if (tensor := reference()) is not None]
        entry.closure = tuple((t, Input(input_array(t), tuple(t.shape), t.dtype, device=t.device)) for t in closure)
        entry.outputs = [Slot(meta, entry.device) for meta in planned.metas]
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

    # -- computing ----------------------------------------------------------------------------------------------

    def _bound_tape(self) -> bool:
        """Runs a tape in torch that has grown too long; returns whether it has."""
        if len(self.tape.entries) < _LONGEST_TAPE:
            return False
        reason = f"{_LONGEST_TAPE} calls have been made and no backward()"
        self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))
        return True

    def _sweep(self) -> None:
        """Commits calls whose results nobody holds any more, for what they leave behind: buffers."""
        if self.tape and not self.has_backward and not self.tape.live_slots():
            self.commit()

    def _run_in_torch(self, original: Callable, in_torch: nn.Module, module: nn.Module, args: tuple, kwargs: dict):
        with undeferred(), self.torch_compile.in_torch(module):
            return original(in_torch, *self.real(args), **self.real(kwargs))

    def _run_at_once(self, original: Callable, in_torch: nn.Module, module: nn.Module, args: tuple, kwargs: dict):
        """A call that needs no gradient: one program, run now; or torch, while it is not worth a program."""
        key = key_of(module, *flatten((args, kwargs)))
        waits = self._may_wait and self._evaluations.waits(module, key)
        compiles = statistics().compiles
        start_s = time.perf_counter()
        if waits:
            drawn = devices.generator_state(self.calls.device)
            result = self._run_in_torch(original, in_torch, module, args, kwargs)
            is_random = drawn != devices.generator_state(self.calls.device)
            self._evaluations.waited(module, key, time.perf_counter() - start_s, is_random)
            return result
        result = self.record(module, args, kwargs)
        is_random = any(entry.seed is not None for entry in self.tape.entries)
        self.commit()
        if statistics().compiles > compiles:
            self._evaluations.compiled(module, key, time.perf_counter() - start_s, is_random)
        return map_leaves(lambda leaf: self.value(leaf.slot) if isinstance(leaf, DeferredTensor) else leaf, result)

    @property
    def _may_wait(self) -> bool:
        # Workers and devices have to do the same, whoever is faster.
        target = self.programs.target
        return target.device_count == target.workers == 1 and planner.current is None

    # -- questions ----------------------------------------------------------------------------------------------

    def is_unwatched(self) -> bool:
        if is_replaying():  # first: Dynamo reads no further
            return True
        # Inside torch's own backward, checkpointed blocks call their modules again.
        return torch._C._current_graph_task_id() != -1 or not self.is_own_thread

    def reads_inside(self, leaves: list[Any]) -> bool:
        """Whether a compound function, called with these, is to be recorded by what it calls, and not run as one."""
        if any(isinstance(leaf, DeferredTensor) for leaf in leaves):
            return True
        return self.deferring and not self.fallbacks.has_left and not self.is_unwatched()

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

    def real(self, value: Any) -> Any:
        return map_leaves(lambda leaf: self.value(leaf.slot) if isinstance(leaf, DeferredTensor) else leaf, value)


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Slot):
        return tuple(leaf.meta.shape), leaf.meta.dtype, leaf.meta.stride(), leaf.meta.requires_grad
    return None
