"""The nodes of autograd's graph that accumulate the gradients of parameters, which a script may have hooked.

`p.expand_as(p).grad_fn.next_functions[0][0].register_hook(...)` is how data parallelism was written before
`register_post_accumulate_grad_hook`. Neither the parameter nor Python knows of such a hook. It lives as long as the
node, so it is enough to know whether a node that the script has reached is still there.
"""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough

_REACHED = "trainingcompiler: reached by the script"


class Accumulators:
    """Which parameters' nodes the script holds."""

    def __init__(self) -> None:
        self._reached = WeakIdKeyDictionary()

    def reach(self, node: Any) -> None:
        """Notes what can be reached from a tensor's `grad_fn`, which the script has asked for."""
        found, waiting = {node}, [node]
        while waiting:
            node = waiting.pop()
            if isinstance(getattr(node, "variable", None), torch.Tensor):
                node.metadata[_REACHED] = True  # it stays with the node, whoever asks for that one again
                self._reached[node.variable] = True
            for follower, _ in node.next_functions:
                if follower is not None and follower not in found:
                    found.add(follower)
                    waiting.append(follower)

    def are_held(self, leaf: torch.Tensor) -> bool:
        """Whether the script has reached the node that accumulates a leaf's gradient, and the node is still there."""
        if leaf not in self._reached:
            return False
        with passthrough():
            node: Any = torch.autograd.graph.get_gradient_edge(leaf).node  # torch says that `metadata` is a method
        is_held = _REACHED in node.metadata
        if not is_held:
            del self._reached[leaf]
        return is_held
