"""Operators on lists of tensors: the single-tensor lowering, once for each tensor."""

from collections.abc import Sequence

import numpy as np
import torch
from jax import lax

from .operands import Array, cast, expand, is_number
from .registry import LOWERINGS, lowers

UNARY = (
    "abs acos asin atan ceil clone cos cosh erf erfc exp expm1 floor frac lgamma log log10 log1p log2 max neg "
    "reciprocal round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc"
).split()

# The list operator's overloads and the single-tensor overload that each applies.
APPLIED = {
    **{f"{name}.default": f"{name}.default" for name in UNARY},
    **{
        f"{name}.{overload}": f"{name}.Tensor"
        for name in ("add", "sub", "mul", "div")
        for overload in ("Scalar", "List", "ScalarList", "Tensor")
    },
    **{
        f"{name}.{overload}": f"{name}.default"
        for name in ("addcmul", "addcdiv")
        for overload in ("Scalar", "ScalarList", "Tensor")
    },
    **{
        f"{name}.{overload}": f"{single}.{'Tensor' if overload == 'List' else 'default'}"
        for name, single in (
            ("clamp_min", "clamp_min"),
            ("clamp_max", "clamp_max"),
            ("maximum", "clamp_min"),
            ("minimum", "clamp_max"),
        )
        for overload in ("Scalar", "List", "ScalarList")
    },
    "pow.Scalar": "pow.Tensor_Scalar",
    "pow.ScalarList": "pow.Tensor_Scalar",
    "pow.List": "pow.Tensor_Tensor",
    "pow.ScalarAndTensor": "pow.Scalar",
    "lerp.Scalar": "lerp.Scalar",
    "lerp.ScalarList": "lerp.Scalar",
    "lerp.List": "lerp.Tensor",
}


def _lower_each(name: str, single: str) -> None:
    by_keyword = name.startswith("addc")  # The last operand of the single-tensor overload is `value=`.

    @lowers(f"aten._foreach_{name}")
    def each(*operands: object, **options: object) -> list[Array]:
        count = next(len(operand) for operand in operands if isinstance(operand, list | tuple))
        rows = zip(*(_per_tensor(operand, count, name) for operand in operands), strict=True)
        apply = LOWERINGS[f"aten.{single}"]
        if by_keyword:
            return [apply(*row[:3], **dict(zip(("value",), row[3:], strict=False)), **options) for row in rows]
        return [apply(*row, **options) for row in rows]


def _per_tensor(operand: object, count: int, name: str) -> Sequence[object]:
    if isinstance(operand, list | tuple):
        return operand
    if not is_number(operand) and getattr(operand, "ndim", 0) == 1 and name.endswith(".Tensor"):
        return [operand[i] for i in range(count)]
    return [operand] * count
