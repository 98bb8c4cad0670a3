"""The session: sees what an unmodified loop asks torch for, and records it.

All of the script's Python runs. What it asks torch for while it trains is written on the tape (`record`), compared with
the recording, and answered without running a kernel. The tape runs when it ends (`commit`) or somebody looks (`value`).
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD, BACKWARD_OF_MANY, is_backward_of_many
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten_call
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.interop.tensor_attributes import READS
from trainingcompiler.frameworks.pytorch.session.accumulators import Accumulators
from trainingcompiler.frameworks.pytorch.session.backward_python import BackwardPython
from trainingcompiler.frameworks.pytorch.session.backward_recorder import BackwardRecorder
from trainingcompiler.frameworks.pytorch.session.checkpoint_regions import begin_region, begun, run_again
from trainingcompiler.frameworks.pytorch.session.custom_optimizers import CustomSteps
from trainingcompiler.frameworks.pytorch.session.ddp import DdpHandler
from trainingcompiler.frameworks.pytorch.session.fallback import FallbackPolicy
from trainingcompiler.frameworks.pytorch.session.function_mode import FunctionMode, Kind, kind_of, leaves_history
from trainingcompiler.frameworks.pytorch.session.gradient_access import GradientAccess
from trainingcompiler.frameworks.pytorch.session.module_calls import ModuleCalls
from trainingcompiler.frameworks.pytorch.session.optimizer_step import OptimizerStepHandler
from trainingcompiler.frameworks.pytorch.session.result_access import HANDLERS, ResultAccess
from trainingcompiler.frameworks.pytorch.session.tape_in_torch import run_in_torch
from trainingcompiler.frameworks.pytorch.session.tape_writer import TapeWriter
from trainingcompiler.frameworks.pytorch.session.torch_compile import TorchCompile
from trainingcompiler.frameworks.pytorch.session.training_thread import TrainingThread, is_inside_torch
from trainingcompiler.frameworks.pytorch.tape.arguments import is_pending, tensors_among
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor, slot_of
from trainingcompiler.planning import planner
from trainingcompiler.reporting.statistics import current as statistics

_MOST_CALLS = 512  # of modules; a list of results that nobody looks at must not grow a tape without end
_LONGEST_TAPE = 8192  # calls of functions


class Session(TapeWriter):
    """Everything that is known about the training loops of this process.

    Attributes:
        config: What the user asked for.
        module_calls: Calls of modules.
        stepping: What ends a step.
        thread: The one that trains.
        backward_python: Python that runs inside of backward.
        backward: Writes `backward()` on the tape.
        gradients: What the script does with `.grad`.
        results: What the script does with results but to compute with them.
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
        self.backward = BackwardRecorder(self)
        self.gradients = GradientAccess(self)
        self.results = ResultAccess(self)
        self.accumulators = Accumulators()
        self.torch_compile = TorchCompile(self)
        self.module_calls = ModuleCalls(self)

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
            return function(*args, **kwargs) if slot is None else self.results.metadata(slot, function, args, kwargs)
        if kind is Kind.BACKWARD:
            function = BACKWARD_OF_MANY if is_backward_of_many(function) else BACKWARD
        for argument in args:
            if type(argument) is DeferredTensor:
                return self._on_deferred(kind, function, args, kwargs)
        tensors, is_deferred = tensors_among(args, kwargs)
        if is_deferred:
            return self._on_deferred(kind, function, args, kwargs)
        if kind is Kind.GRAPH:
            return self.results.graph_node(function, args[0])
        if not self._deferring or self.is_in_torch or self.custom_steps.is_over:
            result = function(*args, **kwargs)
            if kind is Kind.BACKWARD and self.workers is not None:  # a forward that was recorded up to its middle
                self.workers.after_backward()
            return result
        return self._on_real(kind, function, args, kwargs, tensors)

    def _on_real(self, kind: Kind, function: Callable, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
        """What becomes of a call while steps are recorded, none of whose arguments is pending."""
        if self.tape.written and any(map(self.results.is_written, tensors)):
            return self.results.after_write(kind, function, args, kwargs)
        # In a signal's handler, which may have come in the middle of a recorded call, nothing is recorded.
        if kind is Kind.NATIVE or kind is Kind.DRAW or section.handling:
            return function(*args, **kwargs)
        if kind is Kind.FLAG:
            return self.results.set_flag(function, args, kwargs)
        if kind is Kind.RESHAPE:
            return self.results.reshape_real(function, args, kwargs)
        if kind in _LOOKING:
            return self.results.look(kind, function, args, kwargs)
        if self._is_recorded(kind, function, tensors):
            return self.record(function, args, kwargs)
        if kind in _WRITING or "out" in kwargs or kwargs.get("inplace"):
            self.results.before_write(tensors)
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
        if kind is Kind.BACKWARD and not in_passthrough() and self.any_pending(args, kwargs):
            reason = f"thread {threading.current_thread().name} differentiates a result of the thread that trains"
            self.run_eagerly(CaptureError(reason, user_line()))
        elif self.is_own_thread and self.differentiates(args, kwargs) and self.any_pending(args, kwargs):
            # A module that torch runs has it as an attribute: weights that another network computes.
            self.run_eagerly(CaptureError(f"a result goes into {name}, which torch runs", user_line()))
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
            return self.backward.record(*args, **kwargs)
        if self._gets_values(name, function, args, kwargs):
            return function(*self.real(args), **self.real(kwargs))
        if kwargs.get("create_graph"):
            return self.results.run_with_history(name, function, args, kwargs)
        return self._goes_its_way(kind, name, function, args, kwargs)

    def _goes_its_way(self, kind: Kind, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """What becomes of a call that needs no values, by its kind."""
        if kind is Kind.BACKWARD:
            return self._goes_back(function, args, kwargs)
        handler = HANDLERS.get(kind)
        if handler is not None:
            return handler(self.results, name, function, args, kwargs)
        if name == "__iter__":
            return iter(self.call(torch.Tensor.unbind, (args[0], 0), {}))
        return self.record_here(function, args, kwargs)

    def _known(self, kind: Kind, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The answer to a question that needs no values; `_UNKNOWN` for any other."""
        if kind is Kind.QUERY:
            slot = slot_of(args[0])
            return function(*args, **kwargs) if slot is None else self.results.metadata(slot, function, args, kwargs)
        if kind is Kind.GRAPH:
            return self.results.graph_node(function, args[0])
        if kind is Kind.GRADIENT and isinstance(args[0], DeferredTensor):
            return self.results.gradient_of_result(function, args[0])
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
        if len(self.tape.entries) >= _LONGEST_TAPE and self.bound_tape():
            return True
        first = args[0] if args else None
        if name not in _MOVES or not isinstance(first, DeferredTensor):
            return False
        if not devices.leads_away(function, args, kwargs, first.slot.device):
            return False
        if self.needs_gradient(args, kwargs) and torch.is_grad_enabled():
            self.run_eagerly(CaptureError("the loop moves a result to another device", user_line()))
        return True

    def _goes_back(self, function: Callable, args: tuple, kwargs: dict) -> None:
        record = self.backward.record_of_many if is_backward_of_many(function) else self.backward.record
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
        self.module_calls.keep_history("a function that torch.func transforms", (value,), {})
        return self.value(slot)

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

    def any_pending(self, args: Any, kwargs: Any) -> bool:
        if is_pending(args, kwargs):
            return True
        leaves, _ = flatten_call(args, kwargs)  # in objects, too
        return any([isinstance(leaf, DeferredTensor) and not leaf.slot.committed for leaf in leaves])

    def bound_tape(self) -> bool:
        """Runs a tape in torch that has grown too long; returns whether it has."""
        if len(self.tape.entries) < _LONGEST_TAPE and len(self.tape.roots) < _MOST_CALLS:
            return False
        reason = f"{max(len(self.tape.roots), _MOST_CALLS)} calls have been made and no backward()"
        self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))
        return True


_UNKNOWN = object()
_MOVES = frozenset({"to", "cpu"})
_TESTS = frozenset({"isnan", "isinf"})  # answered where the program sees to it
_LOOKING = frozenset({Kind.READ, Kind.OPAQUE, Kind.BACKWARD, Kind.GRADIENT})
_WRITING = frozenset({Kind.SET, Kind.IN_PLACE, Kind.DRAW_INTO})


def _refused() -> torch.Tensor:
    """A result with a history, which torch refuses where it refuses any."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        return torch.ones(1, requires_grad=True) * 1
