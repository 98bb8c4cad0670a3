"""Pointwise operators and activations against torch, forward and backward."""

import math

import pytest
import torch

from tests.pytorch.lower.harness import assert_lowering_matches, assert_program_matches, check_operator, check_operators

ARITHMETIC = """
    __radd__ __rdiv__ __rmod__ __rmul__ __rpow__ __rsub__ add addcdiv addcmul clamp clamp_max clamp_min
    div:floor_rounding div:no_rounding_mode div:trunc_rounding float_power floor_divide fmax fmin fmod ldexp lerp
    max:binary maximum min:binary minimum mul pow remainder rsub sub true_divide
"""
COMPARISON = """
    eq fill ge gt heaviside isclose isfinite isin isinf isnan isneginf isposinf le logical_and logical_not logical_or
    logical_xor lt masked_fill nan_to_num ne to where
"""
INTEGER = "bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor gcd lcm"
BINARY = """
    atan2 copysign hypot igamma igammac logaddexp logaddexp2 nextafter special.xlog1py special.zeta xlogy
"""
UNARY = """
    abs acos acosh angle asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac
    i0 lgamma log log10 log1p log2 logit mvlgamma:mvlgamma_p_3 neg rad2deg reciprocal round round:decimals_3
    round:decimals_neg_3 rsqrt sgn sigmoid sign signbit sin sinc sinh special.entr special.i0e special.i1 special.i1e
    special.log_ndtr special.ndtr special.ndtri sqrt square tan tanh trunc
"""
ACTIVATIONS = """
    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 selu silu
    softplus softshrink softsign tanhshrink threshold
"""


@pytest.mark.parametrize("name", (ARITHMETIC + COMPARISON + BINARY + UNARY).split())
def test_float32(name):
    check_operator(name, samples=3)


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_activation(name):
    check_operator(f"nn.functional.{name}", samples=4)


@pytest.mark.parametrize(
    "dtype, names",
    [
        (torch.int64, INTEGER),
        (torch.int64, COMPARISON),
        (torch.int64, " ".join(set(ARITHMETIC.split()) - {"lerp", "addcdiv", "ldexp"})),
        (torch.int64, "abs neg sign round sqrt exp sigmoid bitwise_not"),
        (torch.uint8, "add sub mul div:floor_rounding remainder abs sum clamp bitwise_right_shift"),
        (torch.bool, "add mul eq lt where logical_and bitwise_and maximum masked_fill sgn clone"),
        (torch.bfloat16, "add sub mul div:no_rounding_mode div:trunc_rounding pow exp lerp addcmul"),
    ],
)
def test_dtype(dtype, names):
    check_operators(sorted(names.split()), dtype)


def test_activations_in_bfloat16():
    names = "gelu silu mish softplus elu hardswish leaky_relu logsigmoid".split()
    check_operators([f"nn.functional.{name}" for name in names], torch.bfloat16)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize(
    "name",
    """sign.default sgn.default signbit.default round.default trunc.default frac.default nan_to_num.default relu.default
    isnan.default isfinite.default logical_not.default hardtanh.default hardsigmoid.default softplus.default
    log_sigmoid_forward.default logsumexp.default sinc.default abs.default sigmoid.default""".split(),
)
def test_special_values(name):
    arguments = ([0],) if name.startswith("logsumexp") else ()
    assert_lowering_matches(f"aten.{name}", torch.tensor(SPECIAL), *arguments)


@pytest.mark.parametrize(
    "name",
    """maximum.default minimum.default fmax.default fmin.default remainder.Tensor fmod.Tensor floor_divide.default
    copysign.Tensor hypot.default logaddexp.default xlogy.Tensor atan2.default heaviside.default pow.Tensor_Tensor
    clamp_min.Tensor eq.Tensor lt.Tensor""".split(),
)
def test_pairs_of_special_values(name):
    values = torch.tensor(SPECIAL)
    assert_lowering_matches(f"aten.{name}", values.unsqueeze(1).repeat(1, len(SPECIAL)), values)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, -2, 0.5, -0.5, 1.7, 2.0])
def test_pow_of_number(exponent):
    assert_lowering_matches("aten.pow.Tensor_Scalar", torch.rand(7) + 0.1, exponent)


def test_pow_of_integers_wraps_and_inverts():
    base = torch.arange(-4, 5).unsqueeze(1)
    exponent = torch.tensor([0, 1, 2, 5, 40, 63, 64, 101, -1, -2, -3])
    assert_lowering_matches("aten.pow.Tensor_Tensor", base[base != 0].unsqueeze(1), exponent)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("other", [2, 0.3, torch.tensor(2), torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
def test_promotion(dtype, other):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)

    def program():
        for operation in (torch.add, torch.mul, torch.div, torch.eq, torch.where):
            operation(values > 1, values, other) if operation is torch.where else operation(values, other)

    assert_program_matches(program)


def test_number_keeps_its_precision_against_bfloat16():
    # torch multiplies by the number itself and rounds once: 100 times 1.0049 is 100.49, and rounds to 100.5 only if
    # the number was not rounded to bfloat16, 1.0078, first.
    values = torch.full((3,), 100, dtype=torch.bfloat16)
    assert torch.ops.aten.mul.Tensor(values, 1.0049)[0] == 100.5
    assert_lowering_matches("aten.mul.Tensor", values, 1.0049, tolerance={"rtol": 0, "atol": 0})


def test_in_place_names():
    def program():
        values = torch.rand(3, 3) + 1
        values.pow_(torch.tensor(2.0)).floor_divide_(torch.tensor(0.25)).ldexp_(torch.tensor(2)).fill_diagonal_(7.0)
        values.transpose_(0, 1).copy_(torch.arange(3)).zero_()

    assert_program_matches(program)
