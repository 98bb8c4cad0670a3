"""Writes `backward()` on the tape."""

import functools
from typing import TYPE_CHECKING, Any

import torch

from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.session.backward_pieces import LeftToTorch, leaf_hooked, leaf_unhooked
from trainingcompiler.frameworks.pytorch.session.given_tensors import version_of
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor, functional_name
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, memory_of

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session

_FREED = (
    "backward() cannot go through this tensor any more: the graph behind it was freed by an earlier backward() (pass "
    "retain_graph=True to that one), or its parameters have been updated since by optimizer.step()."
)


_KEEP_NOTHING = frozenset({"add", "__add__", "__radd__", "sub", "__sub__", "__rsub__"})  # if no factor is a tensor
_KEEP_NO_RESULT = _KEEP_NOTHING | {"batch_norm", "layer_norm", "group_norm", "linear", "conv1d", "conv2d", "conv3d"}


class BackwardRecorder:
    """What becomes of a backward, of one result or of several, in a session."""

    def __init__(self, session: "Session"):
        self._session = session

    @section.around
    def record(self, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
        """`tensor.backward(...)`; torch runs what a tape has no word for.

        Raises:
            RuntimeError: As torch's: the graph was freed, shapes do not match, or there is nothing to differentiate.
        """
        session = self._session
        # What torch would refuse is refused now, with torch's words.
        slot = tensor.slot if isinstance(tensor, DeferredTensor) else None
        if self._is_pending(tensor):
            _check_root(slot.meta, gradient, session.tape.mutated)
        if slot is not None and slot.late is not None and not create_graph and not inputs:
            return self._record_late(slot, gradient, retain_graph)
        if slot is not None and slot.freed and slot.committed:
            raise RuntimeError(_FREED)
        # What a tape has no word for, torch runs, with the whole of the tape as its history.
        if not self._is_pending(tensor) or create_graph:
            reason = "backward() keeps a graph, or goes through a module that another one has gone through"
            session.run_eagerly(CaptureError(reason=reason, where=user_line()))
            return BACKWARD(session.real(tensor), gradient, retain_graph, create_graph, inputs)
        if session.is_undecided():
            session.begin_in_torch()
            return BACKWARD(session.real(tensor), session.real(gradient), retain_graph, inputs=inputs)
        # The rest is recorded, and the Python that runs inside of it is run; until that has ended, all can be undone.
        if len(session.tape.roots) > 1 and not session.has_backward:
            session.peeks.forget_unread(slot)
        mark = session.mark()
        try:
            entry = self._append_backward(tensor, gradient, retain_graph, inputs)
        except (CaptureError, LeftToTorch) as error:
            session.take_back(mark)
            session.run_eagerly(error.error if isinstance(error, LeftToTorch) else error)
            return BACKWARD(session.real(tensor), session.real(gradient), retain_graph, inputs=inputs)
        except BaseException:  # the script's own error, in Python that backward runs
            session.take_back(mark)
            raise
        if session.tape.asked is not None:
            return session.run_eagerly(session.tape.asked)
        if not retain_graph:
            session.tape.free(slot)
        session.backward_recorded(entry)
        return None

    def _append_backward(self, tensor: DeferredTensor, gradient: Any, retain_graph: bool | None, inputs: Any) -> Entry:
        """Writes a backward on the tape, and runs the Python that is part of it.

        Raises:
            CaptureError: It cannot be part of a program.
            LeftToTorch: Its Python does what is not compiled.
        """
        session = self._session
        changed = self._rewritten()
        if changed:
            session.append(rewritten, changed, {})
            session.tape.read = [read for read in session.tape.read if read[2] not in changed]
        hooked = session.backward_python.hook_leaves()
        entry = session.append(BACKWARD, (tensor, gradient, retain_graph, False), {"inputs": inputs})
        with section.outside():
            if changed or self._writes_results():
                session.backward_python.check(entry)
            session.backward_python.run(entry, bool(retain_graph))
        session.backward_python.unhook_leaves(hooked)
        return entry

    def _record_late(self, slot: Slot, gradient: Any, retain_graph: bool | None) -> None:
        """A backward after a step: torch runs it."""
        session = self._session
        session.settle()
        reason = "backward() goes through parameters that a step has changed since"
        session.fallbacks.leave(PassingCaptureError(reason=reason, where=user_line()), [])
        session.backward_compiled = False
        late, slot.late = slot.late, slot.late if retain_graph else None
        with passthrough():
            late.run(session.real(gradient), retain_graph)

    def _rewritten(self) -> tuple[Input, ...]:
        """What calls have read and has been written to since, or is by a call that is pending."""
        session = self._session
        with torch._C.DisableTorchFunction():
            pending = {tensor.untyped_storage()._cdata for tensor in session.tape.state.values()} & session.tape.written
            return tuple(
                encoded
                for owner, version, encoded in session.tape.read
                if version_of(owner) != version or (pending and owner.untyped_storage()._cdata in pending)
            )

    def _writes_results(self) -> bool:
        """Whether results that need a gradient are written to, and another call may have kept them for its gradient."""
        keepers: dict[Slot, bool] = {}
        for entry in self._session.tape.entries:
            name = functional_name(getattr(entry.function, "__name__", ""))
            for position in entry.writes:
                slot = memory_of(entry.leaves[position])
                if type(slot) is Slot and slot.requires_grad and (not entry.modes.grad or keepers.get(slot, True)):
                    return True
            keepers.update((slot, name not in _KEEP_NO_RESULT) for slot in entry.outputs)
            if name not in _KEEP_NOTHING:
                keepers.update((leaf, True) for leaf in entry.leaves if type(leaf) is Slot)
        return False

    def record_of_many(self, tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None) -> None:
        """`torch.autograd.backward`: of several results, that of their sum, so that each hook runs once."""
        session = self._session
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        gradients = [grad_tensors] if isinstance(grad_tensors, torch.Tensor) else list(grad_tensors or ())
        gradients += [None] * (len(tensors) - len(gradients))
        if len(tensors) == 1:
            return self.record(tensors[0], gradients[0], retain_graph, create_graph, inputs)
        if not create_graph and all(map(self._is_pending, tensors)):
            with torch.enable_grad():
                parts = list(map(self._weighted, tensors, gradients))
                total = functools.reduce(lambda sum, part: session.record(torch.add, (sum, part), {}), parts)
            self.record(total, None, retain_graph, create_graph, inputs)
        else:
            session.run_eagerly(CaptureError("backward() goes through what torch has computed, too", user_line()))
            real, given = session.real(tensors), session.real(gradients)
            torch.autograd.backward(real, given, retain_graph, create_graph, inputs=inputs)
        for tensor in tensors:
            if not retain_graph and isinstance(tensor, DeferredTensor) and not tensor.slot.committed:
                session.tape.free(tensor.slot)

    @staticmethod
    def _is_pending(tensor: torch.Tensor) -> bool:
        return isinstance(tensor, DeferredTensor) and not tensor.slot.committed and not tensor.slot.freed

    def _weighted(self, result: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        """A scalar whose gradient with respect to `result` is `gradient`, or 1."""
        session = self._session
        if gradient is not None:
            if gradient.shape != result.shape:
                raise RuntimeError(f"Mismatch in shape: {list(gradient.shape)} for a result of {list(result.shape)}")
            result = session.record(torch.mul, (result, session.record(torch.detach, (gradient,), {})), {})
        elif result.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        return session.record(torch.sum, (result,), {})

    def drop(self, cleared: set[int]) -> bool:
        """Takes back a backward, as an aborted step leaves behind, if all its gradients are being cleared."""
        session = self._session
        for entry in session.tape.entries:
            if entry.optimizers or entry.function in session.stepping.clippings:
                return False
        if any(leaf.requires_grad and id(leaf) not in cleared for leaf, _ in session.tape.grad_flags.values()):
            return False
        goes = (BACKWARD, leaf_hooked, leaf_unhooked)
        stays = [entry for entry in session.tape.entries if entry.function not in goes and not entry.is_in_backward]
        session.rebuild(stays)
        return True


def _check_root(root: torch.Tensor, gradient: Any, may_have_history: bool) -> None:
    """Refuses what `backward()` refuses of a result, in its words: here, and not when the step is computed.

    Args:
        root: Of its shape, and whether it was made with a history.
        gradient: What `backward()` was given.
        may_have_history: Whether something that has one may have been written into it since.

    Raises:
        RuntimeError: As torch's.
    """
    if not root.requires_grad and not may_have_history:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    if gradient is None and root.numel() != 1:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    if isinstance(gradient, torch.Tensor) and gradient.shape != root.shape:
        shapes = f"grad_output[0] has a shape of {gradient.shape} and output[0] has a shape of {root.shape}"
        raise RuntimeError(f"Mismatch in shape: {shapes}.")


def rewritten(*tensors: torch.Tensor) -> None:
    """Says that these were written to after they were read: where a gradient needs them, `backward()` raises."""
    torch.autograd.graph.increment_version(tensors)
