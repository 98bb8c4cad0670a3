"""Rewrites of a captured graph for GPUs: what libraries spell in many operators and a GPU has one kernel for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.graph import Node, Ref, references
from trainingcompiler.frameworks.pytorch.replaying import undeferred

# Where the positional arguments of attention end with `dropout_p, is_causal`.
_ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": 3,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": 6,
}
_MOST_ELEMENTS = 2**28  # of a mask that is looked at: half a gigabyte in 16 bits, 64 x 2048 x 2048


def for_gpu(nodes: Sequence[Node], constants: dict[int, torch.Tensor]) -> list[Node]:
    """Attention under a mask that always is the lower triangle becomes causal attention.

    Transformers computes its causal mask from positions, inside of forward, so that no library sees that it is one.
    cuDNN's causal kernel computes half of the scores, and reads no mask.

    Args:
        nodes: In order of execution.
        constants: The graph's literals.

    Returns:
        The nodes, some of them replaced; those that only made the mask may be left without a reader.
    """
    masks = _Masks(nodes, constants)
    return [_causal(node) if _is_masked(node) and masks.is_causal(node) else node for node in nodes]


def _is_masked(node: Node) -> bool:
    return node.operator in _ATTENTION and isinstance(node.kwargs.get("attn_mask"), Ref)


def _causal(node: Node) -> Node:
    tensors = node.args[: _ATTENTION[node.operator]]
    kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
    return dataclasses.replace(node, args=(*tensors, 0.0, True), kwargs=kwargs)


class _Masks:
    """The values of masks that no input of the graph decides."""

    def __init__(self, nodes: Sequence[Node], constants: dict[int, torch.Tensor]):
        self._values: dict[int, Any] = dict(constants)
        self._makers = {output: node for node in nodes for output in node.outputs if output is not None}
        self._answers: dict[int, bool] = {}

    def is_causal(self, attention: Node) -> bool:
        """Whether the mask lets each query see the keys up to its own place, and none after."""
        number = attention.kwargs["attn_mask"].id
        if any(attention.args[_ATTENTION[attention.operator] :][1:2]):
            return False  # causal in addition to its mask
        if number not in self._answers:
            mask = self._value(number)
            self._answers[number] = mask is not None and _is_lower_triangle(mask)
        return self._answers[number]

    def _value(self, number: int) -> torch.Tensor | None:
        """A value of the graph, computed by torch; None if it depends on an input, or on chance."""
        pending = [number]
        while pending:
            current = pending[-1]
            node = self._makers.get(current)
            if current in self._values:
                pending.pop()
            elif node is None or node.seed is not None or not _is_small(node):
                return None
            else:
                missing = [read for read in references(node) if read not in self._values]
                if missing:
                    pending += missing
                elif not self._run(node):
                    return None
        return self._values[number]

    def _run(self, node: Node) -> bool:
        function = _overload(node.operator)
        if function is None or node.casts:
            return False
        with undeferred(), torch.no_grad():
            result = function(*self._decode(node.args), **self._decode(node.kwargs))
        results = result if isinstance(result, list | tuple) else [result]
        self._values.update({output: value for output, value in zip(node.outputs, results, strict=False)})
        return True

    def _decode(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self._values[argument.id]
        if isinstance(argument, dict):
            return {name: self._decode(value) for name, value in argument.items()}
        if isinstance(argument, list | tuple):
            return [self._decode(item) for item in argument]
        return argument


def _is_small(node: Node) -> bool:
    return all(meta is not None and torch.Size(meta[0]).numel() <= _MOST_ELEMENTS for meta in node.metas)


def _overload(operator: str) -> Any:
    namespace, _, name = operator.partition(".")
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace, None), packet, None), overload, None)


def _is_lower_triangle(mask: torch.Tensor) -> bool:
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype is torch.bool:
        return bool((mask == seen).all())
    return bool(torch.where(seen, mask == 0, mask <= torch.finfo(mask.dtype).min).all())
