"""What a module's compiled forward depends on besides tensors: its fingerprint, and when to take it again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trainingcompiler.frameworks.pytorch.replaying import undeferred

_INTERNAL = frozenset(
    "_parameters _buffers _modules _non_persistent_buffers_set _backward_pre_hooks _backward_hooks "
    "_is_full_backward_hook _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks "
    "_forward_pre_hooks_with_kwargs _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks "
    "_load_state_dict_post_hooks".split()
)
_STEADY = 2  # as many values of one float attribute are compiled as constants
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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
        self._taken: dict[int, tuple[nn.Module, tuple, _Fingerprint]] = {}
        self._known: dict[_Fingerprint, _Fingerprint] = {}
        self._values: dict[tuple[int, str], set[float]] = {}

    def start(self) -> None:
        """Begins to notice changes; fingerprints taken before are not to be trusted."""
        self._taken.clear()
        _changes.watch()

    def stop(self) -> None:
        """Leaves `nn.Module` as it was, unless others watch too."""
        _changes.unwatch()

    def fingerprint(self, module: nn.Module) -> "_Fingerprint":
        """The module's fingerprint as of now."""
        moment = (_changes.count, RemovableHandle.next_id)
        taken = self._taken.get(id(module))
        if taken is None or taken[0] is not module or taken[1] != moment or not taken[2].holds():
            fingerprint = _Fingerprint(module)
            fingerprint.unsteady = self._unsteady(fingerprint)
            # Equal ones are one object, so that comparing signatures does not compare attributes.
            fingerprint = self._known.setdefault(fingerprint, fingerprint)
            taken = self._taken[id(module)] = (module, moment, fingerprint)
        return taken[2]

    def _unsteady(self, fingerprint: "_Fingerprint") -> str | None:
        for (part, attribute), value in fingerprint.numbers.items():
            values = self._values.setdefault((id(part), attribute), set())
            values.add(value)
            if len(values) > _STEADY:
                return f"{type(part).__name__}.{attribute}"
        return None


class _Fingerprint:
    """Everything but tensors' values that decides what a module's forward computes.

    Attributes:
        key: Hashable; equal keys compute the same function of equal tensors.
        hooked: The name of a submodule with hooks, which compiled code cannot run.
        unsteady: An attribute that has been a different number too often to compile each value.
        numbers: The float attributes of submodules.
        parameters: The module's parameters.
    """

    def __init__(self, module: nn.Module):
        self.parameters = list(module.parameters())
        self._frozen = tuple(parameter.requires_grad for parameter in self.parameters)
        self._mutable: list[tuple[Any, Any]] = []
        self.hooked: str | None = None
        self.unsteady: str | None = None
        self.numbers: dict[tuple[nn.Module, str], float] = {}
        parts: list[Any] = [self._frozen, tuple(map(id, self.parameters)), tuple(map(id, module.buffers()))]
        for name, part in module.named_modules():
            if self.hooked is None and any(getattr(part, hooks) for hooks in _HOOKS):
                self.hooked = name or type(part).__name__
            for attribute, value in attributes_of(part).items():
                if type(value) in (list, dict, set):
                    self._mutable.append((value, _frozen(value)))
                if type(value) is float:
                    self.numbers[part, attribute] = value
                parts.append((id(part), attribute, _frozen(value)))
        self.key = (self.hooked, *parts)
        self.hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fingerprint) and (self is other or self.key == other.key)

    def __hash__(self) -> int:
        return self.hash

    def holds(self) -> bool:
        """Whether what can change unseen is as it was."""
        return self._frozen == tuple(parameter.requires_grad for parameter in self.parameters) and all(
            _frozen(value) == old for value, old in self._mutable
        )


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without those that torch keeps for itself."""
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def _frozen(value: Any, depth: int = 0) -> Any:
    if isinstance(value, bool | int | float | str | bytes | complex | type(None) | torch.dtype | torch.device):
        return type(value), value
    if depth < 3 and isinstance(value, list | tuple):
        return type(value), tuple(_frozen(item, depth + 1) for item in value)
    if depth < 3 and isinstance(value, dict):
        return type(value), tuple((_frozen(key), _frozen(item, depth + 1)) for key, item in value.items())
    if depth < 3 and isinstance(value, set | frozenset):
        return type(value), frozenset(_frozen(item, depth + 1) for item in value)
    return id(value)
