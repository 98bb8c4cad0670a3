"""Turns a captured graph into a function on JAX arrays."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, Ref
from trainingcompiler.frameworks.pytorch.graph.passes import run_passes
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.lowering.fsdp_split import run_local_then_replicated
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS, RANDOM_LOWERINGS, VIEW_INVERSES
from trainingcompiler.frameworks.pytorch.operators.dtypes import jax_dtype
from trainingcompiler.frameworks.pytorch.operators.matmul import products_at, strictest
from trainingcompiler.frameworks.pytorch.operators.random import node_key
from trainingcompiler.targets.target import current as current_target

# Fake tensors say that these save their statistics in bfloat16 where the input is; torch's kernels save them in the
# float32 of the weights, and so do ours. And attention's, before torch 2.13, in float32 where the input is float64.
_WIDE_STATISTICS = frozenset(
    f"aten.{name}.default"
    for name in (
        "native_layer_norm",
        "native_group_norm",
        "native_batch_norm",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def lower(
    graph: Graph, results: list[int], precisions: Collection[str] = (), common: Collection[int] | None = None
) -> Callable[[dict[int, jax.Array]], list[jax.Array]]:
    """A JAX function that computes values of the graph.

    Args:
        graph: The captured step.
        results: Numbers of the values to compute.
        precisions: What `torch.get_float32_matmul_precision()` was at the calls that were captured; the most exact
            holds for all. Without any, what it is when the function is traced.
        common: The inputs that several workers have alike, where they divide them; see `apart`.

    Returns:
        A function from the values of the graph's inputs, by number, to the values of `results`, in order.
    """

    def run(inputs: dict[int, jax.Array]) -> list[jax.Array]:
        values: dict[int, Any] = dict(inputs)
        for value, constant in graph.constants.items():
            values[value] = jnp.asarray(numpy_view(constant))
        with products_at(strictest(precisions)):
            nodes = _nodes(graph, results)
            if common is not None:
                run_local_then_replicated(nodes, results, values, {*common, *graph.constants}, _run_node_or_say)
            else:
                for node in nodes:
                    _run_node_or_say(node, values)
        return [values[result] for result in results]

    return run


def _nodes(graph: Graph, results: list[int]) -> list[Node]:
    target = current_target()
    *_, (_, graph) = run_passes(graph, results, "" if target is None else target.platform)
    return graph.nodes


def _run_node_or_say(node: Node, values: dict[int, Any]) -> None:
    try:
        with jax.named_scope(node.where or "torch"):  # the script's lines, in XLA's profiles and memory reports
            _run_node(node, values)
    except CaptureError:
        raise
    except Exception as error:  # whatever the table cannot express: the step can still run in torch
        raise CaptureError(
            reason=f"{node.operator} could not be lowered ({type(error).__name__}: {error})",
            where=node.where,
            operator=node.operator,
        ) from error


def _run_node(node: Node, values: dict[int, Any]) -> None:
    args = _decode(node.args, values)
    kwargs = {name: _decode(value, values) for name, value in node.kwargs.items()}
    if node.operator.startswith("inverse:"):
        result = VIEW_INVERSES[node.operator.removeprefix("inverse:")](*args, **kwargs)
    elif node.operator == BARRIER:
        result = jax.lax.optimization_barrier(args)
    elif node.seed is not None:
        seed, index = node.seed
        result = RANDOM_LOWERINGS[node.operator](*args, key=node_key(values[seed.id], index), **kwargs)
    else:
        result = LOWERINGS[node.operator](*args, **kwargs)
    outputs = _flatten(result)
    for number, meta, output in zip(node.outputs, node.metas, outputs, strict=True):
        if number is None or output is None:  # a gradient that nobody asked for; fake kernels make one all the same
            continue
        values[number] = output if meta is None else _checked(node, meta, output)


def _checked(node: Node, meta, output: jax.Array) -> jax.Array:
    shape, dtype = meta[0], jax_dtype(meta[1])
    if node.casts and output.dtype != dtype:
        output = output.astype(dtype)
    if output.shape != shape or (output.dtype != dtype and node.operator not in _WIDE_STATISTICS):
        raise CaptureError(
            reason=f"the lowering of {node.operator} gives {output.dtype}{list(output.shape)} where torch gives "
            f"{dtype}{list(shape)}: a bug of trainingcompiler, please report it",
            where=node.where,
            operator=node.operator,
        )
    return output


def _decode(argument: Any, values: dict[int, Any]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.id]
    if isinstance(argument, list | tuple):
        return [_decode(item, values) for item in argument]
    return argument


def _flatten(result: Any) -> list[Any]:
    if isinstance(result, list | tuple):
        return [leaf for item in result for leaf in _flatten(item)]
    return [result]
