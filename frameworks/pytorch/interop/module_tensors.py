"""The tensors of modules, looked up again only when a module is not what it was."""

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ModuleTensors(NamedTuple):
    """The parameters and buffers of a module and its children.

    Attributes:
        parameters: In the order of `module.parameters()`.
        buffers: In the order of `module.buffers()`.
        replaced: The buffers, by identity, that have taken the place of others: there may be new ones at every step.
        seen: The dicts that hold them and the children, each with what was in it.
    """

    parameters: list[nn.Parameter]
    buffers: list[torch.Tensor]
    replaced: set[int]
    seen: list[tuple[dict, tuple]]

    def hold(self) -> bool:
        """Whether every module still has the tensors and children that it had, however one would have changed them."""
        for where, values in self.seen:
            if len(where) != len(values) or not all(map(operator.is_, where.values(), values)):
                return False
        return True


_NOTHING: Any = (lambda: None), None


class ModuleIndex:
    """The tensors of each module that is called.

    Only which calls are recorded, and which tensors are known by identity, depends on it.
    """

    def __init__(self):
        # By identity: a module may compare itself as it likes. Asked at every call, so a plain dict.
        self._known: dict[int, tuple[weakref.ref, ModuleTensors]] = {}

    def tensors(self, module: nn.Module) -> ModuleTensors:
        """The module's tensors."""
        reference, known = self._known.get(id(module), _NOTHING)
        if reference() is not module:
            known = None
            reference = weakref.ref(module, functools.partial(self._forget, id(module)))
        if known is None or not known.hold():
            seen = [
                (where, tuple(where.values()))
                for part in module.modules()
                for where in (part._parameters, part._buffers, part._modules)
            ]
            buffers = list(module.buffers())
            before = {id(buffer) for buffer in known.buffers} if known is not None else None
            replaced = set() if before is None else {id(buffer) for buffer in buffers} - before | known.replaced
            known = ModuleTensors(list(module.parameters()), buffers, replaced, seen)
            self._known[id(module)] = reference, known
        return known

    def known(self, module: nn.Module) -> ModuleTensors:
        """What `tensors` has found a moment ago, without another look at the module."""
        return self._known[id(module)][1]

    def _forget(self, key: int, reference: weakref.ref) -> None:
        if self._known.get(key, _NOTHING)[0] is reference:
            del self._known[key]


def module_hooks(module: nn.Module) -> list[Callable]:
    """The hooks of a module itself, of every kind."""
    return [hook for hooks in _HOOKS for hook in getattr(module, hooks).values()]
