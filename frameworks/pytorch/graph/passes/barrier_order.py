"""Barriers of recomputed values wait for the gradients that were computed before them."""

import dataclasses

from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, Ref, references
from trainingcompiler.frameworks.pytorch.operators import VIEW_INVERSES


def order_barriers(graph: Graph, results: list[int]) -> list[Node]:
    """Makes every barrier wait for what the backward before it has computed for later: gradients of parameters.

    Otherwise XLA puts those off, and keeps what they are computed from: all that was computed again, for all blocks.

    Args:
        graph: The captured step.
        results: Numbers of the values that it is run for.

    Returns:
        The nodes, each barrier with more to wait for, and with results that take the place of what it waits for.
    """
    nodes = graph.nodes
    if not any(node.operator == BARRIER for node in nodes):
        return nodes
    last_read = {number: index for index, node in enumerate(nodes) for number in references(node)}
    last_read |= dict.fromkeys(results, len(nodes))
    makers = {output: node for node in nodes for output in node.outputs if output is not None}
    arranged: list[Node] = []
    for index, node in enumerate(nodes):
        if node.operator != BARRIER:
            arranged.append(node)
            continue
        # It waits for what was made after `since` and is read behind it: for the tensor itself, and not for a view or a
        # cast of it, which is made again behind the barrier.
        waits: dict[int, None] = {}
        again: list[Node] = []
        for earlier in _since(nodes[:index], node.kwargs["since"]):
            for output in earlier.outputs:
                if last_read.get(output, -1) > index:
                    chain: list[Node] = []
                    while _is_cheap(makers.get(output)):
                        chain.append(makers[output])
                        output = makers[output].args[0].id
                    if output > node.kwargs["since"]:
                        waits[output] = None
                        again += [made for made in reversed(chain) if made not in again]
        new, reads = node.outputs, (*node.args, *map(Ref, waits))
        arranged.append(dataclasses.replace(node, args=reads, outputs=(*new, *waits), metas=(None,) * len(reads)))
        arranged += again  # the cheap ones read what comes out of the barrier
    return arranged


def _since(nodes: list[Node], number: int) -> list[Node]:
    """The nodes that have made values after a certain one."""
    found = []
    for node in reversed(nodes):
        if all(output is None or output <= number for output in node.outputs):
            break
        found.append(node)
    return found[::-1]


def _is_cheap(node: Node | None) -> bool:
    """Whether a node only looks at a value in another way, so that its result is better not kept."""
    if node is None or not node.args or not isinstance(node.args[0], Ref):
        return False
    return node.operator in VIEW_INVERSES or node.operator == "aten._to_copy.default"
