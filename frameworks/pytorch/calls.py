"""Turns a call that the loop makes into an entry of the tape."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch import devices
from trainingcompiler.frameworks.pytorch.capture import NumberSource
from trainingcompiler.frameworks.pytorch.deferred import DeferredTensor
from trainingcompiler.frameworks.pytorch.modules import Fingerprint, ModuleWatch
from trainingcompiler.frameworks.pytorch.recorder import user_line
from trainingcompiler.frameworks.pytorch.state import input_array
from trainingcompiler.frameworks.pytorch.structure import flatten
from trainingcompiler.frameworks.pytorch.tape import Ambient, Entry, Input, Slot


class CallBook:
    """Makes entries, and remembers which of their numbers change from step to step.

    Attributes:
        modules: Watches the modules that are called.
        device: Where the tensors of the last module that has any are.
    """

    def __init__(self):
        self.device = devices.CPU
        self.modules = ModuleWatch()
        self._numbers: dict[tuple, _Numbers] = {}

    def entry(
        self, function: Callable, args: tuple, kwargs: dict, optimizers: tuple = (), before: Sequence[Entry] = ()
    ) -> Entry:
        """An entry for `function(*args, **kwargs)`.

        Args:
            function: A module, a torch function, or `Optimizer.step`.
            args: Positional arguments; deferred tensors become their slots, other tensors are snapshots, unless they
                are state.
            kwargs: Keyword arguments, likewise.
            optimizers: The optimizers that the call steps.
            before: The entries before it: `0.9 * x + 0.1 * y` is two calls with a number of their own each.

        Raises:
            CaptureError: The call cannot be replayed.
        """
        leaves, structure = flatten((args, kwargs))
        ambient = Ambient.now()
        encoded = [encode(leaf) for leaf in leaves]
        function_key: Any = function
        where = user_line()
        prints: tuple[Fingerprint, ...] = ()
        if isinstance(function, nn.Module):
            fingerprint = self.modules.fingerprint(function)
            prints = (fingerprint,)
            if fingerprint.hooked:
                raise CaptureError(reason=f"module {fingerprint.hooked} has a hook", where=where)
            if fingerprint.unsteady:
                reason = f"{fingerprint.unsteady} is another number at every step, and the forward decides by its value"
                raise CaptureError(reason=reason, where=where)
            function_key = (id(function), fingerprint)
            self.device = devices.of(fingerprint.parameters) or self.device
        kinds = tuple(_kind(leaf) for leaf in encoded)
        numbers: tuple[int, ...] = ()
        turn = 0
        if float in kinds:
            turn = sum(other.key[:2] == (function_key, structure) for other in before)
            history = self._numbers.setdefault((function_key, structure, ambient, kinds, turn), _Numbers())
            numbers = history.changing(encoded)
        constants = tuple(
            ("number", leaf > 0) if place in numbers else (kind, leaf) if kind is float else kind
            for place, (kind, leaf) in enumerate(zip(kinds, encoded, strict=True))
        )
        key = (function_key, structure, constants, ambient)
        modules: tuple[nn.Module, ...] = ()
        if isinstance(function, nn.Module):
            modules = (function,)
        return Entry(
            function,
            structure,
            encoded,
            ambient,
            key,
            numbers=numbers,
            where=where,
            optimizers=optimizers,
            modules=modules,
            prints=prints,
            turn=turn,
            device=self.device,
        )

    def fix_number(self, entry: Entry, source: NumberSource) -> None:
        """Makes a number a constant of the entry, and of every later one like it."""
        if source.host is not None:
            self.modules.fix_number(source.host)
            entry.prints = tuple(fingerprint.with_constant(source.host) for fingerprint in entry.prints)
            entry.key = ((entry.key[0][0], *entry.prints), *entry.key[1:])
            return
        position = source.position
        kinds = tuple(map(_kind, entry.leaves))
        self._numbers[(entry.key[0], entry.structure, entry.ambient, kinds, entry.turn)].fixed.add(position)
        entry.numbers = tuple(place for place in entry.numbers if place != position)
        constants = list(entry.key[2])
        constants[position] = (float, entry.leaves[position])
        entry.key = (*entry.key[:2], tuple(constants), entry.key[3])


def encode(leaf: Any) -> Any:
    """What an entry keeps of an argument.

    Raises:
        CaptureError: It is a tensor that cannot be replayed.
    """
    if isinstance(leaf, DeferredTensor):
        return slot_input(leaf.slot) if leaf.slot.committed else leaf.slot
    if isinstance(leaf, float | np.floating):
        return float(leaf)  # numpy's too
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.grad_fn is not None:
        raise PassingCaptureError(
            reason=f"the loop uses a tensor that torch has computed from parameters ({leaf.grad_fn.name()})",
            where=user_line(),
        )
    if leaf.requires_grad or isinstance(leaf, nn.Parameter):
        return leaf  # state: by identity
    if not devices.is_reachable(leaf.device) or leaf.layout is not torch.strided or type(leaf) is not torch.Tensor:
        layout = "" if leaf.layout is torch.strided else f" with the layout {leaf.layout}"
        cure = devices.cure(leaf.device)
        reason = f"a {type(leaf).__name__} on {leaf.device}{layout} is passed to the model{cure}"
        raise CaptureError(reason=reason, where=user_line())
    return Input(input_array(leaf), tuple(leaf.shape), leaf.dtype, device=leaf.device)


def slot_input(slot: Slot) -> Input:
    """A slot whose entries have left the tape, as the value it is."""
    assert slot.value is not None
    return Input(input_array(slot.value), tuple(slot.value.shape), slot.value.dtype, device=slot.device)


def detached(entry: Entry) -> None:
    """Makes an entry that stays on the tape independent of entries that have left it."""
    entry.leaves = [slot_input(leaf) if isinstance(leaf, Slot) and leaf.committed else leaf for leaf in entry.leaves]
    constants = tuple(
        _kind(leaf) if isinstance(leaf, Input) else constant
        for constant, leaf in zip(entry.key[2], entry.leaves, strict=True)
    )
    entry.key = (*entry.key[:2], constants, entry.key[3])


class _Numbers:
    """The numbers that one kind of call has been given."""

    def __init__(self):
        self.last: dict[int, float] = {}
        self.seen_changing: set[int] = set()
        self.fixed: set[int] = set()

    def changing(self, leaves: list[Any]) -> tuple[int, ...]:
        """Positions of the floats that are known to change; what they are now is remembered."""
        for place, leaf in enumerate(leaves):
            if type(leaf) is float:
                if self.last.setdefault(place, leaf) != leaf:
                    self.seen_changing.add(place)
                self.last[place] = leaf
        return tuple(place for place in sorted(self.seen_changing - self.fixed) if leaves[place] != 0.0)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Slot):
        return "slot"
    if isinstance(leaf, Input):
        return leaf.shape, leaf.dtype
    if isinstance(leaf, torch.Tensor | nn.Module | torch.optim.Optimizer):
        return id(leaf)
    if type(leaf) is float:
        return float
    try:
        hash(leaf)
    except TypeError:
        raise CaptureError(reason=f"a {type(leaf).__name__} is passed to the model", where=user_line()) from None
    return type(leaf), leaf
