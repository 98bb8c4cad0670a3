"""What a module's compiled forward depends on besides tensors: its fingerprint, and when to take it again."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.frameworks.pytorch.host import Place, frozen, is_mutable, places_of
from trainingcompiler.frameworks.pytorch.replaying import undeferred

_STEADY = 2  # as many values of a number that cannot be an input are compiled as constants
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks that only compute, so that capture may run them: input embeddings are made to require gradients, for
# checkpointing and for adapters on frozen weights; hidden states are collected for the result of the same call.
_PURE_HOOKS = frozenset({"make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook"})
_PURE_SOURCES = ("transformers.", "peft.")
_APPLY = nn.Module._apply
_CHANGES = ("__setattr__", "__delattr__", "_apply", "register_buffer", "register_parameter", "add_module")


class _Changes:
    """Counts the changes that anyone makes to any module, while somebody watches."""

    def __init__(self):
        self.count = 0
        self._watchers = 0
        self._originals: dict[str, Any] = {}

    def watch(self) -> None:
        self._watchers += 1
        if self._watchers == 1:
            for name in _CHANGES:
                self._originals[name] = getattr(nn.Module, name)
                setattr(nn.Module, name, self._counting(self._originals[name]))

    def unwatch(self) -> None:
        self._watchers -= 1
        if self._watchers == 0:
            for name, original in self._originals.items():
                setattr(nn.Module, name, original)

    def _counting(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def changed(module, *args, **kwargs):
            self.count += 1
            if original is not _APPLY:
                return original(module, *args, **kwargs)
            with undeferred():  # it moves gradients, if there are any, and asks for each
                return original(module, *args, **kwargs)

        return changed


_changes = _Changes()


class ModuleWatch:
    """Takes the fingerprints of modules, anew only when somebody has changed a module."""

    def __init__(self):
        self._taken: dict[int, tuple[nn.Module, tuple, Fingerprint]] = {}
        self._known: dict[Fingerprint, Fingerprint] = {}
        self._numbers: dict[tuple, _Number] = {}

    def start(self) -> None:
        """Begins to notice changes; fingerprints taken before are not to be trusted."""
        self._taken.clear()
        _changes.watch()

    def stop(self) -> None:
        """Leaves `nn.Module` as it was, unless others watch too."""
        _changes.unwatch()

    def fingerprint(self, module: nn.Module) -> "Fingerprint":
        """The module's fingerprint as of now."""
        moment = (_changes.count, RemovableHandle.next_id)
        taken = self._taken.get(id(module))
        if taken is None or taken[0] is not module or taken[1] != moment or not taken[2].holds():
            fingerprint = Fingerprint(module)
            self._changing(fingerprint)
            if not fingerprint.inputs:
                # Equal ones are one object, so that comparing signatures does not compare attributes.
                fingerprint = self._known.setdefault(fingerprint, fingerprint)
            taken = self._taken[id(module)] = (module, moment, fingerprint)
        return taken[2]

    def fix_number(self, place: Place) -> None:
        """Makes a number that changes a constant of programs, because the forward decides by its value."""
        self._numbers[place.key].fixed = True

    def _changing(self, fingerprint: "Fingerprint") -> None:
        """Finds the numbers that have changed, and takes them out of the key: they are inputs of the program."""
        for place, value in fingerprint.values:
            if type(value) is float:
                number = self._numbers.setdefault(place.key, _Number())
                if len(number.values) <= _STEADY:  # more need not be remembered of a run of a million steps
                    number.values.add(value)
                if len(number.values) == 1:
                    continue
                if not number.fixed:
                    fingerprint.make_input(place, value)
                elif len(number.values) > _STEADY:
                    fingerprint.unsteady = place.label


class _Number:
    """A float that a forward reads."""

    def __init__(self):
        self.values: set[float] = set()
        self.fixed = False  # the forward decides by its value


class Fingerprint:
    """Everything but tensors' values that decides what a module's forward computes.

    Attributes:
        key: Hashable; equal keys compute the same function of equal tensors and `inputs`.
        hooked: The name of a submodule with hooks, which compiled code cannot run.
        unsteady: A number that has been another one too often to compile each value.
        values: Numbers, texts and containers of them that the forward may read, and where.
        inputs: The places of numbers that change, and what they are now.
        parameters: The module's parameters.
        tensors: The identities of its parameters and buffers.
    """

    def __init__(self, module: nn.Module):
        self.parameters = list(module.parameters())
        self._frozen = tuple(parameter.requires_grad for parameter in self.parameters)
        self.unsteady: str | None = None
        self.inputs: list[tuple[Place, float]] = []
        self.values: list[tuple[Place, Any]] = []
        self._images: dict[tuple, Any] = {}
        self._objects: list[tuple[Place, int]] = []  # known by identity only
        self._unseen: list[tuple[Place, Any, Any]] = []
        spaces = {id(part.__dict__) for part in module.modules()}
        for place in places_of(module):
            value = place.get()
            image = self._images[place.key] = frozen(value)
            if type(image) is int:
                self._objects.append((place, image))
            else:
                self.values.append((place, value))
            # Assignments to attributes of modules are noticed; everything else has to be looked at.
            if id(place.owner) not in spaces or is_mutable(value):
                self._unseen.append((place, value if type(image) is not int else None, image))
        self.hooked = next((n or type(m).__name__ for n, m in module.named_modules() if _has_opaque_hooks(m)), None)
        self._hooks = tuple((id(part), len(hooks)) for part in module.modules() if (hooks := module_hooks(part)))
        kinds = tuple((id(part), part.training) for part in module.modules())
        identities = (*map(id, self.parameters), *map(id, module.buffers()))
        self.tensors = frozenset(identities)
        self._tensors = (kinds, self._frozen, identities)
        self._seal()

    def make_input(self, place: Place, value: float) -> None:
        """Takes a number out of the key, but for its sign: a forward may ask whether it is zero."""
        self._images[place.key] = "number", value > 0
        if value != 0.0:
            self.inputs.append((place, value))
        self._seal()

    def _seal(self) -> None:
        self.key = (self.hooked, self._hooks, self._tensors, tuple(self._images.items()))
        self.hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and (self is other or self.key == other.key)

    def __hash__(self) -> int:
        return self.hash

    def holds(self) -> bool:
        """Whether what can change unseen is as it was."""
        if self._frozen != tuple(parameter.requires_grad for parameter in self.parameters):
            return False
        for place, value, image in self._unseen:
            now = place.get()
            if (now is not value or value is None or is_mutable(now)) and frozen(now) != image:
                return False
        return True

    def with_constant(self, fixed: Place) -> "Fingerprint":
        """A copy in which a number is part of the key again."""
        copied = copy.copy(self)
        copied.inputs = [(place, value) for place, value in self.inputs if place.key != fixed.key]
        value = next(value for place, value in self.values if place.key == fixed.key)
        copied._images = {**self._images, fixed.key: frozen(value)}
        copied._seal()
        return copied

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Puts back what the loop has changed since the call, as long as the call is replayed.

        Raises:
            TrainingCompilerError: What the call saw is not known any more.
        """
        lost = [place for place, identity in self._objects if id(place.get()) != identity]
        lost += [p for p, old, image in self._unseen if is_mutable(old) and p.get() is old and frozen(old) != image]
        if lost:
            raise TrainingCompilerError(
                f"{lost[0].label} was changed between a call of the model and its backward(), so that the call cannot "
                "be computed any more as it was made. Change it before the call, or after optimizer.step()."
            )
        changed = [(place, value, now) for place, value in self.values if not _same(now := place.get(), value)]
        try:
            for place, value, _ in changed:
                place.set(value)
            yield
        finally:
            for place, _, now in changed:
                place.set(now)


def _same(one: Any, other: Any) -> bool:
    return one is other or (not is_mutable(one) and frozen(one) == frozen(other))


def module_hooks(module: nn.Module) -> list[Callable]:
    """The hooks of a module itself, of every kind."""
    return [hook for hooks in _HOOKS for hook in getattr(module, hooks).values()]


def _has_opaque_hooks(module: nn.Module) -> bool:
    return any(
        getattr(hook, "__name__", "") not in _PURE_HOOKS or not hook.__module__.startswith(_PURE_SOURCES)
        for hook in module_hooks(module)
    )
