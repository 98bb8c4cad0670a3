"""What ends a step: clipping, `GradScaler`, `optimizer.step`, as the tape sees them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.optimizers import calls_closure_once, hooks_of, of_torch, parameters_of
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import store_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.session import grad_scaler
from trainingcompiler.frameworks.pytorch.session.custom_optimizers import End
from trainingcompiler.frameworks.pytorch.session.late_backward import kept
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.frameworks.pytorch.tape.entries import step_ends
from trainingcompiler.planning import planner
from trainingcompiler.reporting.statistics import current as statistics

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


_MANY_NEW = 4  # first steps beyond one for each optimizer that there is


class OptimizerStepHandler:
    """The end of a step, in a session.

    Attributes:
        clippings: The functions on the tape that change gradients in place.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self.clippings: set[Callable] = set()
        self._overflow: DeferredTensor | None = None  # inside `GradScaler.step`: whether to skip the optimizer's
        self._stepped_already: torch.optim.Optimizer | None = None
        self._first_steps = self._later_steps = 0  # of any optimizers
        self._told_of_new_ones = False

    def step(self, optimizer: torch.optim.Optimizer, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `optimizer.step()` does: it ends the tape, unless a live value still needs a gradient."""
        session = self._session
        if session.is_unwatched():
            result = original(optimizer, *args, **kwargs)
            if not in_passthrough() and session.is_own_thread and not session.is_closed:
                session.registry.stepped(
                    optimizer, "eager"
                )  # a parameter's hook makes it, inside of torch's own backward
            elif not in_passthrough():
                session.thread.stepped_elsewhere(optimizer)
            return result
        with section:
            return self._step(optimizer, original, args, kwargs)

    def _step(self, optimizer: torch.optim.Optimizer, original: Callable, args: tuple, kwargs: dict) -> Any:
        session = self._session
        if optimizer is self._stepped_already:
            return None  # a look at the call is all that is left to do
        closure = args[0] if args else kwargs.get("closure")
        if closure is not None and session.deferring and calls_closure_once(optimizer):
            with section.outside(), torch.enable_grad():
                loss = closure()
            self.step(optimizer, original, (), {})
            return loss
        if session.deferring and not session.fallbacks.covers(optimizer):
            reason = self._reason_for_torch(optimizer)
            if reason is not None and planner.current is None:
                session.fallbacks.leave(
                    CaptureError(f"{reason}, so the step itself runs in torch", user_line()), [optimizer]
                )
        if self._is_recorded(optimizer, closure):
            return self._record(optimizer, original, args, kwargs)
        reason = self._reason_to_step_eagerly(optimizer, closure)
        if reason is None:
            self._step_in_program(optimizer, original)
            return None
        return self._step_in_torch(optimizer, original, args, kwargs, closure, reason)

    def _step_in_program(self, optimizer: torch.optim.Optimizer, original: Callable) -> None:
        session = self._session
        self._cut(optimizer)
        self._look_at_state(optimizer)
        function, arguments = self._unless_overflow(original, optimizer)
        self._later_steps += 1
        session.append(function, arguments, {}, optimizers=(optimizer,))
        session.tape.mutated = True
        with torch._C.DisableTorchFunction():
            trained = [p for p in parameters_of(optimizer) if p.requires_grad]
            session.tape.written |= {p.untyped_storage()._cdata for p in trained}
        self._end_step(optimizer)
        if session.tape:
            self._note_what_is_used(optimizer)

    def _note_what_is_used(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes the memory of the gradients and the state that a pending step uses: who writes to it waits for that."""
        with torch._C.DisableTorchFunction():
            used = [stored_gradient(p) for p in parameters_of(optimizer)]
            used += [value for state in optimizer.state.values() for value in state.values()]
            strided = [t for t in used if isinstance(t, torch.Tensor) and t.layout is torch.strided]
            self._session.tape.written |= {tensor.untyped_storage()._cdata for tensor in strided}

    def _step_in_torch(
        self, optimizer: torch.optim.Optimizer, original: Callable, args: tuple, kwargs: dict, closure: Any, reason: str
    ) -> Any:
        """A step that torch runs, once what is pending has been computed."""
        session = self._session
        if planner.current is not None:
            planner.current.left(f"PyTorch would run it, because {reason}")
        if session.deferring and not session.registry.habits(optimizer).steps:
            self._tell_of_new_ones()
        else:
            self._later_steps += 1
        self._bring_gradients(optimizer, closure, reason)
        session.settle()
        if closure is None:
            session.registry.check_unconsumed(parameters_of(optimizer))
        if self._overflow is not None and self._overflow.item():
            return None
        if closure is not None:
            args, kwargs = self._with_closure(optimizer, closure, args, kwargs)
        with section.outside(), passthrough():
            result = original(optimizer, *args, **kwargs)
        session.is_in_torch = False
        session.registry.stepped(optimizer, "eager")
        return result

    def _bring_gradients(self, optimizer: torch.optim.Optimizer, closure: Any, reason: str) -> None:
        """Has the tape computed up to the gradients that torch's step reads: as a program, or in torch."""
        session = self._session
        is_torchs = session.fallbacks.covers(optimizer) or not session.registry.is_ready(optimizer)
        if session.tape and is_torchs and session.tape.committable() == len(session.tape.entries):
            session.commit()  # forward and backward, up to the gradients
        elif session.tape:
            session.run_eagerly(CaptureError(reason=reason, where=user_line()), optimizer)
        elif session.deferring and closure is not None and of_torch(type(optimizer)):
            session.fallbacks.say(CaptureError(reason=reason, where=user_line()))
        else:
            self._tell_of_unseen(optimizer)

    def _is_recorded(self, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
        """Whether a step runs its Python and is recorded: of an optimizer that is not torch's, after our backward."""
        session = self._session
        if of_torch(type(optimizer)) or planner.current is not None or self._overflow is not None:
            return False
        if not session.deferring or session.fallbacks.covers(optimizer) or not session.registry.is_ready(optimizer):
            return False
        return session.has_backward or session.backward_compiled or (closure is not None and not session.is_in_torch)

    def _record(self, optimizer: torch.optim.Optimizer, original: Callable, args: tuple, kwargs: dict) -> Any:
        session = self._session
        if session.has_backward:
            self._cut(optimizer)
        steps = statistics().steps
        result, end = session.custom_steps.run(optimizer, original, args, kwargs)
        if end is End.RECORDED:
            session.append(step_ends, (optimizer,), {}, optimizers=(optimizer,))
            session.tape.mutated = True
            self._end_step(optimizer)
            return result
        session.settle()
        if (
            end is End.ENDED_EARLY and statistics().steps == steps
        ):  # and not a wrapper around an optimizer whose step ended the tape
            reason = f"step() of {type(optimizer).__name__} asks for values that depend on gradients"
            session.fallbacks.leave(
                CaptureError(f"{reason}, so the step itself runs in torch", user_line()), [optimizer]
            )
        session.is_in_torch = False
        session.registry.stepped(optimizer, "eager")
        return result

    @staticmethod
    def _reason_for_torch(optimizer: torch.optim.Optimizer) -> str | None:
        """Why a step that we know is torch's nevertheless."""
        kind = type(optimizer)
        if of_torch(kind) and hooks_of(optimizer):
            return f"{kind.__name__} has a step hook"
        with torch._C.DisableTorchFunction():
            capturable = (p for group in optimizer.param_groups if group.get("capturable") for p in group["params"])
            if of_torch(kind) and any(parameter.device.type == "cpu" for parameter in capturable):
                return f"{kind.__name__} has capturable=True, which PyTorch refuses on a CPU"
            if isinstance(optimizer, torch.optim.Adam) and any(map(torch.is_complex, parameters_of(optimizer))):
                # Their real and imaginary parts have averages of their own.
                return f"{kind.__name__} trains complex numbers"
        return None

    def _with_closure(self, optimizer: torch.optim.Optimizer, closure: Any, args: tuple, kwargs: dict) -> tuple:
        """The arguments of `step`, with a closure that has to clear gradients which an earlier step did not keep."""
        registry = self._session.registry

        def checked(*given: Any) -> Any:
            lost = [parameter for parameter in parameters_of(optimizer) if registry.is_consumed(parameter)]
            for parameter in lost:  # not a number, until somebody clears it
                store_gradient(parameter, torch.full_like(parameter, float("nan")))
            loss = closure(*given)
            for parameter in lost:
                gradient = stored_gradient(parameter)
                if gradient is None or not gradient.isnan().any():
                    registry.forget_consumed(parameter)
            registry.check_unconsumed(parameters_of(optimizer))
            return loss

        return ((checked, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": checked})

    @section.around
    def unscale(self, original: Callable, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        """Does what `GradScaler.unscale_` does."""
        if not self._may_scale(scaler, optimizer) or not grad_scaler.is_ready(scaler, optimizer):
            return original(scaler, optimizer)
        self.clippings.add(grad_scaler.unscale)
        parameters = list(parameters_of(optimizer))
        found_inf = self._session.record(grad_scaler.unscale, (parameters, scaler._scale), {}, gradients_exist=True)
        return grad_scaler.unscaled(scaler, optimizer, found_inf)

    @section.around
    def scaled_step(self, original: Callable, scaler: Any, optimizer: torch.optim.Optimizer, args, kwargs) -> Any:
        """Does what `GradScaler.step` does; whether the step is skipped is decided in the program."""
        if not self._may_scale(scaler, optimizer) or any(argument is not None for argument in args) or kwargs:
            return original(scaler, optimizer, *args, **kwargs)
        if grad_scaler.is_ready(scaler, optimizer):
            scaler.unscale_(optimizer)
        self._overflow = grad_scaler.overflow(scaler, optimizer)
        if self._overflow is None:
            return original(scaler, optimizer, *args, **kwargs)
        try:
            if not grad_scaler.is_watched(optimizer):
                optimizer.step()
            else:
                type(optimizer).step(optimizer)
                self._stepped_already = optimizer
                if not self._overflow.item():
                    optimizer.step()
        finally:
            self._overflow = self._stepped_already = None
        return grad_scaler.stepped(scaler, optimizer)

    def _may_scale(self, scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
        session = self._session
        ours = session.deferring and session.has_backward and not session.is_unwatched()
        plain = of_torch(type(optimizer)) and not hooks_of(optimizer)
        return ours and plain and scaler.is_enabled() and not session.fallbacks.covers(optimizer)

    def _look_at_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Computes what the script has put into an optimizer's state or groups and nobody has computed yet."""
        for space in (*optimizer.state.values(), *optimizer.param_groups):
            for name, value in space.items():
                if type(value) is DeferredTensor:
                    space[name] = self._session.value(value.slot)

    def _unless_overflow(self, original: Callable, optimizer: torch.optim.Optimizer) -> tuple[Callable, tuple]:
        if self._overflow is None:
            return original, (optimizer,)
        return grad_scaler.step_unless, (original, optimizer, self._overflow)

    def _tell_of_new_ones(self) -> None:
        """Says so where every step is that of a new optimizer, which PyTorch makes."""
        self._first_steps += 1
        # A search makes an optimizer for each model: later steps are more. Of a GAN one of the two may be made anew.
        if self._told_of_new_ones or self._first_steps < self._later_steps:
            return
        if self._first_steps >= len(self._session.registry.optimizers()) + _MANY_NEW:
            self._told_of_new_ones = True
            reason = "each step is the first one of a new optimizer: make the optimizer once, before the loop"
            self._session.fallbacks.say(CaptureError(reason, user_line()))

    def _tell_of_unseen(self, optimizer: torch.optim.Optimizer) -> None:
        """Says why nothing is compiled of a loop whose gradients come from elsewhere, if nothing has been said."""
        session = self._session
        habits = session.registry.habits(optimizer)
        if habits.steps < 2 or habits.was_compiled or not session.deferring or session.programs.policy.is_waiting:
            return
        if session.backward_compiled or session.fallbacks.has_spoken:
            return
        if any(stored_gradient(parameter) is not None for parameter in parameters_of(optimizer)):
            kind = type(optimizer).__name__
            reason = (
                f"its gradients do not come from backward() of what {kind}'s parameters were seen to compute: those of "
                "torch.func, or of another process, are not recorded"
            )
            session.fallbacks.say(CaptureError(reason, user_line()))

    def _reason_to_step_eagerly(self, optimizer: torch.optim.Optimizer, closure: Any) -> str | None:
        session = self._session
        if closure is not None:
            return "optimizer.step() was given a closure"
        if not session.deferring or session.fallbacks.covers(optimizer) or not session.registry.is_ready(optimizer):
            return f"{type(optimizer).__name__} steps eagerly"
        return None if session.tape or session.backward_compiled else "the gradients were computed eagerly"

    def _cut(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives up gradients that the step is about to make impossible.

        A result that was computed with parameters which the step changes cannot be differentiated afterwards, as torch
        mostly refuses too. A validation loss outside of `no_grad`, which was read, is the usual case; of another result
        is kept what a late backward needs.
        """
        session = self._session
        updated = set(map(id, parameters_of(optimizer)))
        keeps = session.programs.target.is_one_cpu and session.workers is None
        for slot in session.tape.live_slots():
            if slot.requires_grad and not slot.freed:
                behind = session.tape.entries_behind(slot)
                if any(isinstance(leaf, torch.Tensor) and id(leaf) in updated for e in behind for leaf in e.leaves):
                    if keeps and slot.value is None:
                        with passthrough():
                            slot.late = kept(session.tape, slot, parameters_of(optimizer))
                    slot.freed = True

    def _end_step(self, optimizer: torch.optim.Optimizer) -> None:
        session = self._session
        fallbacks = session.fallbacks.count
        if session.tape.committable() == len(session.tape.entries):
            session.commit()
        elif sum(len(entry.optimizers) for entry in session.tape.entries) > 2 * len(session.registry.optimizers()):
            session.run_eagerly(
                CaptureError(
                    reason="results of earlier steps still need gradients after several optimizer steps",
                    where=user_line(),
                )
            )
        is_torchs = session.is_in_torch or fallbacks != session.fallbacks.count
        session.is_in_torch = False
        session.registry.stepped(optimizer, "eager" if is_torchs else "xla")

    @section.around
    def clip(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `clip_grad_norm_` and `clip_grad_value_` do."""
        session = self._session
        if session.is_unwatched() or not session.has_backward:
            if not session.is_unwatched():
                session.settle()
            with passthrough():
                return original(*args, **kwargs)
        parameters = args[0] if args else kwargs.pop("parameters")
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        self.clippings.add(original)
        return session.record(original, (parameters, *args[1:]), kwargs, gradients_exist=True)
