"""What a script does with `.grad`: reads, writes, and clears it, while the tape may know more than torch."""

from typing import TYPE_CHECKING, Any

import torch

from trainingcompiler.errors import PassingCaptureError
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.session.backward_pieces import LeftToTorch
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


class GradientAccess:
    """Sees to it that whoever looks at a gradient, or sets one, finds what the script's order has made of it.

    Args:
        session: Whose tape it is.
    """

    def __init__(self, session: "Session"):
        self._session = session

    def reads_gradient(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What `tensor.grad` is, if only the tape knows, in whatever thread; None if torch knows it.

        Raises:
            LeftToTorch: A hook asks, and only autograd knows whether that gradient has been added to already.
        """
        session = self._session
        if session.is_left_alone():
            return None
        piece = session.tape.piece
        if piece is not None and piece.leaves[0] is not tensor and id(tensor) in session.tape.grad_flags:
            raise LeftToTorch("Python that backward() runs looks at the gradient of another parameter")
        pending = session.custom_steps.gradient(tensor) if session.is_own_thread else None
        if pending is not None:
            return pending
        if session.has_backward or session.tape.uses_stored_gradients([tensor]):
            session.commit()
        if session.has_backward and id(tensor) in session.tape.with_gradients():  # its graph is retained
            session.settle()
        if session.tape.uses_stored_gradients([tensor]):
            session.settle()
        session.registry.reads_gradient(tensor)
        return None

    @section.around
    def writes_gradient(self, tensor: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """What to store for `tensor.grad = gradient`."""
        session = self._session
        if session.is_unwatched():
            return gradient
        if session.has_backward or session.tape.uses_stored_gradients([tensor]):
            session.settle()
        session.registry.writes_gradient(tensor, gradient)
        if gradient is not None and torch._debug_has_internal_overlap(gradient) == 1:  # a program could not write to it
            session.backward_compiled = False
            session.fallbacks.say(
                PassingCaptureError("a gradient whose elements share memory is assigned", user_line())
            )
        return session.value(gradient.slot) if isinstance(gradient, DeferredTensor) else gradient

    @section.around
    def clears_gradients(self, owner: Any, parameters: list[torch.Tensor], set_to_none: bool) -> None:
        """What has to happen before `zero_grad`: nothing is left that only the tape knows."""
        session = self._session
        if session.is_unwatched():
            return
        if session.has_backward and not (
            set_to_none and session.backward.drop({id(parameter) for parameter in parameters})
        ):
            session.commit()  # to be zeros, gradients have to be there
        if session.has_backward and not session.tape.with_gradients().isdisjoint(map(id, parameters)):
            session.settle()
        if session.tape.uses_stored_gradients(parameters):
            session.settle()
        session.registry.clears_gradients(owner, parameters, set_to_none)
