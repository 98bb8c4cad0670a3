"""Passes: from the nodes of a captured graph to others that compute the same. `PASSES` says which run, and where."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainingcompiler.frameworks.pytorch.graph.ir import Graph, Node
from trainingcompiler.frameworks.pytorch.graph.passes.attention_remat import rematerialize_attention
from trainingcompiler.frameworks.pytorch.graph.passes.barrier_order import order_barriers
from trainingcompiler.frameworks.pytorch.graph.passes.causal_mask import canonicalize_causal_masks


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        name: As dumps call it.
        run: Takes a graph without dead nodes, and the numbers of the values that it is run for; returns the new nodes.
        platform: The only platform of JAX that it is for; "" is all.
    """

    name: str
    run: Callable[[Graph, list[int]], list[Node]]
    platform: str = ""


PASSES = (
    Pass("causal_mask", canonicalize_causal_masks, "cuda"),
    Pass("attention_remat", rematerialize_attention, "cuda"),
    Pass("barrier_order", order_barriers),
)


def run_passes(graph: Graph, results: list[int], platform: str) -> Iterator[tuple[str, Graph]]:
    """Runs those that are for a platform, one after the other.

    Args:
        graph: The captured step, which stays as it is.
        results: Numbers of the values that it is run for.
        platform: JAX's name of it.

    Yields:
        The name of each pass and the graph after it; first `"live"`, the graph without what no result depends on.
    """
    graph = Graph(graph.inputs, graph.live_nodes(results), graph.constants)
    yield "live", graph
    for one in PASSES:
        if one.platform in ("", platform):
            # A pass may leave nodes without a reader behind. The last may not lose what its barriers wait for.
            graph = Graph(graph.inputs, graph.live_nodes(results), graph.constants)
            graph = Graph(graph.inputs, one.run(graph, results), graph.constants)
            yield one.name, graph
