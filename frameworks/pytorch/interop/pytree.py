"""Takes nested arguments and results apart into leaves and a hashable description, and puts them together again.

torch's pytree knows registered containers only. Models return dataclasses, `ModelOutput`s and caches that hold tensors
several objects deep, so any object that is not a value in itself is taken apart by its attributes.
"""

import copy
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_VALUES = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type(Ellipsis),
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Generator,
    torch.nn.Module,
    torch.optim.Optimizer,
    np.ndarray,
    np.generic,
    range,
    enum.Enum,
    type,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    ModuleType,
)


@dataclass(frozen=True, slots=True)
class TreeDef:
    """The shape of a nested value: a container's type, its keys, and the structures of its items.

    `kind` is None for a leaf.
    """

    kind: Any = None
    keys: tuple = ()
    children: tuple["TreeDef", ...] = ()
    template: Any = None  # an object of the kind, emptied, to rebuild from; compares equal always

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, TreeDef)
            and self.kind is other.kind
            and self.keys == other.keys
            and self.children == other.children
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.keys, self.children))


_LEAF = TreeDef()
_ATOMS: frozenset[type] = frozenset(
    {int, float, bool, str, type(None), torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device}
)
_SEQUENCES = frozenset({tuple, list, torch.Size})
_flat: dict[tuple, TreeDef] = {}


def flatten(value: Any) -> tuple[list[Any], TreeDef]:
    """Takes `value` apart.

    Args:
        value: Anything; containers and plain objects are entered, tensors and values are leaves.

    Returns:
        The leaves in order, and the structure, which compares equal for values of the same build.
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves)


def flatten_call(args: tuple, kwargs: dict, atoms: frozenset[type] = _ATOMS) -> tuple[list[Any], TreeDef]:
    """`flatten((args, kwargs))`, quicker where arguments are values, or tuples and lists of values: most calls are."""
    leaves: list[Any] = []
    shapes: list[Any] = []
    for argument in (*args, *kwargs.values()) if kwargs else args:
        kind = type(argument)
        if kind in atoms:
            leaves.append(argument)
            shapes.append(None)
        elif kind in _SEQUENCES and all([type(item) in atoms for item in argument]):
            leaves += argument
            shapes.append((kind, len(argument)))
        elif isinstance(argument, _VALUES):
            leaves.append(argument)
            shapes.append(None)
        else:
            return flatten((args, kwargs))
    key = (tuple(shapes), tuple(kwargs))
    structure = _flat.get(key)
    if structure is None:
        structure = _flat[key] = flatten((args, kwargs))[1]
    return leaves, structure


def unflatten(structure: TreeDef, leaves: Iterator[Any]) -> Any:
    """Puts a value together from its structure and its leaves, consuming as many leaves as the structure has."""
    if structure.kind is None:
        return next(leaves)
    items = [unflatten(child, leaves) for child in structure.children]
    kind = structure.kind
    if kind in (tuple, list, set, torch.Size):
        return kind(items)
    if kind is slice:
        return slice(*items)
    if kind is dict:
        return dict(zip(structure.keys, items, strict=True))
    if issubclass(kind, tuple):  # a named tuple is made of its items; others, `torch.return_types.topk`, of a sequence
        return kind._make(items) if hasattr(kind, "_make") else kind(items)
    rebuilt = copy.copy(structure.template)
    if isinstance(rebuilt, dict):
        for key, item in zip(structure.keys, items, strict=True):
            rebuilt[key] = item
        return rebuilt
    if isinstance(rebuilt, list):
        rebuilt[:] = items
        return rebuilt
    rebuilt.__dict__.update(zip(structure.keys, items, strict=True))
    return rebuilt


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` applied to each leaf."""
    leaves, structure = flatten(value)
    return unflatten(structure, iter([function(leaf) for leaf in leaves]))


def _flatten(value: Any, leaves: list[Any]) -> TreeDef:
    kind = type(value)
    if isinstance(value, _VALUES):
        leaves.append(value)
        return _LEAF
    if kind is tuple or kind is list or isinstance(value, tuple | list):
        return TreeDef(kind, (), tuple(_flatten(item, leaves) for item in value), _template(value))
    if isinstance(value, dict):
        return TreeDef(kind, tuple(value), tuple(_flatten(item, leaves) for item in value.values()), _template(value))
    if kind is slice:
        return TreeDef(kind, (), tuple(_flatten(item, leaves) for item in (value.start, value.stop, value.step)))
    if hasattr(value, "__dict__"):
        attributes = value.__dict__
        children = tuple(_flatten(item, leaves) for item in attributes.values())
        return TreeDef(kind, tuple(attributes), children, _template(value))
    leaves.append(value)
    return _LEAF


def _template(value: Any) -> Any:
    """What `unflatten` copies. It holds none of the leaves: structures live on as keys, and a result that something
    holds counts as one that the loop still needs."""
    if type(value) in (tuple, list, dict) or isinstance(value, tuple):
        return None
    template = copy.copy(value)
    if isinstance(template, dict):
        for key in template:
            template[key] = None
    elif isinstance(template, list):
        template.clear()
    else:
        template.__dict__.update(dict.fromkeys(template.__dict__))
    return template
