"""Calls of modules: whether their Python is recorded, runs in torch, or is an evaluation that is computed at once."""

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.dynamo import as_written
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten, map_leaves
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.session.ddp import averages_unseen, not_joined, obstacle
from trainingcompiler.frameworks.pytorch.session.eval_policy import EvalCompilePolicy, key_of
from trainingcompiler.frameworks.pytorch.session.fallback import ANOMALY
from trainingcompiler.frameworks.pytorch.state.ownership import is_foreign
from trainingcompiler.frameworks.pytorch.state.shared_tensors import check_owned
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.planning import planner
from trainingcompiler.reporting.statistics import current as statistics

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


class ModuleCalls:
    """What becomes of the call of a module, in a session."""

    def __init__(self, session: "Session"):
        self._session = session
        self._evaluations = EvalCompilePolicy()
        self._owned: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Does what calling a module does: its Python runs, and what it asks torch for is recorded or run."""
        session = self._session
        if session.is_unwatched():
            return original(module, *args, **kwargs)
        in_torch, module = module, as_written(module)
        if isinstance(module, DistributedDataParallel):
            if session.workers is not None:
                return session.workers.call(original, module, args, kwargs)
            if averages_unseen(module):
                if not session.fallbacks.covers(module):
                    session.fallbacks.leave(not_joined(), [module, module.module])
            elif obstacle(module) is None:
                module = in_torch = as_written(module.module)  # of one process: there is nothing to average
        with torch._C.DisableTorchFunction():
            is_deferrable = self.is_deferrable(module, args, kwargs)
        if not is_deferrable:
            session.backward_compiled &= not torch.is_grad_enabled()
            return self._run_in_torch(original, in_torch, module, args, kwargs)
        self._sweep()
        session.bound_tape()
        if not torch.is_grad_enabled() and not session.tape:
            return self._run_at_once(original, in_torch, module, args, kwargs)
        if id(module) in session.called_since_backward:  # gradient accumulation: one program for each micro-batch
            session.commit()
        return self._run_recorded(original, module, args, kwargs)

    def _run_recorded(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Runs a module's Python, and records what it asks torch for."""
        session = self._session
        tensors = session.modules.known(module)
        session.buffers = {id(buffer) for buffer in tensors.buffers} - tensors.replaced
        session.replaced = tensors.replaced
        with torch._C.DisableTorchFunction():
            session.device = devices.of(tensors.parameters) or session.device
        session.tape.inputs.clear()
        session.tape.roots.append(module)
        session.new_root = module
        session.origins = _origins(module, args, kwargs)
        if planner.current is not None:
            return session.record(module, args, kwargs)
        session.depth += 1
        try:
            return original(module, *args, **kwargs)
        finally:
            session.depth -= 1
            if not torch.is_grad_enabled():
                session.is_in_torch = False

    def _run_in_torch(self, original: Callable, in_torch: nn.Module, module: nn.Module, args: tuple, kwargs: dict):
        session = self._session
        self.keep_history(type(module).__name__, args, kwargs)
        args, kwargs = self.real_arguments(args), {name: self.real_arguments(kwargs[name]) for name in kwargs}
        if session.tape.written:  # torch would not see what pending calls write
            session.settle()
        with section.outside(), passthrough(), session.torch_compile.in_torch(module):
            return original(in_torch, *args, **kwargs)

    def _run_at_once(self, original: Callable, in_torch: nn.Module, module: nn.Module, args: tuple, kwargs: dict):
        """A call that needs no gradient: one program, run now; or torch, while it is not worth a program."""
        session = self._session
        key = key_of(module, *flatten((args, kwargs)))
        waits = self._may_wait and self._evaluations.waits(module, key)
        compiles = statistics().compiles
        start_s = time.perf_counter()
        if waits:
            drawn = devices.generator_state(session.device)
            result = self._run_in_torch(original, in_torch, module, args, kwargs)
            is_random = drawn != devices.generator_state(session.device)
            self._evaluations.waited(module, key, time.perf_counter() - start_s, is_random)
            return result
        drawn = devices.generator_state(session.device)
        result = self._run_recorded(original, module, args, kwargs)
        is_random = drawn != devices.generator_state(session.device)
        session.commit()
        if statistics().compiles > compiles:
            self._evaluations.compiled(module, key, time.perf_counter() - start_s, is_random)
        return map_leaves(lambda leaf: session.value(leaf.slot) if isinstance(leaf, DeferredTensor) else leaf, result)

    @property
    def _may_wait(self) -> bool:
        # Workers and devices have to do the same, whoever is faster.
        target = self._session.programs.target
        return target.device_count == target.workers == 1 and planner.current is None

    def is_deferrable(self, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a call of a module is recorded."""
        session = self._session
        if not session.deferring or session.is_in_torch or session.fallbacks.covers(module):
            return False
        if isinstance(module, torch.jit.ScriptModule):
            return False
        parameters = session.modules.tensors(module).parameters
        if any(map(nn.parameter.is_lazy, parameters)):
            return False  # the first call gives them shapes and values
        is_given = session.any_pending(args, kwargs) or _holds_result(module)
        if not is_given and not session.registry.trains(module, parameters) and not self._has_gradients(parameters):
            return False
        if torch.is_anomaly_enabled():
            session.fallbacks.say(CaptureError(ANOMALY, user_line()))
            return False
        return self._owns(module)

    def _has_gradients(self, parameters: list[nn.Parameter]) -> bool:
        """Whether gradients of parameters that nobody trains would be computed: of a target network, say."""
        session = self._session
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None:  # `functional_call`: what torch.func transforms
            return False
        if any(p.requires_grad and session.registry.owner(p) is not None for p in parameters):
            return False  # these are of an optimizer that has not begun
        optimizers = session.registry.optimizers()
        return any(session.registry.is_ready(o) and not session.fallbacks.covers(o) for o in optimizers)

    def _owns(self, module: nn.Module) -> bool:
        """Whether nobody but torch sees the parameters; asked once, before a call is computed later than it was made.

        What becomes so in mid-run is seen by the step that would write to it.
        """
        if module not in self._owned:
            try:
                tensors = self._session.modules.known(module)
                for parameter in tensors.parameters:
                    if parameter.requires_grad:
                        check_owned(parameter)
                # NumPy may write to a buffer between a call and its step: what counts is the value at the call.
                tensors.replaced.update(id(buffer) for buffer in tensors.buffers if is_foreign(buffer))
            except CaptureError as error:
                error.where = user_line()
                self._session.fallbacks.leave(error, [module])
                return False
            self._owned.add(module)
        return True

    def keep_history(self, called: str, args: tuple, kwargs: dict) -> None:
        """Lets torch run the tape where torch is about to call something whose gradient has to reach the tape."""
        session = self._session
        if torch.is_grad_enabled() and session.any_pending(args, kwargs) and session.needs_gradient(args, kwargs):
            session.run_eagerly(CaptureError(f"a result goes into {called}, which torch runs", user_line()))

    def real_arguments(self, value: Any) -> Any:
        """Like `real`, but for lists, dicts and objects: these are the script's own, and a module may fill them."""
        if type(value) is DeferredTensor:
            return self._session.value(value.slot)
        return tuple(map(self.real_arguments, value)) if type(value) is tuple else value

    def _sweep(self) -> None:
        """Commits calls whose results nobody holds any more, for what they leave behind: buffers."""
        session = self._session
        if session.tape and not session.has_backward and not session.tape.live_slots():
            session.commit()


def _holds_result(module: nn.Module) -> bool:
    """Whether the script has given a module a pending result as an attribute: weights that another one computes."""
    held = (*vars(module).values(), *module._parameters.values(), *module._buffers.values())
    return any([type(one) is DeferredTensor and not one.slot.committed for one in held])


def _origins(module: nn.Module, args: tuple, kwargs: dict) -> dict[int, tuple[nn.Module, Any]]:
    """Under which name a module is given each tensor, by identity."""
    found: dict[int, tuple[nn.Module, Any]] = {}
    for name, argument in (*enumerate(args), *kwargs.items()):
        items = argument.items() if isinstance(argument, dict) else ((name, argument),)
        found.update((id(item), (module, key)) for key, item in items if type(item) is torch.Tensor)
    return found
