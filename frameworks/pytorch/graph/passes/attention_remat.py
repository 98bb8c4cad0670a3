"""Attention that is written out keeps no scores: a GPU's backward computes them again, as fused kernels do.

Attention with dropout has no fused kernel that XLA could call, and what the backward wants of it are matrices of
length x length for every head: scores, probabilities, the mask of the dropout, in float32. Where they are larger than
queries, keys and values, which are kept anyway, they are computed again from those, for about a tenth of the layer's
arithmetic; with heads of 64 that is from some 200 places on (Chen et al. 2016,
https://arxiv.org/abs/1604.06174; FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135, does likewise).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence, Set
from math import prod
from typing import Any

from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, Ref, references

_PRODUCTS = ("aten.bmm.default", "aten.baddbmm.default", "aten.matmul.default")
_SOFTMAXES = ("aten._softmax.default", "aten._safe_softmax.default")
_SOFTMAX_BACKWARD = "aten._softmax_backward_data.default"
# What is computed again without a thought, up to where queries, keys and values come from: half the memory in 16 bits.
_CHEAP = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy.default", "_unsafe_view.default", "clone.default", "detach.default", "expand.default", "mul.Scalar",
        "mul.Tensor", "permute.default", "reshape.default", "select.int", "slice.Tensor", "split.Tensor", "squeeze.dim",
        "t.default", "transpose.int", "unsqueeze.default", "view.default",
    )
)  # fmt: skip
_NOTHING_BEFORE = 2**62  # a barrier that waits for no gradients; see `barrier_order`


def rematerialize_attention(graph: Graph, results: list[int]) -> list[Node]:
    """Has every backward of attention compute scores and probabilities again.

    Args:
        graph: The captured step.
        results: Numbers of the values that it is run for.

    Returns:
        The nodes, with a copy of each attention's scores in front of what its backward reads of them.
    """
    found = list(graph.nodes)
    for softmax in [node for node in graph.nodes if node.operator in _SOFTMAXES]:
        block = _Block.around(softmax, found)
        if block is not None:
            found = block.computed_again(found)
    return found


@dataclasses.dataclass(frozen=True)
class _Block:
    """The nodes of one attention that are computed again.

    Attributes:
        members: In order: what makes queries, keys and values of what is kept, and all that is as large as the scores.
        scores: The values of the latter.
        end: The index of the product with the values.
    """

    members: tuple[Node, ...]
    scores: frozenset[int]
    end: int

    @classmethod
    def around(cls, softmax: Node, nodes: list[Node]) -> "_Block | None":
        """The block of a softmax; None if it is no attention's, or no backward reads it."""
        size = _size(softmax)
        start = next(index for index, node in enumerate(nodes) if node is softmax)
        inside = _up_to_the_keys(softmax, nodes[:start])
        if not any(id(node) in inside and node.operator in _PRODUCTS for node in nodes[:start]):
            return None
        end = _down_to_the_values(size, start, nodes, inside)
        if end is None:
            return None
        scores = frozenset(output for node in nodes[:end] if id(node) in inside for output in node.outputs)
        products = [node for node in nodes[:end] if id(node) in inside and node.operator in _PRODUCTS]
        products.append(nodes[end])
        if size < sum(_inputs_of(products, nodes[:end], scores)):
            return None  # a short sequence: what the scores are computed from takes as much as they do
        inside |= _cheap_behind(products, nodes[:end], scores)
        return cls(tuple(node for node in nodes[:end] if id(node) in inside), scores, end)

    def computed_again(self, nodes: list[Node]) -> list[Node]:
        """The nodes, with the block a second time before the first node behind its end that reads it."""
        made = {output for node in self.members for output in _values(node)}
        first = next((i for i in range(self.end + 1, len(nodes)) if self.scores & set(references(nodes[i]))), None)
        if first is None:
            return nodes
        fresh = itertools.count(max(output for node in nodes for output in _values(node)) + 1)
        # The gradient is what comes right before: the copy may not begin without it, or it would be made in forward.
        gradient = next(_values(nodes[first - 1]), None)
        outside = {number for node in self.members for number in references(node) if number not in made}
        waits = [*sorted(outside), *([gradient] if gradient is not None and gradient not in made else [])]
        behind = dict(zip(waits, fresh, strict=False))
        barrier = Node(
            BARRIER, tuple(map(Ref, waits)), {"since": _NOTHING_BEFORE}, tuple(behind.values()), (None,) * len(waits)
        )
        copies, names = _copied(self.members, {number: behind[number] for number in outside}, fresh)
        later = {old: new for old, new in names.items() if old in made}
        if gradient in behind:
            later[gradient] = behind[gradient]
        return [*nodes[:first], barrier, *copies, *(_renamed(node, later) for node in nodes[first:])]


def _up_to_the_keys(softmax: Node, before: list[Node]) -> set[int]:
    """The ids of the nodes as large as a softmax that it is computed from, up to the product of queries and keys."""
    makers = {output: node for node in before for output in node.outputs}
    inside, pending = {id(softmax)}, [softmax]
    while pending:
        node = pending.pop()
        if node.operator in _PRODUCTS:
            continue
        for number in references(node):
            maker = makers.get(number)
            if maker is not None and _size(maker) == _size(softmax) and id(maker) not in inside:
                inside.add(id(maker))
                pending.append(maker)
    return inside


def _down_to_the_values(size: int, start: int, nodes: list[Node], inside: set[int]) -> int | None:
    """The index of the product with the values; None where something else reads the scores first.

    Args:
        size: Elements of the scores.
        start: The index of the softmax.
        nodes: All nodes.
        inside: The ids of the block's nodes, to which those on the way down are added.
    """
    known = {output for node in nodes if id(node) in inside for output in node.outputs}
    for index in range(start + 1, len(nodes)):
        node = nodes[index]
        if known & set(references(node)):
            if node.operator in _PRODUCTS and _size(node) != size:
                return index
            if node.operator == _SOFTMAX_BACKWARD or _size(node) != size:
                return None
        elif not _is_random(node, size):  # the dropout's mask reads no more than a shape
            continue
        inside.add(id(node))
        known |= set(node.outputs)
    return None


def _copied(members: Sequence[Node], names: dict[int, int], fresh: Iterator[int]) -> tuple[list[Node], dict[int, int]]:
    """Nodes that compute the same once more, of the values in `names`, and all names with those of their results."""
    copies, names = [], dict(names)
    for node in members:
        outputs = tuple(None if output is None else next(fresh) for output in node.outputs)
        copies.append(dataclasses.replace(_renamed(node, names), outputs=outputs))
        names |= {old: new for old, new in zip(node.outputs, outputs, strict=True) if old is not None}
    return copies, names


def _inputs_of(products: list[Node], before: list[Node], known: Set[int]) -> list[int]:
    """The elements of what products read besides scores: queries, keys and values."""
    makers = {output: node for node in before for output in node.outputs}
    numbers = {number for product in products for number in references(product) if number not in known}
    return [_size(makers[number]) for number in numbers if number in makers]


def _cheap_behind(products: list[Node], before: list[Node], known: Set[int]) -> set[int]:
    """The ids of the nodes that only turn, widen or scale something for a product."""
    makers = {output: node for node in before for output in node.outputs}
    found: set[int] = set()
    pending = [number for product in products for number in references(product) if number not in known]
    while pending:
        maker = makers.get(pending.pop())
        if maker is not None and maker.operator in _CHEAP and id(maker) not in found:
            found.add(id(maker))
            pending += references(maker)
    return found


def _size(node: Node) -> int:
    """Elements of a node's first result."""
    meta = next((meta for meta in node.metas if meta is not None), None)
    return prod(meta[0]) if meta is not None and len(meta[0]) > 2 else 0


def _values(node: Node) -> Iterator[int]:
    """The numbers of the results that a node has."""
    return (output for output in node.outputs if output is not None)


def _is_random(node: Node, size: int) -> bool:
    return node.seed is not None and _size(node) == size


def _renamed(node: Node, names: dict[int, int]) -> Node:
    """A node that reads other values."""

    def rename(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return Ref(names.get(argument.id, argument.id))
        if isinstance(argument, list | tuple):
            return type(argument)(rename(item) for item in argument)
        if isinstance(argument, dict):
            return {name: rename(value) for name, value in argument.items()}
        return argument

    if not any(number in names for number in references(node)):
        return node
    seed = node.seed if node.seed is None else (rename(node.seed[0]), node.seed[1])
    return dataclasses.replace(node, args=rename(node.args), kwargs=rename(node.kwargs), seed=seed)
