"""The captured step: a functional ATen graph."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

BARRIER = "barrier"  # any number of values -> the same values, all of them computed, which XLA takes for new ones


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value number `id` in a node's arguments."""

    id: int

    def __repr__(self) -> str:
        return f"%{self.id}"


@dataclass(slots=True)
class Node:
    """One functional operator.

    Attributes:
        operator: The overload's name, `"aten.add.Tensor"`; for a write through a view, `"inverse:"` and the view's.
        args: Positional arguments, `Ref` in place of tensors.
        kwargs: Keyword arguments, likewise.
        outputs: Value numbers in the flattened order of the operator's returns; None where it returns none.
        metas: `(shape, dtype)` of each output, as torch's fake tensors have it.
        seed: The value that seeds this node's random numbers, and the node's number under that seed.
        where: The line of the user's code, `"train.py:88"`, if one is on the stack.
        casts: Whether results are rounded to the outputs' dtypes, as a mutation does.
    """

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int | None, ...]
    metas: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    seed: tuple[Ref, int] | None = None
    where: str | None = None
    casts: bool = False

    def __str__(self) -> str:
        """One line: `%5 = aten.mm.default(%1, %4)  # float32[8, 4], train.py:12`."""
        outputs = ", ".join("_" if output is None else f"%{output}" for output in self.outputs)
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        if self.seed is not None:
            given.append(f"seed={self.seed[0]!r}+{self.seed[1]}")
        facts = [f"{str(meta[1]).removeprefix('torch.')}{list(meta[0])}" for meta in self.metas if meta is not None]
        comment = ", ".join([*facts, *([self.where] if self.where else [])])
        return f"{outputs} = {self.operator}({', '.join(given)})" + (f"  # {comment}" if comment else "")


@dataclass(slots=True)
class Graph:
    """Nodes in order of execution, over numbered values.

    Attributes:
        inputs: The value number of each graph input, in order.
        nodes: In an order in which every value is computed before it is used.
        constants: Small tensors that the step's own code writes as literals (`torch.tensor([1., 2.])`).
    """

    inputs: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        """The inputs, the constants and the nodes, a line each."""
        inputs = f"inputs {', '.join(f'%{number}' for number in self.inputs)}"
        constants = (f"%{number} = {value.tolist()}" for number, value in self.constants.items())
        return "\n".join([inputs, *constants, *map(str, self.nodes)])

    def live_nodes(self, outputs: list[int]) -> list[Node]:
        """The nodes that any of `outputs` depends on, in order; a barrier with what is read behind it alone."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(output in needed for output in node.outputs):
                if node.operator == BARRIER:
                    node = _narrowed(node, needed)
                kept.append(node)
                needed.update(references(node))
        kept.reverse()
        return kept


def _narrowed(barrier: Node, needed: set[int]) -> Node:
    """A barrier without the values that nobody reads behind it: XLA would compute them, and keep them for it."""
    kept = [place for place, output in enumerate(barrier.outputs) if output in needed]
    if len(kept) == len(barrier.outputs):
        return barrier
    return replace(
        barrier,
        args=tuple(barrier.args[place] for place in kept),
        outputs=tuple(barrier.outputs[place] for place in kept),
        metas=tuple(barrier.metas[place] for place in kept),
    )


def references(node: Node) -> list[int]:
    """The numbers of the values that a node reads."""
    found: list[int] = [node.seed[0].id] if node.seed else []

    def visit(argument: Any) -> None:
        if isinstance(argument, Ref):
            found.append(argument.id)
        elif isinstance(argument, list | tuple):
            for item in argument:
                visit(item)

    visit(node.args)
    visit(tuple(node.kwargs.values()))
    return found


# Overloads that write to arguments although their schema does not say so:
# overload -> the positions of the arguments that the trailing outputs of its lowering replace.
HIDDEN_WRITES = {"aten.native_batch_norm.default": (3, 4)}

CONTIGUOUS = "contiguous"  # whether a matrix is: what torch's own factorization looks at
OWN_ARGUMENTS = frozenset({CONTIGUOUS})
"""Named arguments of a node that torch's operator does not have."""
