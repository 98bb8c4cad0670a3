"""Operators on lists of tensors: the single-tensor lowering, once for each tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from jax import lax

from .promotion import Array, Number, is_number
from .registry import LOWERINGS, lowers

_WITHOUT_NUMBERS = (
    "abs acos asin atan ceil clone copy cos cosh erf erfc exp expm1 floor frac lgamma log log10 log1p log2 max mm neg "
    "reciprocal round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc zero"
)
_KINDS = ("List", "Scalar", "ScalarList")
_SINGLE = {
    **{f"{name}.default": f"{name}.default" for name in _WITHOUT_NUMBERS.split()},
    **{f"{name}.{kind}": f"{name}.Tensor" for name in ("add", "sub", "mul", "div") for kind in _KINDS},
    **{f"{name}.Tensor": f"{name}.Tensor" for name in ("add", "mul", "div")},
    **{
        f"{name}.{kind}": f"{name}.default"
        for name in ("addcmul", "addcdiv")
        for kind in ("Scalar", "ScalarList", "Tensor")
    },
    **{f"{name}.List": f"{name}.Tensor" for name in ("clamp_min", "clamp_max")},
    **{f"{name}.{kind}": f"{name}.default" for name in ("clamp_min", "clamp_max") for kind in ("Scalar", "ScalarList")},
    **{f"maximum.{kind}": "clamp_min.Tensor" for kind in _KINDS},
    **{f"minimum.{kind}": "clamp_max.Tensor" for kind in _KINDS},
    "pow.Scalar": "pow.Tensor_Scalar",
    "pow.ScalarList": "pow.Tensor_Scalar",
    "pow.List": "pow.Tensor_Tensor",
    "pow.ScalarAndTensor": "pow.Scalar",
    "lerp.Scalar": "lerp.Scalar",
    "lerp.ScalarList": "lerp.Scalar",
    "lerp.List": "lerp.Tensor",
}
"""The list operator's overload -> the overload that it applies to each tensor."""


def _lower_each(name: str, single: str) -> None:
    @lowers(f"aten._foreach_{name}")
    def each(*operands: Any, **options: Any) -> list[Array]:
        count = next(len(operand) for operand in operands if isinstance(operand, list | tuple))
        apply = LOWERINGS[f"aten.{single}"]
        options.pop("memory_format", None)
        return [apply(*row, **options) for row in zip(*(_each(operand, count) for operand in operands), strict=True)]


def _each(operand: Any, count: int) -> Sequence[Any]:
    """The operand of each tensor: its own of a list or a 1-d tensor of numbers, or one for all."""
    if isinstance(operand, list | tuple):
        return operand
    if not is_number(operand) and operand.ndim == 1:
        return [lax.index_in_dim(operand, index, keepdims=False) for index in range(count)]
    return [operand] * count


for _name, _single in _SINGLE.items():
    _lower_each(_name, _single)


@lowers("aten._foreach_norm.Scalar")
def foreach_norm(self: Sequence[Array], ord: Number = 2, dtype: torch.dtype | None = None) -> list[Array]:
    return [LOWERINGS["aten.linalg_vector_norm.default"](tensor, ord, dtype=dtype) for tensor in self]
