"""Python that runs inside of backward: `autograd.Function.backward`, and hooks of results.

It runs at every step, as a forward's does. autograd alone knows when each piece runs. So where a path of the recording
comes to its `backward()` for the first time, the tape is run once on fake tensors, which gives the order. From then on
the pieces run in that order, given gradients that nobody has computed yet, and what each asks torch for is recorded.
They lie on the tape behind the backward, between an entry `incoming` and an entry `outgoing`, and whoever runs the tape
runs them where autograd does.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.capture import backward_order
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.session.backward_pieces import (
    Context,
    Function,
    Handle,
    Hook,
    LeafHooks,
    LeftToTorch,
    NotRecordable,
    attached,
    hooked,
    incoming,
    leaf_hooked,
    leaf_unhooked,
    outgoing,
    removed,
)
from trainingcompiler.frameworks.pytorch.session.checkpoint_regions import SecondRun
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.frameworks.pytorch.tape.entries import Entry

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session


class BackwardPython:
    """Records Python that backward runs.

    Args:
        session: Whose tape it is on.
    """

    def __init__(self, session: "Session"):
        self._session = session

    def apply(self, original: Callable, kind: Any, args: tuple) -> Any:
        """Does what `kind.apply(*args)` does, of an `autograd.Function` some of whose arguments are on the tape."""
        session = self._session
        mark = session.mark()
        needs = tuple(isinstance(argument, torch.Tensor) and _requires_gradient(argument) for argument in args)
        differentiates = torch.is_grad_enabled() and any(needs)
        context = Context(needs if differentiates else (False,) * len(args))
        session.depth += 1
        try:
            with torch.no_grad():
                found = self._forward(kind, context, args)
        except NotRecordable as error:
            return self._leave(mark, f"{kind.__name__} {error}", original, kind, args)
        finally:
            session.depth -= 1
        if not differentiates or session.is_in_torch:
            return found if not differentiates else original(kind, *session.real(args))
        results = found if isinstance(found, tuple) else (found,)
        try:
            whole = self._attach(kind, context, args, results)
        except CaptureError as error:
            return self._leave(mark, error.reason, original, kind, args)
        return whole if isinstance(found, tuple) else whole[0]

    def _attach(self, kind: Any, context: Context, args: tuple, results: tuple) -> tuple:
        """Writes on the tape that the gradient of `results` goes through a function's own `backward`."""
        session = self._session
        are_tensors = [isinstance(result, torch.Tensor) for result in results]
        positions = [position for position, argument in enumerate(args) if isinstance(argument, torch.Tensor)]
        tensors = [result for result in results if isinstance(result, torch.Tensor)]
        silent = bytes(position for position, result in enumerate(tensors) if id(result) in context.silent)
        piece = Function(kind, context, positions, are_tensors)
        given = ([args[position] for position in positions], tensors, silent, context.materializes)
        wrapped = iter(session.record_piece(attached, given, piece))
        session.tape.has_pieces = True
        return tuple(next(wrapped) if known else result for known, result in zip(are_tensors, results, strict=True))

    @staticmethod
    def _forward(kind: Any, context: Context, args: tuple) -> Any:
        if kind.setup_context is torch.autograd.Function.setup_context:
            return kind.forward(context, *args)
        found = kind.forward(*args)
        kind.setup_context(context, args, found)
        return found

    def _leave(self, mark: Any, reason: str, original: Callable, kind: Any, args: tuple) -> Any:
        self._session.take_back(mark)
        self._session.run_eagerly(CaptureError(reason, user_line()))
        return original(kind, *self._session.real(args))

    def hook(self, result: DeferredTensor, function: Callable) -> Handle:
        """Does what `result.register_hook(function)` does.

        Raises:
            CaptureError: It cannot be recorded.
        """
        session, slot = self._session, result.slot
        if _is_of_torch(function):
            raise CaptureError("a result has a gradient hook of torch's own", user_line())
        hook = Hook(function)
        session.record_piece(hooked, (result,), hook)
        session.tape.has_pieces = True

        def remove() -> None:
            if not slot.committed:
                session.record_piece(removed, (slot,), hook)

        return Handle(hook, remove)

    def hook_leaves(self) -> list[tuple[LeafHooks, torch.Tensor]]:
        """Puts the hooks that parameters have at this moment on the tape, before a backward.

        Raises:
            CaptureError: One has hooks that look at its `.grad`.
        """
        session, found = self._session, []
        for leaf, _ in list(session.tape.grad_flags.values()):
            if not leaf.requires_grad:
                continue
            hooks = list((leaf._backward_hooks or {}).values())
            is_torchs = session.workers is not None or any(map(_is_of_torch, hooks))
            if leaf._post_accumulate_grad_hooks or (hooks and is_torchs):
                raise CaptureError("a parameter has a gradient hook", user_line())
            if session.accumulators.are_hooked(leaf):
                reason = "the node of autograd's graph that accumulates a parameter's gradient has a hook"
                raise CaptureError(reason, user_line())
            if hooks:
                piece = LeafHooks(hooks)
                session.record_piece(leaf_hooked, (leaf,), piece)
                found.append((piece, leaf))
        session.tape.has_pieces |= bool(found)
        return found

    def unhook_leaves(self, hooked: list[tuple[LeafHooks, torch.Tensor]]) -> None:
        """Ends what `hook_leaves` has begun, after the backward."""
        for piece, leaf in hooked:
            self._session.record_piece(leaf_unhooked, (leaf,), piece)

    def check(self, backward: Entry) -> None:
        """Has a backward fail where torch's would: what a gradient needs was written to meanwhile.

        Raises:
            RuntimeError: As torch's.
            CaptureError: The tape is none that can be run on fake tensors.
        """
        try:
            self._find_order(backward)
        except CaptureError as error:
            if isinstance(error.__cause__, RuntimeError) and "modified by an inplace operation" in error.reason:
                raise RuntimeError(str(error.__cause__)) from None
            raise

    def _find_order(self, backward: Entry) -> tuple[tuple[int, bytes | int], ...]:
        call, tape = backward.call, self._session.tape
        assert call is not None
        if call.pieces is None:
            with passthrough():
                call.pieces = backward_order(tape.entries, tape.grad_flags)
        return call.pieces

    def run(self, backward: Entry, retains_graph: bool) -> None:
        """Runs the Python that a backward runs, the last entry of the tape.

        Args:
            backward: Likewise.
            retains_graph: Whether another backward may go through the same graph.

        Raises:
            LeftToTorch: It asks for what only torch can give.
            CaptureError: The tape is none that can be run on fake tensors.
        """
        session, tape = self._session, self._session.tape
        if not tape.has_pieces and not tape.blocks:
            return
        order = self._find_order(backward)
        tape.is_in_backward = True
        session.depth += 1
        try:
            with torch.no_grad():
                for index, what in order:
                    if isinstance(what, int):
                        self._run_block_again(index, what)
                    else:
                        self._run_piece(tape.entries[index], what)
        finally:
            tape.is_in_backward = False
            session.depth -= 1
        if not retains_graph:  # what blocks were given is nobody's any more, and no result of a program
            tape.block = None
            for region in tape.ran_again & tape.blocks.keys():
                tape.blocks[region].again = None

    def _run_block_again(self, start: int, count: int) -> None:
        """Runs the Python of a checkpointed block a second time, as eager does."""
        tape = self._session.tape
        region = tape.entries[start].region
        block = tape.blocks.get(region)
        if block is None or block.again is None or block.has_inner or self._session.workers is not None:
            return
        # What the second run asks torch for is answered with what the first run was given, call by call.
        first = [entry for entry in tape.entries[start:] if entry.region == region]
        second = tape.second_run = SecondRun(region, first, -1 if block.is_reentrant else count)
        is_first = region not in tape.ran_again
        tape.is_in_backward = False  # what it asks for, forward has been answered
        session, buffers, depth = self._session, self._session.buffers, self._session.depth
        session.depth = block.depth
        session.buffers = buffers | {id(leaf) for e in first for leaf in e.leaves if isinstance(leaf, torch.Tensor)}
        try:
            with torch.enable_grad(), session.mode.seeing():
                block.again()
        except torch.utils.checkpoint._StopRecomputationError:
            pass
        finally:
            tape.second_run, tape.is_in_backward = None, True
            session.buffers, session.depth = buffers, depth
        # It may differ the first time, when the program has not been made: then this step is torch's.
        tape.ran_again.add(region)
        reason = "a checkpointed block computes something else when it runs again"
        if second.differs and not is_first:
            raise LeftToTorch(reason)
        if second.differs:
            tape.asked = tape.asked or CaptureError(reason, tape.entries[start].where)

    def _run_piece(self, entry: Entry, positions: bytes) -> None:
        session, piece = self._session, entry.piece
        if getattr(piece, "is_removed", False):
            return
        slots = entry.outputs or entry.leaves[:1]  # of a function, its results; of a hook, the result it looks at
        gradients = session.record_piece(incoming, ([slots[position] for position in positions], positions), piece)
        given: list[Any] = [None] * len(slots)
        for position, gradient in zip(positions, gradients, strict=True):
            given[position] = gradient
        session.tape.piece = entry
        with session.mode.seeing():  # `backward()` is a torch function itself, of whose Python modes see nothing
            found = piece.backward(given)
        session.tape.piece = None
        session.record_piece(outgoing, (found if isinstance(found, list) else [found],), piece, returns=False)


def _is_of_torch(hook: Callable) -> bool:
    """Whether a hook is torch's own, as those of `register_multi_grad_hook`: they ask autograd where they are."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    names = getattr(function, "__globals__", {})  # not `__module__`, which `functools.wraps` takes from another one
    return (names.get("__name__") or getattr(function, "__module__", None) or "").partition(".")[0] == "torch"


def _requires_gradient(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, DeferredTensor):
        return tensor.slot.requires_grad and not tensor.slot.freed
    return tensor.requires_grad
