"""Looks and writes at what is pending: questions about deferred tensors, and calls that the tape's writes concern."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.eval_shape import with_gradient
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.session.function_mode import Kind, opened
from trainingcompiler.frameworks.pytorch.tape.arguments import tensors_among
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor, take_contents
from trainingcompiler.frameworks.pytorch.tape.entries import Slot

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


class ResultAccess:
    """What becomes of a look or a write before the tape has run, in a session."""

    def __init__(self, session: "Session"):
        self._session = session

    def metadata(self, slot: Slot, function: Any, args: tuple, kwargs: dict) -> Any:
        """What is known of a deferred tensor, the first argument, without its values."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            name = function.__self__.__name__
            if devices.is_shown(name):
                return devices.shown(name, slot.device)
            return getattr(slot.meta, name)
        if devices.is_shown(name):
            return devices.shown(name, slot.device)
        return function(slot.meta, *args[1:], **kwargs)

    def graph_node(self, function: Callable, tensor: torch.Tensor) -> Any:
        """`tensor.grad_fn`: autograd's own node, which a tensor of the tape has once torch has run the tape."""
        if not isinstance(tensor, DeferredTensor):
            node = function(tensor)
        elif tensor.slot.requires_grad:
            node = self.run_with_history("grad_fn", function, (tensor,), {})
        else:
            return None
        if node is not None:
            self._session.accumulators.reach(node)
        return node

    def look(self, kind: Kind, function: Callable, args: tuple, kwargs: dict) -> Any:
        """torch's own answer about real tensors, whose values the tape does not change."""
        if kind is Kind.BACKWARD and self._session.has_backward:
            self._session.settle()
        return function(*args, **kwargs)

    def set_flag(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`p.requires_grad_(...)`: Python sees it at once, and calls that are pending have seen the old flag."""
        tensor = args[0]
        before = tensor.requires_grad
        result = function(*args, **kwargs)
        if id(tensor) in self._session.tape.grad_flags and tensor.requires_grad != before:
            entry = self._session.append(torch.Tensor.requires_grad_, (tensor, not before), {})
            entry.writes = ()
        return result

    def require_gradient(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`h.requires_grad_()` or `h.requires_grad = ...` of a result, which becomes a leaf."""
        session = self._session
        tensor, flag = args[0], (*args[1:], *kwargs.values(), True)[0]
        slot = tensor.slot
        if slot.requires_grad == flag:
            return tensor
        if not flag and not slot.meta.is_leaf and slot not in session.tape.new_leaves:
            raise RuntimeError(
                "you can only change requires_grad flags of leaf variables. If you want to use a computed variable in "
                "a subgraph that doesn't require differentiation use var_no_grad = var.detach()."
            )
        if not flag or slot.committed:
            return self.run_with_history("requires_grad_", function, args, kwargs)
        session.record(torch.Tensor.requires_grad_, (tensor, True), {})
        slot.meta, slot.requires_grad = with_gradient(slot.meta), True
        session.tape.new_leaves.append(slot)
        return tensor

    def gradient_of_result(self, function: Callable, tensor: DeferredTensor) -> torch.Tensor | None:
        """`h.grad`: None, unless `h.requires_grad_()` has made a leaf of a result."""
        session = self._session
        if session.has_backward and tensor.slot in session.tape.new_leaves:
            session.run_eagerly(CaptureError("the gradient of a result is read", user_line()))
        value = tensor.slot.value
        return function(value) if tensor.slot.committed and value is not None else None

    def draw(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Random numbers shaped like a deferred tensor, drawn by torch: the numbers are the ones that eager draws."""
        if function is torch.normal:
            return self._draw_normal(function, *args, **kwargs)
        return function(self._empty_like(args[0]), *args[1:], **kwargs)

    def draw_into(self, function: Callable, tensor: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        """Fills a tensor with random numbers that torch draws; tensor or arguments are deferred."""
        session = self._session
        args, kwargs = session.real(args), session.real(kwargs)
        if not isinstance(tensor, DeferredTensor):
            self.before_write([tensor])
            return function(tensor, *args, **kwargs)
        drawn = function(self._empty_like(tensor), *args, **kwargs)
        return session.record(torch.Tensor.copy_, (tensor, drawn), {})

    def _empty_like(self, tensor: DeferredTensor) -> torch.Tensor:
        slot = tensor.slot
        with torch._C.DisableTorchFunction():
            return torch.empty(slot.meta.shape, dtype=slot.meta.dtype, device=slot.device)

    def _draw_normal(self, function: Callable, mean: Any, std: Any = 1.0, *, generator=None, out=None) -> Any:
        """`torch.normal` around means that are deferred, or so wide: torch draws, and the rest is recorded."""
        if out is not None:
            return self.run_with_history("normal", function, (mean, std), {"generator": generator, "out": out})
        given = [value for value in (mean, std) if isinstance(value, torch.Tensor)]
        shape = torch.broadcast_shapes(*[tuple(value.shape) for value in given])
        around = torch.zeros(shape, dtype=given[0].dtype, device=given[0].device)
        is_wide = isinstance(std, torch.Tensor)
        with torch.no_grad():  # no gradient passes a draw
            drawn = function(around, 1.0 if is_wide else std, generator=generator)
            if is_wide:
                drawn = self._session.record(torch.mul, (drawn, std), {})
            return self._session.record(torch.add, (drawn, mean), {})

    def is_written(self, tensor: torch.Tensor) -> bool:
        try:
            return tensor.untyped_storage()._cdata in self._session.tape.written
        except (NotImplementedError, RuntimeError):  # sparse tensors have none
            return False

    def after_write(self, kind: Kind, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A call on a tensor that pending calls write to."""
        session = self._session
        tensors, _ = tensors_among(args, kwargs)
        known = all(not self.is_written(t) or id(t) in session.tape.grad_flags for t in tensors)
        is_recorded = known and kind in (Kind.OPERATOR, Kind.IN_PLACE) and not section.handling
        if is_recorded and (session.depth or not torch.is_grad_enabled()):
            return session.record(function, args, kwargs)
        if kind is Kind.FLAG and not section.handling:
            return self.set_flag(function, args, kwargs)
        session.settle()
        return function(*args, **kwargs)

    def before_write(self, tensors: list[torch.Tensor]) -> None:
        """Computes what has read the state that is about to be written to."""
        session = self._session
        if not session.tape or not tensors:
            return
        storages = {tensor.untyped_storage()._cdata for tensor, _ in session.tape.grad_flags.values()}
        if any(_storage(tensor) in storages for tensor in tensors):
            session.settle()

    @section.around
    def swap(self, original: Callable, one: torch.Tensor, other: torch.Tensor) -> None:
        """Does what `torch.utils.swap_tensors` does, which refuses tensors with weak references: ours do not mind.

        They stand for the tensor's object. It has other memory afterwards, as after `p.data = ...`.
        """
        if not self._session.is_unwatched():
            self._session.settle()
        with mock.patch.object(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda _: [])):
            original(one, other)

    def run_with_history(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        session = self._session
        if session.needs_gradient(args, kwargs) and (torch.is_grad_enabled() or name != "requires_grad_"):
            session.run_eagerly(CaptureError(reason=f"the loop uses {name} on a result", where=user_line()))
        return function(*session.real(args), **session.real(kwargs))

    # -- calls that go the way of their kind --------------------------------------------------------------------

    def flags(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`requires_grad`, asked to change, of a result."""
        result = self.require_gradient(function, args, kwargs)
        return None if name == "__set__" else result  # torch never lets go of what an assignment gives

    def reshape_real(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`x.unsqueeze_(0)` of a real tensor, which torch does: it computes nothing."""
        self.before_write([args[0]])
        self._session.tape.inputs.pop(id(args[0]), None)  # a snapshot of another shape
        return function(*args, **kwargs)

    def reshapes(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`h.unsqueeze_(0)` of a result, which becomes what `h.unsqueeze(0)` is."""
        tensor = args[0]
        result = self._session.record(_RESHAPED[name], args, kwargs) if name in _RESHAPED else None
        if result is tensor:  # `squeeze_` of nothing
            return tensor
        is_view = name == "detach_" and isinstance(tensor, DeferredTensor) and tensor.slot.memory is not None
        if type(result) is DeferredTensor and type(tensor) is DeferredTensor and not is_view:
            old, new = tensor.slot, result.slot
            old.wrapper = new.wrapper = None  # a tensor with weak references cannot be swapped
            try:
                take_contents(tensor, result)
            except RuntimeError:  # somebody else refers to it weakly
                old.wrapper, new.wrapper = weakref.ref(tensor), weakref.ref(result)
            else:
                new.wrapper = weakref.ref(tensor)
                return tensor
        if type(tensor) is DeferredTensor:
            self._session.run_eagerly(CaptureError(f"the loop uses {name} on a result", user_line()))
        return function(*args, **kwargs)  # on what are torch's own tensors now

    def sets(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """An attribute is assigned."""
        if getattr(getattr(function, "__self__", None), "__name__", "") == "data":
            self.before_write([args[0]])
            return function(*self._session.real(args))  # `p.data = ...`: values without a history
        return self.run_with_history(name, function, args, kwargs)

    def reaches_into_graph(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A hook, and what else looks at the graph that autograd would have."""
        session = self._session
        if name == "register_hook" and torch.is_grad_enabled() and session.needs_gradient(args, {}):
            try:
                return session.backward_python.hook(*args, **kwargs)
            except CaptureError as error:
                session.run_eagerly(error)
                return function(*session.real(args), **session.real(kwargs))
        if name == "as_subclass" and args[1:] == (torch.Tensor,):
            return args[0]
        return self.run_with_history(name, function, args, kwargs)

    def draws(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Random numbers shaped like a result."""
        return self.draw(function, args, kwargs)  # it looks at shapes only: torch draws, with its own generator

    def draws_from(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Random numbers, of probabilities."""
        session = self._session
        if name == "multinomial" or not session.differentiates(args, kwargs):  # its result has no gradient
            return function(*session.real(args), **session.real(kwargs))
        return session.record(function, args, kwargs)

    def draws_within(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Python of torch's that draws random numbers: it runs, so that torch draws what it draws in eager."""
        return opened(function)(*args, **kwargs)

    def draws_into(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A result is filled with random numbers."""
        if not self._session.differentiates(args, kwargs):
            return self.draw_into(function, args[0], args[1:], kwargs)
        return self._session.record(function, args, kwargs)


_RESHAPED: dict[str, Callable] = {
    f"{name}_": getattr(torch.Tensor, name)
    for name in ("unsqueeze", "squeeze", "t", "transpose", "swapaxes", "swapdims", "as_strided", "detach")
}

HANDLERS: dict[Kind, Callable[[ResultAccess, str, Callable, tuple, dict], Any]] = {
    Kind.FLAG: ResultAccess.flags,
    Kind.RESHAPE: ResultAccess.reshapes,
    Kind.SET: ResultAccess.sets,
    Kind.OPAQUE: ResultAccess.reaches_into_graph,
    Kind.NATIVE: ResultAccess.run_with_history,
    Kind.DRAW: ResultAccess.draws,
    Kind.DRAW_FROM: ResultAccess.draws_from,
    Kind.DRAW_INTO: ResultAccess.draws_into,
    Kind.DRAW_WITHIN: ResultAccess.draws_within,
}
"""What becomes of a call on a result that is neither computed nor a plain operator, by its kind."""


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0
