"""The nodes of autograd's graph that accumulate the gradients of parameters, which a script may have hooked.

`p.expand_as(p).grad_fn.next_functions[0][0].register_hook(...)` is how data parallelism was written before
`register_post_accumulate_grad_hook`. The parameter knows nothing of such a hook. It lives as long as the node, so nodes
that the script has reached are asked for hooks while they are there. What it reached while torch ran the steps, unseen,
is found when recording begins again.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough

_REACHED = "trainingcompiler: reached by the script"


class Accumulators:
    """Which parameters' nodes may have hooks."""

    def __init__(self) -> None:
        self._reached = WeakIdKeyDictionary()
        self._looked_at: dict[int, weakref.ref] = {}  # since recording has begun, by identity: asked at every step

    def begin(self) -> None:
        """Recording begins: what the script has done before was not seen."""
        self._looked_at.clear()

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

    def are_hooked(self, leaf: torch.Tensor) -> bool:
        """Whether the node that accumulates a leaf's gradient has hooks."""
        known = self._looked_at.get(id(leaf))
        if known is None or known() is not leaf:
            self._looked_at[id(leaf)] = weakref.ref(leaf, functools.partial(self._forget, id(leaf)))
            self._reached[leaf] = True
            _node(leaf).metadata[_REACHED] = True
        elif not len(self._reached) or leaf not in self._reached:
            return False
        node = _node(leaf)
        if _REACHED not in node.metadata:  # nobody holds it: this one is new
            del self._reached[leaf]
            return False
        return _has_hooks(node.register_hook) or _has_hooks(node.register_prehook)

    def _forget(self, key: int, reference: weakref.ref) -> None:
        if self._looked_at.get(key) is reference:
            del self._looked_at[key]


def _node(leaf: torch.Tensor) -> Any:
    with passthrough():
        return torch.autograd.graph.get_gradient_edge(leaf).node


def _has_hooks(register: Callable) -> bool:
    """Whether a node has hooks: torch shows them to nobody but the handle of one more."""
    handle = register(lambda *_: None)
    count = len(handle.hooks_dict_ref())
    handle.remove()
    return count > 1
