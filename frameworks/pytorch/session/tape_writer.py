"""Writes calls on the tape, and finds what they return."""

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad

from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.capture.eval_shape import call_shape, gain_history
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten, flatten_call, map_leaves, unflatten
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes
from trainingcompiler.frameworks.pytorch.session.accumulators import Accumulators
from trainingcompiler.frameworks.pytorch.session.backward_python import BackwardPython
from trainingcompiler.frameworks.pytorch.session.checkpoint_regions import Block, region_of
from trainingcompiler.frameworks.pytorch.session.function_mode import Kind, kind_of
from trainingcompiler.frameworks.pytorch.session.given_tensors import (
    check_plain,
    geometry,
    is_alone,
    still_is,
    version_of,
)
from trainingcompiler.frameworks.pytorch.session.tape_runner import TapeRunner, become_real
from trainingcompiler.frameworks.pytorch.state.shared_tensors import input_array
from trainingcompiler.frameworks.pytorch.tape.call_key import CallKey, InputKey, again_key, constant_key
from trainingcompiler.frameworks.pytorch.tape.call_shape import Argument, CallShape, Output
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor, deferred, take_contents
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, memory_of, step_ends
from trainingcompiler.frameworks.pytorch.tape.index_ranges import INDEXED, is_refused
from trainingcompiler.frameworks.pytorch.tape.recording import numbers_of

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.optimizer_step import OptimizerStepHandler

_ATOMS: frozenset[type] = frozenset(
    {int, float, bool, str, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device, DeferredTensor}
)
_SIMPLE = frozenset({int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type})

Mark = tuple[Any, int, int, nn.Module | None]


class TapeWriter(TapeRunner):
    """Writes what the loop asks for on the tape.

    Attributes:
        stepping: What ends a step.
        backward_python: Python that runs inside of backward.
        accumulators: Whose hooks nobody can see.
        new_root: A module whose call begins with the next entry.
        origins: Under which name a module was given each tensor, by identity.
        open_blocks: The checkpointed blocks that the script's Python is in.
    """

    stepping: "OptimizerStepHandler"
    backward_python: BackwardPython
    accumulators: Accumulators
    new_root: nn.Module | None = None

    def __init__(self, config: Any):
        super().__init__(config)
        self.origins: dict[int, tuple[nn.Module, Any]] = {}
        self.open_blocks: list[Block] = []

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` does, where some argument is a `DeferredTensor`."""
        raise NotImplementedError

    @section.around
    def record(self, function: Callable, args: tuple, kwargs: dict, gradients_exist: bool = False) -> Any:
        """Writes a call on the tape and returns what it returns, its tensors deferred."""
        return self.record_here(function, args, kwargs, gradients_exist)

    def record_here(self, function: Callable, args: tuple, kwargs: dict, gradients_exist: bool = False) -> Any:
        """`record`, for who is in the critical section already."""
        if function in INDEXED and is_refused(function, args, kwargs):
            self.run_eagerly(PassingCaptureError("an index is out of range: torch is to say which", user_line()))
            return function(*self.real(args), **self.real(kwargs))
        given, structure = flatten_call(args, kwargs, _ATOMS)
        if self.tape.second_run is not None:
            first = self.tape.second_run.repeated(function, given, structure)
            if first is not None:
                return self._answer_again(first, given)
        mark = self.mark()
        try:
            entry = self._append(function, given, structure)
            entry.reads_gradients = gradients_exist
            call = entry.call
            assert call is not None
            shape = call.shape
            if shape is None:
                if call.failure is not None:
                    raise call.failure
                shape = call.shape = self._shape_of(entry, gradients_exist)
            if shape.writes:
                self._check_write(entry, shape)
                written = [given[position] for position in shape.writes if type(entry.leaves[position]) is Input]
                if written:  # a value of that moment will not do
                    return self._record_write(function, args, kwargs, written, shape, mark)
        except CaptureError as error:
            self.take_back(mark)
            return self._record_nothing(function, args, kwargs, error)
        except Exception as error:  # the call's own mistake, or one of fake tensors: torch will say which
            self.take_back(mark)
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            return self._record_nothing(function, args, kwargs, CaptureError(reason=reason, where=user_line()))
        if shape.is_nothing and function is not torch.Tensor.requires_grad_ and not (entry.region or gradients_exist):
            self.take_back(mark)  # or the tape would have to keep what its argument comes from
            return self._answer([], shape, given)
        return self._results(entry, shape, given)

    @section.around
    def append(self, function: Callable, args: tuple, kwargs: dict, optimizers: tuple = ()) -> Entry:
        """Writes a call on the tape that returns no tensor."""
        mark = self.mark()
        try:
            return self._append(function, *flatten_call(args, kwargs, _ATOMS), optimizers)
        except CaptureError:
            self.take_back(mark)
            raise

    @section.around
    def record_piece(self, function: Callable, args: tuple, piece: Any, returns: bool = True) -> Any:
        """Like `record`, for an entry about Python that backward runs.

        Args:
            function: What is called.
            args: For it.
            piece: The Python.
            returns: Whether it returns tensors.

        Returns:
            What it returns, its tensors deferred.

        Raises:
            CaptureError: It cannot be recorded; the tape is as it was.
        """
        given, structure = flatten_call(args, {}, _ATOMS)
        if self.tape.second_run is not None:
            first = self.tape.second_run.repeated(function, given, structure)
            if first is not None:
                return self._answer_again(first, given)
        mark = self.mark()
        try:
            entry = self._append(function, given, structure)
            entry.piece = piece
            assert entry.call is not None
            if returns and entry.call.shape is None:
                entry.call.shape = self._shape_of(entry, False)
        except CaptureError:
            self.take_back(mark)
            raise
        except Exception as error:
            self.take_back(mark)
            raise CaptureError(f"{type(error).__name__}: {error}".split("\n")[0], user_line()) from error
        return self._results(entry, entry.call.shape, given) if returns and entry.call.shape is not None else None

    def _append(self, function: Callable, given: list[Any], structure: Any, optimizers: tuple = ()) -> Entry:
        if torch._C._len_torch_dispatch_stack():
            raise CaptureError("a TorchDispatchMode is to see every operator", user_line())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CaptureError("torch.func transforms a call", user_line())
        if forward_ad._current_level >= 0:
            raise CaptureError("gradients are computed in forward mode", user_line())
        tape, modes = self.tape, TorchModes.now()
        leaves: list[Any] = []
        keys: list[tuple] = []
        for leaf in given:
            if type(leaf) is DeferredTensor and not leaf.slot.committed:
                encoded, key = leaf.slot, leaf.slot.key
            elif type(leaf) in _SIMPLE:
                encoded, key = leaf, (type(leaf), leaf)
            else:
                encoded, key = self._encode(leaf, modes.grad)
            leaves.append(encoded)
            keys.append(key)
        region = region_of(self)
        patterns = self.patterns(function, optimizers) if optimizers else ()
        call = self.recording.follow(
            tape.place, CallKey(function, structure, tuple(keys), modes, region, patterns), leaves
        )
        entry = Entry(function, structure, leaves, modes, call, where=call.where, device=self.device, region=region)
        second = tape.second_run
        if tape.is_in_backward or second is not None:
            entry.is_in_backward = True
        if second is not None:
            entry.second = second.region, second.matched
        if call.numbers:
            entry.numbers = numbers_of(call, leaves)
        if optimizers:
            entry.optimizers = optimizers
            if function is not step_ends:
                entry.groups = tuple([dict(group) for group in optimizer.param_groups] for optimizer in optimizers)
        if self.new_root is not None:
            entry.modules, self.new_root = (self.new_root,), None
        tape.entries.append(entry)
        tape.places.append(tape.place)
        tape.place = call
        return entry

    def mark(self) -> Mark:
        """Where the tape is, to be given to `take_back`."""
        tape = self.tape
        return tape.place, tape.input_count, len(tape.read), self.new_root

    def take_back(self, mark: Mark) -> None:
        """Takes the entries behind a mark off the tape, and forgets what they were the first to meet."""
        tape = self.tape
        place, tape.input_count, read, self.new_root = mark
        while tape.place is not place and tape.entries:
            tape.entries.pop()
            tape.place = tape.places.pop()
        # The key of an input that is met again says nothing of its shape.
        tape.inputs = {key: known for key, known in tape.inputs.items() if known[3][1] < tape.input_count}
        del tape.read[read:]

    def _encode(self, leaf: Any, grad: bool) -> tuple[Any, tuple]:
        """What an entry keeps of a leaf that is neither pending nor a simple constant, and what a key has of it."""
        kind = type(leaf)
        if kind is DeferredTensor:
            return self._input(leaf.slot.value, leaf.slot.device)  # computed for good
        if kind is Slot:
            return leaf, leaf.key
        if kind is Input:
            return leaf, ("read", [encoded for _, _, encoded in self.tape.read].index(leaf))
        if isinstance(leaf, torch.Tensor):
            return self._encode_tensor(leaf, grad)
        if isinstance(leaf, float | np.floating):
            return float(leaf), constant_key(float(leaf))  # numpy's too
        if isinstance(leaf, np.integer | np.bool_):
            return leaf, (kind, leaf.item())
        return leaf, self.recording.object_key(leaf)

    def _encode_tensor(self, tensor: torch.Tensor, grad: bool) -> tuple[Any, tuple]:
        """What an entry keeps of a real tensor: state by identity, the value of any other.

        Raises:
            CaptureError: It is a tensor that cannot be recorded.
        """
        if tensor.grad_fn is not None and grad:
            raise PassingCaptureError(
                reason=f"the loop uses a tensor that torch has computed from parameters ({tensor.grad_fn.name()})",
                where=user_line(),
            )
        key = id(tensor)
        is_state = tensor.requires_grad and tensor.grad_fn is None or isinstance(tensor, nn.Parameter)
        if is_state or key in self.tape.state or key in self.buffers:
            if key not in self.tape.grad_flags:
                check_plain(tensor)
                self.tape.grad_flags[key] = tensor, tensor.requires_grad
            return tensor, self.recording.tensor_key(tensor)
        known = self.tape.inputs.get(key) if self.depth else None
        if known is not None and known[0] is tensor and known[1] == version_of(tensor) and still_is(tensor, known[2]):
            return known[2], known[3]
        if not devices.is_reachable(tensor.device) or tensor.layout is not torch.strided:
            check_plain(tensor)
        encoded, input_key = self._input(tensor, tensor.device)
        if grad and not tensor.is_inference():
            owner = tensor if tensor._base is None else tensor._base  # not the view: it would keep others from a swap
            self.tape.read.append((owner, owner._version, encoded))
        encoded.origin = self.origins.get(key)
        if self.depth:
            met = self.tape.input_count
            self.tape.input_count += 1
            self.tape.inputs[key] = tensor, version_of(tensor), encoded, again_key(met)
            input_key = input_key._replace(met=met)
        return encoded, input_key

    def _input(self, tensor: torch.Tensor, device: torch.device) -> tuple[Input, InputKey]:
        shape, strides = tuple(tensor.shape), None if tensor.is_contiguous() else tensor.stride()
        array = input_array(tensor, self.programs.target.is_one_cpu)
        encoded = Input(array, shape, tensor.dtype, device=device, strides=strides)
        return encoded, InputKey(shape, tensor.dtype, device, strides)

    def _shape_of(self, entry: Entry, gradients_exist: bool) -> CallShape:
        call = entry.call
        assert call is not None
        geometries = tuple(
            geometry(leaf) if isinstance(leaf, Slot | Input | torch.Tensor) else key
            for leaf, key in zip(entry.leaves, call.key.leaves, strict=True)
        )
        first: dict[int, int] = {}  # by identity: tensors compare themselves element by element
        for position, leaf in enumerate(entry.leaves):
            first.setdefault(id(leaf), position)
        same = tuple(first[id(leaf)] for leaf in entry.leaves if type(leaf) is Slot)
        key = (call.key._replace(leaves=geometries, region=0, optimizers=()), same, self.device, gradients_exist)
        found = self.recording.shapes.get(key)
        if found is None:
            try:
                with passthrough():
                    found = call_shape(entry, gradients_exist)
            except CaptureError as error:
                call.failure = error
                raise
            self.recording.shapes[key] = found
        return found

    def _results(self, entry: Entry, shape: CallShape, given: list[Any]) -> Any:
        tape = self.tape
        if shape.is_plain and tape.second_run is None:  # as most are
            entry.outputs = [slot] = [Slot(shape.metas[0], entry.device, tape.slot_count, shape.geometries[0])]
            slot.producer = len(tape.entries) - 1
            tape.slot_count += 1
            if shape.has_views:
                slot.memory = memory_of(entry.leaves[shape.views[0]])
            slot.freed = slot.requires_grad and any([type(leaf) is Slot and leaf.freed for leaf in entry.leaves])
            return deferred(slot, self)
        if shape.random:
            entry.seed = devices.drawn_seed(entry.device)
        if shape.writes:
            self._note_writes(entry, shape)
        number, device = tape.slot_count, entry.device
        outputs = [
            Slot(meta, device, number + index, geometry)
            for index, (meta, geometry) in enumerate(zip(shape.metas, shape.geometries, strict=True))
        ]
        if shape.has_views:
            for position, slot in zip(shape.views, outputs, strict=True):
                if position >= 0:
                    slot.memory = memory_of(entry.leaves[position])
        entry.outputs = outputs
        for slot in outputs:
            slot.producer = len(tape.entries) - 1
        tape.slot_count = number + len(outputs)
        for leaf in entry.leaves:
            if type(leaf) is Slot and leaf.freed:
                for slot in outputs:
                    slot.freed = slot.requires_grad
                break
        answer = self._answer(outputs, shape, given)
        if tape.second_run is not None:
            tape.second_run.called()
        return answer

    def _answer_again(self, entry: Entry, given: list[Any]) -> Any:
        """What a call of a checkpointed block returns when its Python runs again: what the first run was given."""
        assert entry.call is not None
        shape = entry.call.shape
        answer = None if shape is None else self._answer(entry.outputs, shape, given)
        self.tape.second_run.called()
        return answer

    def _answer(self, outputs: list[Slot], shape: CallShape, given: list[Any]) -> Any:
        wrappers = [deferred(slot, self) if slot.held is None else slot.held for slot in outputs]
        if shape.is_single:
            return wrappers[0]
        leaves: list[Any] = []
        for leaf in shape.leaves:
            if isinstance(leaf, Output):
                leaves.append(wrappers[leaf.index])
            else:
                leaves.append(given[leaf.position] if isinstance(leaf, Argument) else leaf)
        return unflatten(shape.structure, iter(leaves))

    def _check_write(self, entry: Entry, shape: CallShape) -> None:
        """Has torch raise its error where autograd forbids a write: to a part of a leaf, or to one of several views.

        Raises:
            CaptureError: It does.
        """
        for position in shape.writes if entry.modes.grad else ():
            slot = entry.leaves[position]
            if type(slot) is not Slot or slot.memory is None or not slot.requires_grad:
                continue
            memory, producer = memory_of(slot), self.tape.producer(slot)
            is_of_leaf = isinstance(memory, torch.Tensor) and memory.requires_grad
            if is_of_leaf or (producer is not None and len(self.tape.entries[producer].outputs) > 1):
                raise PassingCaptureError("a view that autograd guards is written to", user_line())

    def _note_writes(self, entry: Entry, shape: CallShape) -> None:
        entry.writes = shape.writes
        self.tape.mutated = True
        for earlier in self.tape.entries:
            for pending in earlier.outputs if earlier is not entry else ():
                pending.value = None  # a look may have computed it, before this write
        for position in shape.writes:
            memory = memory_of(entry.leaves[position])
            if isinstance(memory, torch.Tensor):
                self.tape.written.add(memory.untyped_storage()._cdata)
        for position in shape.gains:
            memory = memory_of(entry.leaves[position])
            if type(memory) is Slot:
                parts = [slot for each in self.tape.entries for slot in each.outputs if slot.memory is memory]
                for slot in (memory, *parts):
                    gain_history(slot)

    def _record_write(self, function, args, kwargs, targets: list, shape: CallShape, mark: Mark) -> Any:
        """A call that writes to tensors which are no state and no results of the tape: `total += loss`."""
        self.take_back(mark)
        for target in targets:
            if isinstance(target, DeferredTensor):  # of an earlier tape: an epoch's sum of losses
                self._become_pending(target)
        real = [target for target in targets if not isinstance(target, DeferredTensor)]
        is_result = any(id(target) not in self.replaced for target in real)
        if is_result and all(is_alone(target) and not target.requires_grad for target in real):
            # What has been written has a history from now on, or is another tensor at every step, as a batch is: it
            # becomes a result of the tape itself.
            for target in real:
                self._become_deferred(target)
        elif is_result and shape.gains:
            error = PassingCaptureError("a tensor with other views is written to in a step", user_line())
            self.run_eagerly(error)
            return function(*self.real(args), **self.real(kwargs))
        else:
            for target in real:
                check_plain(target)
                self.tape.state[id(target)] = target
        return self.record(function, args, kwargs)

    def _become_pending(self, tensor: DeferredTensor) -> None:
        """Makes a result that has been computed for good a result of the tape again, of the same value."""
        is_cut, value = tensor.slot.is_cut, tensor.slot.value
        assert value is not None
        slot = self.record(torch.clone, (value.detach(),), {}).slot
        slot.freed = is_cut  # a backward through it is refused, as torch refuses it
        slot.wrapper = weakref.ref(tensor)
        tensor.slot = slot

    def _become_deferred(self, tensor: torch.Tensor) -> None:
        result = self.record(torch.clone, (tensor.detach(),), {})
        slot = result.slot
        slot.wrapper = None  # a tensor with weak references cannot be swapped
        take_contents(tensor, result)
        slot.wrapper = weakref.ref(tensor)

    @section.around
    def makes_leaves(self, group: dict) -> None:
        """Makes tensors of their own of results that an optimizer is to train: `w.detach().requires_grad_()`."""
        given = flatten(group.get("params"))[0] if isinstance(group, dict) else []
        leaves = [one for one in given if isinstance(one, DeferredTensor) and one.slot in self.tape.new_leaves]
        for leaf in leaves:
            value = self.value(leaf.slot).detach().clone().requires_grad_()
            self.tape.new_leaves.remove(leaf.slot)
            leaf.slot.wrapper = None  # a tensor with weak references cannot be swapped
            take_contents(leaf, value)
        for one in given:
            if isinstance(one, DeferredTensor) and one.slot.committed:
                become_real(one.slot)
        if leaves and not self.has_backward:
            self.commit()

    def _record_nothing(self, function, args, kwargs, error: CaptureError) -> Any:
        kind = kind_of(function)
        is_module = isinstance(function, nn.Module)
        computes = not is_module and kind is not Kind.IN_PLACE and "out" not in kwargs
        if computes and not (torch.is_grad_enabled() and self.needs_gradient(args, kwargs)):
            # No gradient passes it, so it is a look at values: a metric, most likely.
            self.fallbacks.leave_part(error)
            return function(*self.real(args), **self.real(kwargs))
        roots = self.tape.roots
        if (
            self.depth
            and roots
            and any([self.registry.begins_in_torch(self.modules.tensors(m).parameters) for m in roots])
        ):
            self.begin_in_torch()
        else:
            self.run_eagerly(error, function if is_module else None)
        with passthrough() if is_module else contextlib.nullcontext():
            return function(*self.real(args), **self.real(kwargs))

    def differentiates(self, args: Any, kwargs: Any) -> bool:
        """Whether autograd would follow a call with these arguments."""
        return torch.is_grad_enabled() and self.needs_gradient(args, kwargs)

    def needs_gradient(self, args: Any, kwargs: Any) -> bool:
        for leaf in flatten((args, kwargs))[0]:
            if isinstance(leaf, DeferredTensor):
                if leaf.slot.requires_grad and not leaf.slot.freed:
                    return True
            elif isinstance(leaf, torch.Tensor) and leaf.requires_grad and self.depth:
                return True
        return False

    def real(self, value: Any) -> Any:
        """`value` with real tensors in place of deferred ones."""
        if type(value) is DeferredTensor:
            return self.value(value.slot)
        if not value and type(value) in (tuple, dict):  # the arguments of most looks: `loss.item()`
            return value
        return map_leaves(lambda leaf: self.value(leaf.slot) if isinstance(leaf, DeferredTensor) else leaf, value)
