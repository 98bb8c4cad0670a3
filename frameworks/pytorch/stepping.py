"""What ends a step: clipping, `GradScaler`, `optimizer.step`, as the tape sees them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainingcompiler import planner
from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch import loss_scaling, tensor_hooks
from trainingcompiler.frameworks.pytorch.deferred import DeferredTensor
from trainingcompiler.frameworks.pytorch.optimizers import calls_closure_once, hooks_of, parameters_of
from trainingcompiler.frameworks.pytorch.recorder import user_line
from trainingcompiler.frameworks.pytorch.replaying import is_replaying, undeferred

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session import Session


class Stepping:
    """The end of a step, in a session.

    Attributes:
        clippings: The functions on the tape that change gradients in place.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self.clippings: set[Callable] = set()
        self._overflow: DeferredTensor | None = None  # inside `GradScaler.step`: whether to skip the optimizer's
        self._stepped_already: torch.optim.Optimizer | None = None

    def step(self, optimizer: torch.optim.Optimizer, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `optimizer.step()` does: it ends the tape, unless a live value still needs a gradient."""
        session = self._session
        if session.is_unwatched():
            result = original(optimizer, *args, **kwargs)
            if not is_replaying() and session.is_own_thread:
                session.book.stepped(optimizer, "eager")  # a parameter's hook makes it, inside of torch's own backward
            return result
        if optimizer is self._stepped_already:
            return None  # a look at the call is all that is left to do
        closure = args[0] if args else kwargs.get("closure")
        if closure is not None and session.deferring and calls_closure_once(optimizer):
            with torch.enable_grad():
                loss = closure()
            self.step(optimizer, original, (), {})
            return loss
        if session.deferring and hooks_of(optimizer) and not session.fallbacks.covers(optimizer):
            reason = f"{type(optimizer).__name__} has a step hook, so the step itself runs in torch"
            session.fallbacks.leave(CaptureError(reason, user_line()), [optimizer])
        reason = self._reason_to_step_eagerly(optimizer, closure)
        if reason is None:
            self._cut(optimizer)
            function, arguments = self._unless_overflow(original, optimizer)
            session.append(function, arguments, {}, optimizers=(optimizer,))
            return self._end_step(optimizer)
        if planner.current is not None:
            planner.current.left(f"PyTorch would run it, because {reason}")
        if (
            session.tape
            and session.fallbacks.covers(optimizer)
            and session.tape.committable() == len(session.tape.entries)
        ):
            session.commit()  # forward and backward, up to the gradients
        elif session.tape:
            session.run_eagerly(CaptureError(reason=reason, where=user_line()), optimizer)
        elif session.deferring and closure is not None:
            session.fallbacks.say(CaptureError(reason=reason, where=user_line()))
        else:
            self._tell_of_unseen(optimizer)
        session.book.check_unconsumed(parameters_of(optimizer))
        if self._overflow is not None and self._overflow.item():
            return None
        with undeferred():
            result = original(optimizer, *args, **kwargs)
        session.book.stepped(optimizer, "eager")
        return result

    def unscale(self, original: Callable, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        """Does what `GradScaler.unscale_` does."""
        if not self._may_scale(scaler, optimizer) or not loss_scaling.is_ready(scaler, optimizer):
            return original(scaler, optimizer)
        self.clippings.add(loss_scaling.unscale)
        parameters = list(parameters_of(optimizer))
        found_inf = self._session.record(loss_scaling.unscale, (parameters, scaler._scale), {}, gradients_exist=True)
        return loss_scaling.unscaled(scaler, optimizer, found_inf)

    def scaled_step(self, original: Callable, scaler: Any, optimizer: torch.optim.Optimizer, args, kwargs) -> Any:
        """Does what `GradScaler.step` does; whether the step is skipped is decided in the program."""
        if not self._may_scale(scaler, optimizer) or any(argument is not None for argument in args) or kwargs:
            return original(scaler, optimizer, *args, **kwargs)
        if loss_scaling.is_ready(scaler, optimizer):
            scaler.unscale_(optimizer)
        self._overflow = loss_scaling.overflow(scaler, optimizer)
        if self._overflow is None:
            return original(scaler, optimizer, *args, **kwargs)
        try:
            if not loss_scaling.is_watched(optimizer):
                optimizer.step()
            else:
                type(optimizer).step(optimizer)
                self._stepped_already = optimizer
                if not self._overflow.item():
                    optimizer.step()
        finally:
            self._overflow = self._stepped_already = None
        return loss_scaling.stepped(scaler, optimizer)

    def _may_scale(self, scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
        session = self._session
        ours = session.deferring and session.has_backward and not session.is_unwatched()
        return ours and scaler.is_enabled() and not session.fallbacks.covers(optimizer) and not hooks_of(optimizer)

    def _unless_overflow(self, original: Callable, optimizer: torch.optim.Optimizer) -> tuple[Callable, tuple]:
        if self._overflow is None:
            return original, (optimizer,)
        return loss_scaling.step_unless, (original, optimizer, self._overflow)

    def _tell_of_unseen(self, optimizer: torch.optim.Optimizer) -> None:
        """Says why nothing is compiled of a loop that calls no module, if nothing else has been said."""
        session = self._session
        begins = session.book.habits(optimizer).steps < 2
        if not session.deferring or begins or session.backward_compiled or session.fallbacks.has_spoken:
            return
        if any(tensor_hooks.stored_gradient(parameter) is not None for parameter in parameters_of(optimizer)):
            reason = (
                f"its gradients do not come from a module that {type(optimizer).__name__} trains and the loop calls: "
                "model(x) is seen; model.forward(x), and operators on the parameters themselves, are not"
            )
            session.fallbacks.say(CaptureError(reason, user_line()))

    def _reason_to_step_eagerly(self, optimizer: torch.optim.Optimizer, closure: Any) -> str | None:
        session = self._session
        if closure is not None:
            return "optimizer.step() was given a closure"
        if not session.deferring or session.fallbacks.covers(optimizer) or not session.book.is_ready(optimizer):
            return f"{type(optimizer).__name__} steps eagerly"
        return None if session.tape or session.backward_compiled else "the gradients were computed eagerly"

    def _cut(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives up gradients that the step is about to make impossible.

        A result that was computed with parameters which the step changes cannot be differentiated afterwards: torch
        refuses it, because they were modified in place. A validation loss outside of `no_grad` is the usual case.
        """
        session = self._session
        updated = set(map(id, parameters_of(optimizer)))
        for slot in session.tape.live_slots():
            if slot.meta.requires_grad and not slot.freed:
                for function in session.tape.functions_behind(slot):
                    if isinstance(function, nn.Module):
                        parameters = session.calls.modules.fingerprint(function).parameters
                        if any(id(parameter) in updated for parameter in parameters):
                            slot.freed = True

    def _end_step(self, optimizer: torch.optim.Optimizer) -> None:
        session = self._session
        fallbacks = session.fallbacks.count
        if session.tape.committable() == len(session.tape.entries):
            session.commit()
        elif sum(len(entry.optimizers) for entry in session.tape.entries) > 2 * len(session.book.optimizers()):
            session.run_eagerly(
                CaptureError(
                    reason="results of earlier steps still need gradients after several optimizer steps",
                    where=user_line(),
                )
            )
        session.book.stepped(optimizer, "xla" if fallbacks == session.fallbacks.count else "eager")

    def clip(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `clip_grad_norm_` and `clip_grad_value_` do."""
        session = self._session
        if session.is_unwatched() or not session.has_backward:
            with undeferred():
                return original(*args, **kwargs)
        parameters = args[0] if args else kwargs.pop("parameters")
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        self.clippings.add(original)
        return session.record(original, (parameters, *args[1:]), kwargs, gradients_exist=True)
