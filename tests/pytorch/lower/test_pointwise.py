"""Pointwise operators and activations against torch, forward and backward."""

import math

import pytest
import torch

from tests.pytorch.lower.harness import assert_lowering_matches, assert_program_matches, check_operators

ARITHMETIC = """
    __radd__ __rdiv__ __rmod__ __rmul__ __rsub__ add clamp clamp_max clamp_min div:floor_rounding div:no_rounding_mode
    div:trunc_rounding floor_divide fmax fmin fmod max:binary maximum min:binary minimum mul remainder rsub sub
    true_divide
""".split()
FLOAT_ARITHMETIC = "__rpow__ addcdiv addcmul float_power ldexp lerp pow".split()
COMPARISON = """
    eq fill ge gt heaviside isclose isfinite isin isinf isnan isneginf isposinf le logical_and logical_not logical_or
    logical_xor lt masked_fill nan_to_num ne to where
""".split()
INTEGER = "bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor gcd lcm pow".split()
BINARY = "atan2 copysign hypot igamma igammac logaddexp logaddexp2 nextafter special.xlog1py special.zeta xlogy".split()
UNARY = """
    abs acos acosh angle asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac
    lgamma log log10 log1p log2 logit mvlgamma:mvlgamma_p_3 neg rad2deg reciprocal round round:decimals_3
    round:decimals_neg_3 rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc
""".split()
SPECIAL_FUNCTIONS = """
    i0 special.entr special.i0e special.i1 special.i1e special.log_ndtr special.ndtr special.ndtri
""".split()
ACTIVATIONS = [
    f"nn.functional.{name}"
    for name in """
        celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 selu silu
        softplus softshrink softsign tanhshrink threshold
    """.split()
]


@pytest.mark.parametrize(
    "names", [ARITHMETIC, FLOAT_ARITHMETIC, COMPARISON, BINARY, UNARY[:24], UNARY[24:], SPECIAL_FUNCTIONS, ACTIVATIONS]
)
def test_float32(names):
    check_operators(names, torch.float32, samples=5)


@pytest.mark.parametrize("names", [ARITHMETIC, COMPARISON, INTEGER, ["abs", "neg", "sign", "round", "sqrt", "exp"]])
def test_int64(names):
    check_operators(names, torch.int64)


def test_uint8():
    check_operators(["add", "sub", "mul", "div:floor_rounding", "remainder", "abs", "clamp"], torch.uint8)


def test_bool():
    check_operators(["add", "mul", "eq", "lt", "where", "logical_and", "bitwise_and", "maximum", "sgn"], torch.bool)


@pytest.mark.parametrize("names", [ARITHMETIC, FLOAT_ARITHMETIC, ["exp", "sqrt", "tanh", *ACTIVATIONS]])
def test_bfloat16(names):
    check_operators(names, torch.bfloat16)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize(
    "name",
    """sign sgn signbit round trunc frac nan_to_num relu isnan isfinite logical_not hardtanh hardsigmoid softplus
    log_sigmoid_forward sinc abs sigmoid softshrink hardshrink angle""".split(),
)
def test_special_values(name):
    assert_lowering_matches(f"aten.{name}.default", torch.tensor(SPECIAL))


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
