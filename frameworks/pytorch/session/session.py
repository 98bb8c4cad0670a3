"""The session: sees what an unmodified loop asks torch for, and records it.

All of the script's Python runs. What it asks torch for while it trains is written on the tape (`record`), compared with
the recording, and answered without running a kernel. The tape runs when it ends (`commit`) or somebody looks (`value`).
"""

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.dynamo import as_written
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD, BACKWARD_OF_MANY, is_backward_of_many
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten, flatten_call, map_leaves
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.interop.tensor_attributes import READS
from trainingcompiler.frameworks.pytorch.session.accumulators import Accumulators
from trainingcompiler.frameworks.pytorch.session.backward_python import BackwardPython
from trainingcompiler.frameworks.pytorch.session.checkpoint_regions import begin_region, begun, run_again
from trainingcompiler.frameworks.pytorch.session.custom_optimizers import CustomSteps
from trainingcompiler.frameworks.pytorch.session.ddp import DdpHandler, averages_unseen, not_joined, obstacle
from trainingcompiler.frameworks.pytorch.session.eval_policy import EvalCompilePolicy, key_of
from trainingcompiler.frameworks.pytorch.session.fallback import ANOMALY, FallbackPolicy
from trainingcompiler.frameworks.pytorch.session.function_mode import FunctionMode, Kind, kind_of, leaves_history
from trainingcompiler.frameworks.pytorch.session.gradient_access import GradientAccess
from trainingcompiler.frameworks.pytorch.session.looks import Looks
from trainingcompiler.frameworks.pytorch.session.optimizer_step import OptimizerStepHandler
from trainingcompiler.frameworks.pytorch.session.tape_in_torch import run_in_torch
from trainingcompiler.frameworks.pytorch.session.torch_compile import TorchCompile
from trainingcompiler.frameworks.pytorch.session.training_thread import TrainingThread, is_inside_torch
from trainingcompiler.frameworks.pytorch.state.ownership import is_foreign
from trainingcompiler.frameworks.pytorch.state.shared_tensors import check_owned
from trainingcompiler.frameworks.pytorch.tape.arguments import is_pending, tensors_among
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor, slot_of
from trainingcompiler.planning import planner
from trainingcompiler.reporting.statistics import current as statistics

_MOST_CALLS = 512  # of modules; a list of results that nobody looks at must not grow a tape without end
_LONGEST_TAPE = 8192  # calls of functions


class Session(Looks):
    """Everything that is known about the training loops of this process.

    Attributes:
        config: What the user asked for.
        stepping: What ends a step.
        thread: The one that trains.
        backward_python: Python that runs inside of backward.
        gradients: What the script does with `.grad`.
        custom_steps: The steps of optimizers that are not torch's.
        torch_compile: What becomes of `torch.compile`.
        is_closed: Whether it is over.
    """

    def __init__(self, config: TrainingCompilerConfig):
        self.thread = TrainingThread(self)
        self._modes = threading.local()
        self.is_closed = True
        self._deferring = self._defers_next = False
        super().__init__(config)
        self.config = config
        if self.programs.target.workers > 1:
            self.workers = DdpHandler(self)
            self.fallbacks = FallbackPolicy(config, self.workers.left_to_torch)
        self.stepping = OptimizerStepHandler(self)
        self.custom_steps = CustomSteps(self)
        self.backward_python = BackwardPython(self)
        self.gradients = GradientAccess(self)
        self.accumulators = Accumulators()
        self.torch_compile = TorchCompile(self)
        self._evaluations = EvalCompilePolicy()
        self._owned: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def mode(self) -> FunctionMode:
        """What sees torch's functions in this thread: each has a stack of modes of its own."""
        if not hasattr(self._modes, "mode"):
            self._modes.mode = FunctionMode(self)
        return self._modes.mode

    @property
    def deferring(self) -> bool:
        """Whether calls are recorded at this moment; the engine turns it on and off between steps."""
        return self._deferring

    @deferring.setter
    def deferring(self, value: bool) -> None:
        self._defers_next = value
        if value or not self.tape or self.thread.is_forked:
            self._set_deferring(value)

    def emptied(self) -> None:
        """Turns recording off, if that has waited for calls which were pending: nothing may pass them unseen."""
        if self._deferring and not self._defers_next:
            self._set_deferring(False)

    def _set_deferring(self, value: bool) -> None:
        if value and not self.mode.is_up:
            self.accumulators.begin()
        self._deferring = value
        if value and not self.is_closed:
            self.mode.go_up()
        else:
            self.mode.come_down()  # torch's own step, and what `torch.compile` makes of it, see no mode

    # -- what the loop does -------------------------------------------------------------------------------------

    def call_module(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Does what calling a module does: its Python runs, and what it asks torch for is recorded or run."""
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
        with torch._C.DisableTorchFunction():
            is_deferrable = self.is_deferrable(module, args, kwargs)
        if not is_deferrable:
            self.backward_compiled &= not torch.is_grad_enabled()
            return self._run_in_torch(original, in_torch, module, args, kwargs)
        self._sweep()
        self._bound_tape()
        if not torch.is_grad_enabled() and not self.tape:
            return self._run_at_once(original, in_torch, module, args, kwargs)
        if id(module) in self._called_since_backward:  # gradient accumulation: one program for each micro-batch
            self.commit()
        return self._run_recorded(original, module, args, kwargs)

    def function(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` does, of which the script, or a library that it uses, has asked torch.

        It is recorded if a deferred value takes part, if it is part of a recorded call of a module, or if it computes
        something that has to be differentiated from what an optimizer trains.
        """
        if in_passthrough() or self.is_closed or self.thread.local.trains is not self.thread.token:
            return function(*args, **kwargs)
        kind = kind_of(function)
        if kind is Kind.QUERY:
            slot = slot_of(args[0]) if args else None
            return function(*args, **kwargs) if slot is None else self.metadata(slot, function, args, kwargs)
        if kind is Kind.BACKWARD:
            function = BACKWARD_OF_MANY if is_backward_of_many(function) else BACKWARD
        for argument in args:
            if type(argument) is DeferredTensor:
                return self._on_deferred(kind, function, args, kwargs)
        tensors, is_deferred = tensors_among(args, kwargs)
        if is_deferred:
            return self._on_deferred(kind, function, args, kwargs)
        if kind is Kind.GRAPH:
            return self.graph_node(function, args[0])
        if not self._deferring or self.is_in_torch or self.custom_steps.is_over:
            result = function(*args, **kwargs)
            if kind is Kind.BACKWARD and self.workers is not None:  # a forward that was recorded up to its middle
                self.workers.after_backward()
            return result
        return self._on_real(kind, function, args, kwargs, tensors)

    def _on_real(self, kind: Kind, function: Callable, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
        """What becomes of a call while steps are recorded, none of whose arguments is pending."""
        if self.tape.written and any(map(self.is_written, tensors)):
            return self.after_write(kind, function, args, kwargs)
        # In a signal's handler, which may have come in the middle of a recorded call, nothing is recorded.
        if kind is Kind.NATIVE or kind is Kind.DRAW or section.handling:
            return function(*args, **kwargs)
        if kind is Kind.FLAG:
            return self.set_flag(function, args, kwargs)
        if kind is Kind.RESHAPE:
            return self.reshape_real(function, args, kwargs)
        if kind in _LOOKING:
            return self.look(kind, function, args, kwargs)
        if self._is_recorded(kind, function, tensors):
            return self.record(function, args, kwargs)
        if kind in _WRITING or "out" in kwargs or kwargs.get("inplace"):
            self.before_write(tensors)
        return function(*args, **kwargs)

    def _is_recorded(self, kind: Kind, function: Callable, tensors: list[torch.Tensor]) -> bool:
        """Whether a call on real tensors is recorded: in a module's forward, or where parameters are trained."""
        if kind is Kind.DRAW_INTO:
            return False
        if self.depth and kind is not Kind.SET:
            return bool(tensors) or kind is Kind.FACTORY
        if not self._trains_with(kind, function, tensors):
            return False
        if self.has_backward and any(id(tensor) in self.tape.grad_flags for tensor in tensors):
            self.commit()  # the next micro-batch, or the next step of a loop that updates by hand
        return True

    @section.around
    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` does, some argument being deferred, in whatever thread and mode."""
        kind = kind_of(function)
        if not in_passthrough() and self.is_own_thread:
            return self._on_deferred(kind, function, args, kwargs)
        known = self._known(kind, function, args, kwargs)
        if known is not _UNKNOWN:
            return known
        name = getattr(function, "__name__", "")
        if name in READS and not in_passthrough() and not self.depth:
            statistics().host_reads += 1
        if name == "numpy" and args[0].slot.requires_grad and kwargs.get("force") is not True and not args[1:]:
            return function(_refused())
        if kind is Kind.BACKWARD and not in_passthrough() and self._any_pending(args, kwargs):
            reason = f"thread {threading.current_thread().name} differentiates a result of the thread that trains"
            self.run_eagerly(CaptureError(reason, user_line()))
        return function(*self.real(args), **self.real(kwargs))

    @section.around
    def _on_deferred(self, kind: Kind, function: Callable, args: tuple, kwargs: dict) -> Any:
        """What becomes of a call of the thread that trains, where some argument is a `DeferredTensor`.

        What is known without values is answered. What asks for values, or cannot be recorded now, gets real ones. The
        rest is recorded, or goes the way of its kind.
        """
        if type(args[0] if args else None) is not DeferredTensor and not tensors_among(args, kwargs)[1]:
            return self.function(function, args, kwargs)  # a signal's handler has computed them a moment ago
        name = getattr(function, "__name__", "")
        if kind is not Kind.OPERATOR or name in _TESTS:
            known = self._known(kind, function, args, kwargs)
            if known is not _UNKNOWN:
                return known
        if self.thread.is_forked and self.needs_gradient(args, kwargs) and torch.is_grad_enabled():
            self._leave_tape_to_torch()
        if name == "numpy" and args[0].slot.requires_grad and kwargs.get("force") is not True and not args[1:]:
            return function(_refused())
        if function is BACKWARD and args[0].slot.late is not None:
            return self.record_backward(*args, **kwargs)
        if self._gets_values(name, function, args, kwargs):
            return function(*self.real(args), **self.real(kwargs))
        if kwargs.get("create_graph"):
            return self.run_with_history(name, function, args, kwargs)
        handler = _HANDLERS.get(kind)
        if handler is not None:
            return handler(self, name, function, args, kwargs)
        if name == "__iter__":
            return iter(self.call(torch.Tensor.unbind, (args[0], 0), {}))
        return self.record_here(function, args, kwargs)

    def _known(self, kind: Kind, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The answer to a question that needs no values; `_UNKNOWN` for any other."""
        if kind is Kind.QUERY:
            slot = slot_of(args[0])
            return function(*args, **kwargs) if slot is None else self.metadata(slot, function, args, kwargs)
        if kind is Kind.GRAPH:
            return self.graph_node(function, args[0])
        if kind is Kind.GRADIENT and isinstance(args[0], DeferredTensor):
            return self.gradient_of_result(function, args[0])
        if getattr(function, "__name__", "") in _TESTS and args[0].slot.finite:
            return torch.zeros(args[0].slot.meta.shape, dtype=torch.bool, device=args[0].slot.device)
        return _UNKNOWN

    def _gets_values(self, name: str, function: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether a call is given real tensors now, in place of being recorded."""
        if name in READS:
            statistics().host_reads += not self.depth  # inside a forward, torch has the answer
            return True
        if not is_pending(args, kwargs):
            return True
        if len(self.tape.entries) >= _LONGEST_TAPE and self._bound_tape():
            return True
        first = args[0] if args else None
        if name not in _MOVES or not isinstance(first, DeferredTensor):
            return False
        if not devices.leads_away(function, args, kwargs, first.slot.device):
            return False
        if self.needs_gradient(args, kwargs) and torch.is_grad_enabled():
            self.run_eagerly(CaptureError("the loop moves a result to another device", user_line()))
        return True

    def _goes_back(self, name: str, function: Callable, args: tuple, kwargs: dict) -> None:
        record = self.record_backwards if is_backward_of_many(function) else self.record_backward
        record(*args, **kwargs)
        if self.workers is not None:
            self.workers.after_backward()

    def is_left_alone(self) -> bool:
        """Whether a look at a gradient, in whatever thread, is torch's business alone."""
        # Workers run a program together, in the order of the threads that train.
        return is_inside_torch() or (self.workers is not None and not self.is_own_thread)

    def _leave_tape_to_torch(self) -> None:
        entries, self.tape.entries = self.tape.entries, []
        with passthrough():
            run_in_torch(entries)

    # -- Python that torch calls, or does not see ---------------------------------------------------------------

    def apply(self, original: Callable, kind: Any, args: tuple, kwargs: dict) -> Any:
        """Does what `autograd.Function.apply` does, whose Python torch calls from C++."""
        if self.is_unwatched() or self.is_in_torch or not self.deferring:
            return original(kind, *args, **kwargs)
        tensors, is_deferred = tensors_among(args, kwargs)
        if kind is CheckpointFunction and (self.depth or is_deferred):
            return self._run_block(*args)
        if not is_deferred and not (self.depth and any(tensor.requires_grad for tensor in tensors)):
            return original(kind, *args, **kwargs)
        if not kwargs and not kind.__module__.startswith("torch.") and not section.handling:
            return self.backward_python.apply(original, kind, args)
        if torch.is_grad_enabled() and self.needs_gradient(args, kwargs):
            self.run_eagerly(CaptureError(f"{kind.__name__} is an autograd.Function", user_line()))
        return original(kind, *self.real(args), **self.real(kwargs))

    def _run_block(self, function: Callable, preserves: bool, *args: Any) -> Any:
        """A checkpointed block of the reentrant kind: its Python runs, and what it computes is computed again."""
        tape = self.tape
        tensors, is_deferred = tensors_among(args, {})
        grad = torch.is_grad_enabled() and (self.needs_gradient(args, {}) or any(t.requires_grad for t in tensors))
        with torch.set_grad_enabled(grad):
            if tape.second_run is not None:
                return function(*args)
            outer = tape.region
            with begun(self):
                tape.region = begin_region(self, run_again(function, args), is_reentrant=True)
                try:
                    return function(*args)
                finally:
                    tape.region = outer

    def call_unseen(self, function: Any, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls what torch runs without asking its modes: a scripted function."""
        _, is_deferred = tensors_among(args[1:], kwargs)
        if not is_deferred:
            return original(*args, **kwargs)
        if self.needs_gradient(args[1:], kwargs) and torch.is_grad_enabled():
            self.run_eagerly(CaptureError(f"the scripted function {function.name} is no Python", user_line()))
        return original(function, *self.real(args[1:]), **self.real(kwargs))

    def transformed(self, value: Any) -> Any:
        """What `torch.func` gets of an argument: it looks at tensors in C++."""
        if not isinstance(value, DeferredTensor):
            return value
        slot = value.slot
        self.keep_history("a function that torch.func transforms", (value,), {})
        return self.value(slot)

    # -- calls of modules ---------------------------------------------------------------------------------------

    def _run_recorded(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Runs a module's Python, and records what it asks torch for."""
        tensors = self.modules.known(module)
        self.buffers = {id(buffer) for buffer in tensors.buffers} - tensors.replaced
        self.replaced = tensors.replaced
        with torch._C.DisableTorchFunction():
            self.device = devices.of(tensors.parameters) or self.device
        self.tape.inputs.clear()
        self.tape.roots.append(module)
        self.new_root = module
        self.origins = _origins(module, args, kwargs)
        if planner.current is not None:
            return self.record(module, args, kwargs)
        self.depth += 1
        try:
            return original(module, *args, **kwargs)
        finally:
            self.depth -= 1
            if not torch.is_grad_enabled():
                self.is_in_torch = False

    def _run_in_torch(self, original: Callable, in_torch: nn.Module, module: nn.Module, args: tuple, kwargs: dict):
        self.keep_history(type(module).__name__, args, kwargs)
        args, kwargs = self.real_arguments(args), {name: self.real_arguments(kwargs[name]) for name in kwargs}
        if self.tape.written:  # torch would not see what pending calls write
            self.settle()
        with section.outside(), passthrough(), self.torch_compile.in_torch(module):
            return original(in_torch, *args, **kwargs)

    def _run_at_once(self, original: Callable, in_torch: nn.Module, module: nn.Module, args: tuple, kwargs: dict):
        """A call that needs no gradient: one program, run now; or torch, while it is not worth a program."""
        key = key_of(module, *flatten((args, kwargs)))
        waits = self._may_wait and self._evaluations.waits(module, key)
        compiles = statistics().compiles
        start_s = time.perf_counter()
        if waits:
            drawn = devices.generator_state(self.device)
            result = self._run_in_torch(original, in_torch, module, args, kwargs)
            is_random = drawn != devices.generator_state(self.device)
            self._evaluations.waited(module, key, time.perf_counter() - start_s, is_random)
            return result
        drawn = devices.generator_state(self.device)
        result = self._run_recorded(original, module, args, kwargs)
        is_random = drawn != devices.generator_state(self.device)
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
        """Whether nothing is recorded of what this thread does now."""
        return is_inside_torch() or self.is_closed or not self.is_own_thread or self.thread.is_forked

    def reads_inside(self, leaves: list[Any]) -> bool:
        """Whether a compound function, called with these, is to be recorded by what it calls, and not run as one."""
        if any(isinstance(leaf, DeferredTensor) for leaf in leaves):
            return True
        return self.deferring and not self.fallbacks.has_left and not self.is_unwatched()

    @property
    def is_own_thread(self) -> bool:
        """Whether this is the thread that trains."""
        return self.thread.is_here

    def is_deferrable(self, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a call of a module is recorded."""
        if not self.deferring or self.is_in_torch or self.fallbacks.covers(module):
            return False
        if isinstance(module, torch.jit.ScriptModule):
            return False
        parameters = self.modules.tensors(module).parameters
        if any(map(nn.parameter.is_lazy, parameters)):
            return False  # the first call gives them shapes and values
        if not self.registry.trains(module, parameters) and not self._any_pending(args, kwargs):
            return False
        if torch.is_anomaly_enabled():
            self.fallbacks.say(CaptureError(ANOMALY, user_line()))
            return False
        return self._owns(module)

    def _owns(self, module: nn.Module) -> bool:
        """Whether nobody but torch sees the parameters; asked once, before a call is computed later than it was made.

        What becomes so in mid-run is seen by the step that would write to it.
        """
        if module not in self._owned:
            try:
                tensors = self.modules.known(module)
                for parameter in tensors.parameters:
                    if parameter.requires_grad:
                        check_owned(parameter)
                # NumPy may write to a buffer between a call and its step: what counts is the value at the call.
                tensors.replaced.update(id(buffer) for buffer in tensors.buffers if is_foreign(buffer))
            except CaptureError as error:
                error.where = user_line()
                self.fallbacks.leave(error, [module])
                return False
            self._owned.add(module)
        return True

    def _trains_with(self, kind: Kind, function: Callable, tensors: list[torch.Tensor]) -> bool:
        """Whether a call computes something that has to be differentiated from what an optimizer trains."""
        if kind is not Kind.OPERATOR or not torch.is_grad_enabled() or leaves_history(function):
            return False
        for tensor in tensors:
            if tensor.requires_grad and tensor.grad_fn is None:
                owner = self.registry.owner(tensor)
                if owner is not None:
                    return (
                        self.registry.is_ready(owner) and not self.fallbacks.covers(owner) and planner.current is None
                    )
        return False

    def _any_pending(self, args: Any, kwargs: Any) -> bool:
        if is_pending(args, kwargs):
            return True
        leaves, _ = flatten_call(args, kwargs)  # in objects, too
        return any([isinstance(leaf, DeferredTensor) and not leaf.slot.committed for leaf in leaves])

    def keep_history(self, called: str, args: tuple, kwargs: dict) -> None:
        """Lets torch run the tape where torch is about to call something whose gradient has to reach the tape."""
        if torch.is_grad_enabled() and self._any_pending(args, kwargs) and self.needs_gradient(args, kwargs):
            self.run_eagerly(CaptureError(f"a result goes into {called}, which torch runs", user_line()))

    def real_arguments(self, value: Any) -> Any:
        """Like `real`, but for lists, dicts and objects: these are the script's own, and a module may fill them."""
        if type(value) is DeferredTensor:
            return self.value(value.slot)
        return tuple(map(self.real_arguments, value)) if type(value) is tuple else value

    def _bound_tape(self) -> bool:
        """Runs a tape in torch that has grown too long; returns whether it has."""
        if len(self.tape.entries) < _LONGEST_TAPE and len(self.tape.roots) < _MOST_CALLS:
            return False
        reason = f"{max(len(self.tape.roots), _MOST_CALLS)} calls have been made and no backward()"
        self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))
        return True

    def _sweep(self) -> None:
        """Commits calls whose results nobody holds any more, for what they leave behind: buffers."""
        if self.tape and not self.has_backward and not self.tape.live_slots():
            self.commit()


_UNKNOWN = object()
_MOVES = frozenset({"to", "cpu"})
_TESTS = frozenset({"isnan", "isinf"})  # answered where the program sees to it
_LOOKING = frozenset({Kind.READ, Kind.OPAQUE, Kind.BACKWARD, Kind.GRADIENT})
_WRITING = frozenset({Kind.SET, Kind.IN_PLACE, Kind.DRAW_INTO})
_HANDLERS: dict[Kind, Callable[[Session, str, Callable, tuple, dict], Any]] = {
    Kind.FLAG: Session.flags,
    Kind.RESHAPE: Session.reshapes,
    Kind.SET: Session.sets,
    Kind.OPAQUE: Session.reaches_into_graph,
    Kind.NATIVE: Session.run_with_history,
    Kind.BACKWARD: Session._goes_back,
    Kind.DRAW: Session.draws,
    Kind.DRAW_FROM: Session.draws_from,
    Kind.DRAW_INTO: Session.draws_into,
    Kind.DRAW_WITHIN: Session.draws_within,
}


def _refused() -> torch.Tensor:
    """A result with a history, which torch refuses where it refuses any."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        return torch.ones(1, requires_grad=True) * 1


def _origins(module: nn.Module, args: tuple, kwargs: dict) -> dict[int, tuple[nn.Module, Any]]:
    """Under which name a module is given each tensor, by identity."""
    found: dict[int, tuple[nn.Module, Any]] = {}
    for name, argument in (*enumerate(args), *kwargs.items()):
        items = argument.items() if isinstance(argument, dict) else ((name, argument),)
        found.update((id(item), (module, key)) for key, item in items if type(item) is torch.Tensor)
    return found
