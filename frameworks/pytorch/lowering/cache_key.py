"""The digest of a captured graph: equal graphs, equal digests, in every process.

It is the entry `graph` of an executable's cache key, whose other entries are in `cache.executables.key_text`.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trainingcompiler.cache.executables import digest_of_code
from trainingcompiler.frameworks.pytorch.graph.ir import Graph, Node, Ref
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS, RANDOM_LOWERINGS

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)
_KNOWN_CODE = ("trainingcompiler", "jax", "builtins", "functools", "operator", "_operator")


class _Unknown(Exception):
    """An argument whose text does not tell its value."""


def graph_cache_key(graph: Graph, results: list[int], roles: Iterable[Any]) -> str | None:
    """A digest of everything that decides what a program of the graph computes, but for shapes of its inputs.

    Args:
        graph: The captured step.
        results: Numbers of the values to compute.
        roles: What else decides: which values are state and which inputs, and the like.

    Returns:
        The digest; None where an operator has an argument of a kind that is not known to have a text of its own, or
        a lowering that is not ours.
    """
    nodes = graph.live_nodes(results)
    try:
        _check_lowerings(nodes)
        parts = [digest_of_code(Path(__file__).parents[1]), _text(list(roles)), _text(results)]
        parts += map(_node, nodes)
        for value, constant in graph.constants.items():
            array = numpy_view(constant.contiguous())
            parts.append(f"{value} {array.dtype} {array.shape} {array.tobytes().hex()}")
    except _Unknown:
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_lowerings(nodes: list[Node]) -> None:
    """A lowering that somebody has put into the table is not part of the code that the digest holds."""
    for operator in {node.operator for node in nodes}:
        function = LOWERINGS.get(operator) or RANDOM_LOWERINGS.get(operator)
        origin = getattr(function, "__module__", None) or type(function).__module__
        if origin.split(".")[0] not in _KNOWN_CODE:
            raise _Unknown


def _node(node: Node) -> str:
    kwargs = [[name, value] for name, value in node.kwargs.items()]
    metas = [meta and [list(meta[0]), meta[1]] for meta in node.metas]
    seed = node.seed and list(node.seed)
    return _text([node.operator, node.args, kwargs, node.outputs, metas, seed, node.casts])


def _text(value: Any) -> str:
    if isinstance(value, Ref):
        return f"%{value.id}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, int):  # a torch.Size's own, an enumeration
        return repr(int(value))
    raise _Unknown
