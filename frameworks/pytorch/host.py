"""What a forward reads of Python itself: attributes of modules and of their configurations, globals, closed-over names.

None of it passes through torch, so no mode sees it being read. Attributes are found by looking at the modules, names by
looking at the code of `forward` and of whatever functions of the user's it calls.
"""

import functools
import os
import sysconfig
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

_INTERNAL = frozenset(
    "_parameters _buffers _modules _non_persistent_buffers_set _backward_pre_hooks _backward_hooks "
    "_is_full_backward_hook _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks "
    "_forward_pre_hooks_with_kwargs _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks "
    "_load_state_dict_post_hooks".split()
)
_DYNAMIC = frozenset({"getattr", "__dict__", "vars", "__getattribute__"})
_PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, dict, set)
_DEPTH = 3  # of nested containers and configurations
_LARGEST = 256  # items of a container that are compared at every step; of a larger one, only which it is
_LIBRARIES = tuple(
    os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is kept: a namespace (`vars` of a module or object, `globals()`), a class, or a closure's cell.

    Attributes:
        owner: The namespace, the class, or the cell.
        name: In it.
        label: What a person calls it, `"Model.alpha"`.
    """

    owner: Any
    name: str
    label: str

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the place."""
        return id(self.owner), self.name

    def get(self) -> Any:
        """The value; None where there is none."""
        if isinstance(self.owner, CellType):
            try:
                return self.owner.cell_contents
            except ValueError:  # not bound yet
                return None
        return (vars(self.owner) if isinstance(self.owner, type) else self.owner).get(self.name)

    def set(self, value: Any) -> None:
        """Puts a value there."""
        if isinstance(self.owner, CellType):
            self.owner.cell_contents = value
        elif isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            self.owner[self.name] = value


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without those that torch keeps for itself."""
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def places_of(root: nn.Module) -> list[Place]:
    """Every place that the forwards under `root` may read, each once.

    An attribute whose name no code of the modules mentions is left out: a counter for the loop's own use is none of
    the forward's business. So is a list that only the user's `__init__` mentions, as agents keep for an episode.
    """
    kinds = list({type(module): None for module in root.modules()})
    reads = [_reads(kind) for kind in kinds]
    names = frozenset().union(*(read.names for read in reads))
    made = frozenset().union(*(read.made for read in reads))
    any_name = any(read.any_name for read in reads)
    found: dict[tuple, Place] = {}
    objects: set[int] = set()

    def may_be_read(name: str, value: Any, names: frozenset[str], made: frozenset[str]) -> bool:
        return name in names or (name in made and not is_mutable(value))

    def add(place: Place, depth: int = 0) -> None:
        value = place.get()
        if not is_object(value):
            found[place.key] = place
        elif depth < _DEPTH and id(value) not in objects:
            objects.add(id(value))
            own = _reads(type(value))
            for name, inner in vars(value).items():
                if may_be_read(name, inner, names | own.names, made | own.made):
                    add(Place(vars(value), name, f"{place.label}.{name}"), depth + 1)
        if _plain_function(value) is not None:  # an activation given as a function, with what it reads in turn
            for inner in _reads(value).places:
                found[inner.key] = inner

    for module in root.modules():
        for name, value in attributes_of(module).items():
            if any_name or may_be_read(name, value, names, made):
                add(Place(module.__dict__, name, f"{type(module).__name__}.{name}"))
    for kind, read in zip(kinds, reads, strict=True):
        for place in read.places:
            add(place)
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            for name in names.intersection(vars(owner)):
                if not callable(vars(owner)[name]) and _plain_function(vars(owner)[name]) is None:
                    add(Place(owner, name, f"{owner.__name__}.{name}"))
    return list(found.values())


def is_object(value: Any) -> bool:
    """Whether a value is kept apart by its attributes: a configuration, a namespace, a dataclass."""
    if isinstance(value, (*_PLAIN, tuple, *_CONTAINERS, torch.Tensor, nn.Module, torch.optim.Optimizer, ModuleType)):
        return False
    return hasattr(value, "__dict__") and not callable(value) and len(vars(value)) <= _LARGEST


def frozen(value: Any, depth: int = 0) -> Any:
    """A hashable image of a plain value; equal images mean equal values, as far as forward can tell."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if depth < _DEPTH and isinstance(value, (tuple, *_CONTAINERS)) and len(value) <= _LARGEST:
        if isinstance(value, dict):
            return type(value), tuple((frozen(key), frozen(item, depth + 1)) for key, item in value.items())
        items = (frozen(item, depth + 1) for item in value)
        return type(value), frozenset(items) if isinstance(value, set) else tuple(items)
    if isinstance(value, np.ndarray) and value.size <= _LARGEST and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    return id(value)


def is_mutable(value: Any) -> bool:
    """Whether a value can change without being assigned."""
    return isinstance(value, (*_CONTAINERS, np.ndarray)) or (isinstance(value, tuple) and any(map(is_mutable, value)))


@dataclass(frozen=True, slots=True)
class _Reads:
    """What the code of a class mentions.

    Attributes:
        names: Every name in it.
        made: Names that only a constructor of the user's mentions, outside of the functions that it defines.
        any_name: Whether it asks for attributes by names that it computes.
        places: Globals and closed-over names that are no functions, modules or classes.
    """

    names: frozenset[str]
    made: frozenset[str]
    any_name: bool
    places: tuple[Place, ...]


def _reads(item: Any) -> _Reads:
    """What a function or the methods of a class mention, with the user's functions that they call."""
    return _reads_once(item)


@functools.cache
def _reads_once(item: Any) -> _Reads:
    names: set[str] = set()
    made: set[str] = set()
    places: dict[tuple, Place] = {}
    any_name = False
    parents = item.__mro__ if isinstance(item, type) else ()
    pending = [value for parent in parents if parent not in (nn.Module, object) for value in vars(parent).values()]
    pending = pending or [item]
    seen: set[CodeType] = set()
    while pending:
        function = _plain_function(pending.pop())
        if function is None or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        mentioned = _names(function.__code__)
        if parents and function.__name__ == "__init__" and not _is_library(function.__code__.co_filename):
            made.update(function.__code__.co_names)
            names.update(_inner_names(function.__code__))
        else:
            names.update(mentioned)
        if _is_library(function.__code__.co_filename):
            continue
        any_name |= not _DYNAMIC.isdisjoint(mentioned)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        near = [Place(cell, name, name) for name, cell in cells]
        near += [Place(function.__globals__, name, name) for name in mentioned if name in function.__globals__]
        for place in near:
            value = place.get()
            if isinstance(value, ModuleType) and not _is_library(getattr(value, "__file__", None)):
                near += [Place(vars(value), name, f"{place.label}.{name}") for name in mentioned if name in vars(value)]
            elif isinstance(value, type):
                near += [Place(value, name, f"{place.label}.{name}") for name in mentioned if name in vars(value)]
            elif callable(value):
                pending.append(value)
            elif not isinstance(value, ModuleType):
                places[place.key] = place
    return _Reads(frozenset(names), frozenset(made - names), any_name, tuple(places.values()))


def _plain_function(value: Any) -> FunctionType | None:
    while isinstance(value, functools.partial | MethodType | staticmethod | classmethod | property):
        names = ("fget", "__func__", "func")
        value = next((getattr(value, name) for name in names if getattr(value, name, None) is not None), None)
    value = getattr(value, "__wrapped__", value)
    return value if isinstance(value, FunctionType) else None


def _names(code: CodeType) -> list[str]:
    """The names in a function's code, and in that of the functions it defines."""
    return [*code.co_names, *_inner_names(code)]


def _inner_names(code: CodeType) -> list[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [name for nested in inner for name in _names(nested)]


@functools.cache
def _is_library(path: str | None) -> bool:
    return path is None or (not path.startswith("<") and os.path.realpath(path).startswith(_LIBRARIES))
