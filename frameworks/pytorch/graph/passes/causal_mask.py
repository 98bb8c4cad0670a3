"""Attention under a mask that is computed to be the lower triangle becomes causal attention, for GPUs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, Ref, references
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough

# Where the positional arguments of attention end with `dropout_p, is_causal`.
_ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": 3,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": 6,
}
_LEAST_COMPACTED = 2**20  # elements
_MOST_ELEMENTS = 2**28  # of a mask that is looked at: half a gigabyte in 16 bits, 64 x 2048 x 2048


def canonicalize_causal_masks(graph: Graph, results: list[int]) -> list[Node]:
    """Attention under a mask that always is the lower triangle becomes causal attention; one that masks nothing goes.

    Transformers computes its masks from positions, inside of forward, so that no library sees what they are. cuDNN's
    causal kernel computes half of the scores, and reads no mask.

    Args:
        graph: The captured step.
        results: Numbers of the values that it is run for.

    Returns:
        The nodes, some of them replaced; those that only made the mask may be left without a reader.
    """
    masks = _Masks(graph.nodes, graph.constants)
    return [_without_mask(node, masks.kind(node)) if _is_masked(node) else node for node in graph.nodes]


def _is_masked(node: Node) -> bool:
    return node.operator in _ATTENTION and isinstance(node.kwargs.get("attn_mask"), Ref)


def _without_mask(node: Node, kind: str) -> Node:
    if kind == "other":
        return node
    tensors = node.args[: _ATTENTION[node.operator]]
    kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
    return dataclasses.replace(node, args=(*tensors, 0.0, kind == "causal"), kwargs=kwargs)


class _Masks:
    """The values of masks that no input of the graph decides."""

    def __init__(self, nodes: Sequence[Node], constants: dict[int, torch.Tensor]):
        self._values: dict[int, Any] = dict(constants)
        self._makers = {output: node for node in nodes for output in node.outputs if output is not None}
        barriers = [node for node in nodes if node.operator == BARRIER]
        self._behind = {new: old.id for node in barriers for new, old in zip(node.outputs, node.args, strict=True)}
        self._kinds: dict[int, str] = {}

    def kind(self, attention: Node) -> str:
        """What each query sees: `"causal"`, the keys up to its own place; `"all"` of them; or `"other"`."""
        number = attention.kwargs["attn_mask"].id
        if any(attention.args[_ATTENTION[attention.operator] :]):
            return "other"  # drops out, or is causal in addition to its mask
        if number not in self._kinds:
            mask = self._value(number)
            self._kinds[number] = "other" if mask is None else _kind(mask)
        return self._kinds[number]

    def _value(self, number: int) -> torch.Tensor | None:
        """A value of the graph, computed by torch; None if it depends on an input, or on chance."""
        pending = [number]
        while pending:
            current = pending[-1]
            node = self._makers.get(current)
            behind = self._behind.get(current)  # a checkpointed block is given what was made before it
            if behind in self._values:
                self._values[current] = self._values[behind]
            if current in self._values:
                pending.pop()
            elif behind is not None:
                pending.append(behind)
            elif node is None or node.seed is not None:
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
        if function is None:
            return False
        # Rows that are all alike are computed once; what is neither small nor a view is not worth a look.
        args, kwargs = self._decode(node.args), self._decode(node.kwargs)
        rows = _rows_alike(function, args)
        if rows:
            args = [
                arg[:1] if isinstance(arg, torch.Tensor) and arg.ndim and not arg.stride(0) else arg for arg in args
            ]
        elif not _is_small(node) and not _is_view(function):
            return False
        try:
            with passthrough(), torch.no_grad():
                result = function(*args, **kwargs)
                result = result.expand(rows, *result.shape[1:]) if rows else result
        except Exception:  # the functional form of a write, with arguments of its own: the mask stays a mask
            return False
        results = [_compact(value) for value in (result if isinstance(result, list | tuple) else [result])]
        if node.casts:  # a write: the result takes the dtype of what it is written to
            results = [value.to(meta[1]) for value, meta in zip(results, node.metas, strict=True)]
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


def _is_view(function: Any) -> bool:
    return all(returned.alias_info is not None for returned in function._schema.returns)


def _rows_alike(function: Any, args: list) -> int | None:
    """How many rows the result has, if it is computed value by value from tensors whose rows are all alike."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    most = max((tensor.ndim for tensor in tensors), default=0)
    rows = max((tensor.shape[0] for tensor in tensors if tensor.ndim == most), default=1) if most else 1
    if rows == 1 or torch.Tag.pointwise not in function.tags:
        return None
    alike = all(tensor.ndim < most or tensor.shape[0] == 1 or tensor.stride(0) == 0 for tensor in tensors)
    return rows if alike else None


def _overload(operator: str) -> Any:
    namespace, _, name = operator.partition(".")
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace, None), packet, None), overload, None)


def _compact(value: Any) -> Any:
    """The first row in the place of all, where they are alike: 64 rows of 2048 x 2048 are 2 GB in 64 bits, 32 MB so."""
    if not isinstance(value, torch.Tensor) or value.numel() < _LEAST_COMPACTED or value.shape[0] == 1:
        return value
    if value.stride(0) == 0 or not torch.equal(value[1:], value[:-1]):
        return value
    return value[:1].clone().expand(value.shape)


def _kind(mask: torch.Tensor) -> str:
    """What a mask is that lets through where it is True, or 0, and masks where it is False, or as low as can be."""
    mask = mask[:1] if mask.ndim > 2 and mask.stride(0) == 0 else mask
    boolean = mask.dtype is torch.bool
    through, masked = (mask, ~mask) if boolean else (mask == 0, mask <= torch.finfo(mask.dtype).min)
    if through.all():
        return "all"
    if mask.ndim >= 2 and mask.shape[-1] == mask.shape[-2]:
        triangle = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        if torch.where(triangle, through, masked).all():
            return "causal"
    return "other"
