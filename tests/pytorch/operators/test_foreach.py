"""Operators on lists of tensors against torch."""

import pytest
import torch

from tests.pytorch.operators.harness import Call, compare


def lists(count):
    generator = torch.Generator().manual_seed(count)
    return [[torch.rand(shape, generator=generator) + 0.1 for shape in ((3,), (2, 2), ())] for _ in range(count)]


def call(name, *args, **kwargs):
    packet, overload = name.split(".")
    expected = getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)
    return Call(f"aten.{name}", args, kwargs, tuple(expected))


UNARY = (
    "abs ceil cos erf exp expm1 floor frac lgamma log log1p max neg reciprocal round rsqrt sigmoid sign sqrt tanh zero"
)


def test_without_numbers():
    [tensors] = lists(1)
    compare([call(f"_foreach_{name}.default", tensors) for name in UNARY.split()])


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum", "clamp_min", "clamp_max", "pow"])
def test_with_numbers(name):
    first, second = lists(2)
    calls = [
        call(f"_foreach_{name}.Scalar", first, 0.7),
        call(f"_foreach_{name}.ScalarList", first, [0.7, 2.0, 3.0]),
        call(f"_foreach_{name}.List", first, second),
    ]
    if name in ("add", "mul", "div"):
        calls.append(call(f"_foreach_{name}.Tensor", first, torch.tensor(1.5)))
    if name in ("add", "sub"):
        calls.append(call(f"_foreach_{name}.List", first, second, alpha=-0.3))
    compare(calls)


def test_with_three_lists():
    first, second, third = lists(3)
    calls = [call("_foreach_lerp.Scalar", first, second, 0.1), call("_foreach_lerp.List", first, second, third)]
    for name in ("addcmul", "addcdiv"):
        calls += [
            call(f"_foreach_{name}.Scalar", first, second, third, 0.5),
            call(f"_foreach_{name}.ScalarList", first, second, third, [0.5, -1.0, 2.0]),
            call(f"_foreach_{name}.Tensor", first, second, third, torch.tensor([0.5, -1.0, 2.0])),
        ]
    compare(calls)


def test_norms_and_copies():
    first, second = lists(2)
    calls = [call("_foreach_norm.Scalar", first, order) for order in (1, 2, float("inf"))]
    calls.append(call("_foreach_norm.Scalar", [t.bfloat16() for t in first], 2, torch.float32))
    calls.append(call("_foreach_copy.default", first, [t.double() for t in second]))
    calls.append(call("_foreach_pow.ScalarAndTensor", 2.0, first))
    compare(calls)
