"""Keeps what a backward computes again apart from what forward has computed: gradient checkpointing.

A checkpointed block saves memory by forgetting its results and computing them again in backward. In one program both
computations are the same expressions, and XLA would compute them once and keep the results after all. So what is
computed again reads through a barrier (GPT-2 small, batch 8 x 512, bfloat16, for a described H200: 2.67 GB of
temporaries without, as without checkpointing).
"""

from collections.abc import Callable
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, Ref


class RematBarriers:
    """Puts a barrier before each part of a graph that is computed again.

    Args:
        graph: That is being recorded.
        new_value: Makes a value number.
    """

    def __init__(self, graph: Graph, new_value: Callable[[], int]):
        self._graph = graph
        self._new_value = new_value
        self._newest = 0
        self._since: int | None = None  # the newest value when backward, or the last recomputation, began
        self._before = 0  # the newest value when the current recomputation began
        self._barrier: Node | None = None  # of the current recomputation; None outside of one
        self._fresh: dict[int, Ref] = {}

    def fence(self, node: Node) -> None:
        """Makes a node that is about to be recorded read what was there before through a barrier, if it recomputes."""
        if torch._C._current_graph_task_id() == -1:
            self._since = self._barrier = None
        else:
            if self._since is None:
                self._since = self._newest
            # The engine turns gradients off, checkpointing turns them on (and so does `create_graph=True`, where
            # barriers are superfluous and do no harm). In between, what is saved is detached, with gradients off.
            if torch.is_grad_enabled():
                self._apart(node)
            elif node.operator != "aten.detach.default":
                self._barrier = None
        self._newest = max(self._newest, *(output for output in node.outputs if output is not None), 0)

    def _apart(self, node: Node) -> None:
        if self._barrier is None:
            self._barrier = Node(BARRIER, (), {"since": self._since}, (), ())
            self._graph.nodes.append(self._barrier)
            self._since = self._before = self._newest
            self._fresh = {}
        node.args, node.kwargs = self._behind(node.args), self._behind(node.kwargs)
        if node.seed is not None:
            node.seed = self._behind(node.seed[0]), node.seed[1]

    def _behind(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self._read(argument) if argument.id <= self._before else argument
        if isinstance(argument, dict):
            return {name: self._behind(value) for name, value in argument.items()}
        if isinstance(argument, tuple):
            return tuple(map(self._behind, argument))
        return argument

    def _read(self, value: Ref) -> Ref:
        if value.id not in self._fresh:
            fresh = self._fresh[value.id] = Ref(self._new_value())
            self._barrier.args += (value,)
            self._barrier.outputs += (fresh.id,)
            self._barrier.metas += (None,)
        return self._fresh[value.id]
