"""What torch computes of a captured graph, operator by operator.

Random operators give the program's own numbers: torch's generator is another one. Everything else is torch's.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from typing import Any

import jax
import torch

from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, HIDDEN_WRITES, OWN_ARGUMENTS, Node, Ref, references
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view, tensor_of
from trainingcompiler.frameworks.pytorch.operators import RANDOM_LOWERINGS
from trainingcompiler.frameworks.pytorch.operators.random import keyed


def replay(nodes: Iterable[Node], values: Mapping[int, torch.Tensor], wanted: Collection[int]) -> dict:
    """Runs operators in torch; what nobody reads any more is let go on the way.

    Args:
        nodes: In an order in which every value is computed before it is used.
        values: What they read besides, by number; it is not written to.
        wanted: Numbers of the values to return.

    Returns:
        The values of `wanted` that are among `values` or computed, by number.
    """
    nodes = list(nodes)
    last = {number: index for index, node in enumerate(nodes) for number in references(node)}
    kept = set(wanted)
    every = dict(values)
    with torch.no_grad(), torch._C._DisableAutocast():
        for index, node in enumerate(nodes):
            every.update(run_node(node, every))
            for number in (*references(node), *node.outputs):
                if number not in kept and last.get(number, index) == index:
                    every.pop(number, None)
    return {number: every[number] for number in kept if number in every}


def bytes_of_replay(nodes: Iterable[Node], wanted: Collection[int]) -> int:
    """The most that the results of operators take at a time in a replay, views counted as copies."""
    nodes = list(nodes)
    last = {number: index for index, node in enumerate(nodes) for number in references(node)}
    sizes: dict[int, int] = {}
    now = most = 0
    for index, node in enumerate(nodes):
        for number, meta in zip(node.outputs, node.metas, strict=True):
            if number is not None and meta is not None:
                sizes[number] = prod(meta[0]) * meta[1].itemsize
                now += sizes[number]
        most = max(most, now)
        for number in {*references(node), *node.outputs}:
            if number not in wanted and last.get(number, index) == index:
                now -= sizes.pop(number, 0)
    return most


def run_node(node: Node, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Runs one operator of a graph in torch.

    Args:
        node: The operator.
        values: Its inputs, by number; they are not written to.

    Returns:
        Its outputs, by number.
    """
    if node.seed is not None:
        return _drawn(node, values)
    writes = node.operator in HIDDEN_WRITES or (":" not in node.operator and _writes(node.operator))
    args = _decoded(node.args, values, writes)
    kwargs = {name: _decoded(value, values, writes) for name, value in node.kwargs.items() if name not in OWN_ARGUMENTS}
    # A write through a view is the view of a copy, written to; a barrier computes nothing; the rest is torch's own.
    if node.operator.startswith("inverse:"):
        parent, child, *rest = args
        whole = parent.clone(memory_format=torch.contiguous_format)
        _overload(node.operator.removeprefix("inverse:"))(whole, *rest, **kwargs).copy_(child)
        results = [whole]
    elif node.operator == BARRIER:
        results = list(args)
    else:
        if "._fused_" in node.operator:  # the table's own spelling takes hyperparameters as tensors
            kwargs = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        hidden = [args[position] for position in HIDDEN_WRITES.get(node.operator, ())]
        results = [*_leaves(_overload(node.operator)(*_given(node.operator, args), **kwargs)), *hidden]
    # A write takes the dtype of what it is written to.
    outputs = {}
    for number, meta, result in zip(node.outputs, node.metas, results, strict=False):
        if number is not None and isinstance(result, torch.Tensor):
            outputs[number] = result.to(meta[1]) if meta is not None and node.casts else result
    return outputs


def widened(node: Node) -> Node:
    """An operator that computes in float64 where it computed in float32."""
    args, kwargs, metas = _wide(node.args), {name: _wide(value) for name, value in node.kwargs.items()}, node.metas
    return dataclasses.replace(node, args=args, kwargs=kwargs, metas=_wide(metas))


def _wide(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_wide, value))
    return torch.float64 if value is torch.float32 else value


def _drawn(node: Node, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The outputs of a random operator, as its lowering draws them from the program's seed."""
    assert node.seed is not None
    seed, index = node.seed
    arrays: list[Any] = []

    def put(argument: Any) -> Any:
        if isinstance(argument, Ref):
            arrays.append(numpy_view(values[argument.id].contiguous()))
            return Ref(len(arrays) - 1)
        if isinstance(argument, list | tuple):
            return tuple(map(put, argument))
        return argument

    args = put(node.args)
    kwargs = tuple((name, put(value)) for name, value in node.kwargs.items())
    with jax.enable_x64(True):
        key = keyed(int(values[seed.id]), index)
        outputs = _draw(node.operator, args, kwargs)(key, *arrays)
        return {
            number: tensor_of(array) for number, array in zip(node.outputs, outputs, strict=True) if number is not None
        }


@functools.lru_cache(maxsize=256)
def _draw(operator: str, args: tuple, kwargs: tuple) -> Callable:
    """A compiled random operator: one for all nodes with equal constants and shapes."""

    def draw(key: jax.Array, *arrays: jax.Array) -> list:
        def take(argument: Any) -> Any:
            if isinstance(argument, Ref):
                return arrays[argument.id]
            return [take(item) for item in argument] if isinstance(argument, tuple) else argument

        given = {name: take(value) for name, value in kwargs}
        return _leaves(RANDOM_LOWERINGS[operator](*take(args), key=key, **given))

    return jax.jit(draw)


@functools.cache
def _overload(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _given(name: str, args: list[Any]) -> list[Any]:
    """Arguments as torch's operator takes them: a number that changes is a tensor in the graph."""
    takes = [argument.type.kind() == "NumberType" for argument in _overload(name)._schema.arguments]
    return [
        value.item() if is_number and isinstance(value, torch.Tensor) else value
        for value, is_number in zip(args, takes, strict=False)
    ]


def _writes(name: str) -> bool:
    """Whether an operator writes to what it is given, so that it has to be given a copy."""
    return name != BARRIER and _overload(name)._schema.is_mutable


def _decoded(argument: Any, values: Mapping[int, torch.Tensor], copies: bool) -> Any:
    if isinstance(argument, Ref):
        return values[argument.id].clone() if copies else values[argument.id]
    if isinstance(argument, list | tuple):
        return [_decoded(item, values, copies) for item in argument]
    return argument


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, list | tuple):
        return [leaf for item in result for leaf in _leaves(item)]
    return [result]
