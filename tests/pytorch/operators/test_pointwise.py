"""Pointwise operators and activations against torch, forward and backward."""

import math

import pytest
import torch

from tests.pytorch.operators.harness import assert_lowering_matches, assert_program_matches, check_operators

ARITHMETIC = """
    __radd__ __rdiv__ __rmod__ __rmul__ __rsub__ add clamp clamp_max clamp_min div:floor_rounding div:no_rounding_mode
    div:trunc_rounding floor_divide fmax fmin fmod max:binary maximum min:binary minimum mul remainder rsub sub
    true_divide
"""
FLOAT_ARITHMETIC = "__rpow__ addcdiv addcmul float_power ldexp lerp pow"
COMPARISON = """
    eq fill ge gt heaviside isclose isfinite isin isinf isnan isneginf isposinf le logical_and logical_not logical_or
    logical_xor lt masked_fill nan_to_num ne to where
"""
INTEGER = """
    abs neg sign round sqrt exp bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    gcd lcm pow
"""
BINARY = "atan2 copysign hypot igamma igammac logaddexp logaddexp2 nextafter special.xlog1py special.zeta xlogy"
UNARY = """
    abs acos acosh angle asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac
    lgamma log log10 log1p log2 logit mvlgamma:mvlgamma_p_3 neg rad2deg reciprocal round round:decimals_3
    round:decimals_neg_3 rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc
"""
SPECIAL_FUNCTIONS = "i0 special.entr special.i0e special.i1 special.i1e special.log_ndtr special.ndtr special.ndtri"
ACTIVATIONS = """
    nn.functional.celu nn.functional.elu nn.functional.gelu nn.functional.glu nn.functional.hardshrink
    nn.functional.hardsigmoid nn.functional.hardswish nn.functional.hardtanh nn.functional.leaky_relu
    nn.functional.logsigmoid nn.functional.mish nn.functional.prelu nn.functional.relu nn.functional.relu6
    nn.functional.selu nn.functional.silu nn.functional.softplus nn.functional.softshrink nn.functional.softsign
    nn.functional.tanhshrink nn.functional.threshold
"""


@pytest.mark.parametrize(
    "names", [ARITHMETIC, FLOAT_ARITHMETIC, COMPARISON, BINARY, UNARY, SPECIAL_FUNCTIONS, ACTIVATIONS]
)
def test_float32(names):
    check_operators(names, torch.float32, samples=4)


@pytest.mark.parametrize("names", [ARITHMETIC, COMPARISON, INTEGER])
def test_int64(names):
    check_operators(names, torch.int64)


def test_uint8():
    check_operators("add sub mul div:floor_rounding remainder abs clamp", torch.uint8)


def test_bool():
    check_operators("add mul eq lt where logical_and bitwise_and maximum sgn", torch.bool)


@pytest.mark.parametrize("names", [ARITHMETIC, FLOAT_ARITHMETIC, "exp sqrt tanh", ACTIVATIONS])
def test_bfloat16(names):
    check_operators(names, torch.bfloat16)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, math.inf, -math.inf, math.nan]


UNARY_OVERLOADS = """
    abs angle frac hardshrink hardsigmoid hardtanh isfinite isnan log_sigmoid_forward logical_not nan_to_num relu round
    sgn sigmoid sign signbit sinc softplus softshrink trunc
"""


@pytest.mark.parametrize("name", UNARY_OVERLOADS.split())
def test_special_values(name):
    assert_lowering_matches(f"aten.{name}.default", torch.tensor(SPECIAL))


BINARY_OVERLOADS = """
    atan2.default clamp_min.Tensor copysign.Tensor eq.Tensor floor_divide.default fmax.default fmin.default fmod.Tensor
    heaviside.default hypot.default logaddexp.default lt.Tensor maximum.default minimum.default pow.Tensor_Tensor
    remainder.Tensor xlogy.Tensor
"""


@pytest.mark.parametrize("name", BINARY_OVERLOADS.split())
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


@pytest.mark.parametrize("weight", [0.1, 0.9, 0.5, -0.7])
def test_lerp_of_number(weight):
    assert_lowering_matches("aten.lerp.Scalar", torch.randn(5), torch.randn(5), weight)


OUT_OF_RANGE = [1e30, -1e30, math.nan, math.inf, -math.inf, 3e9, -3e9, 9.3e18, 70000.5, 300.7, -300.7, -1.5, 0.5]


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integers_of_floats_out_of_range_are_torchs(source, integer):
    values = torch.tensor(OUT_OF_RANGE, dtype=source)
    assert_program_matches(lambda: values.to(integer))
    assert_program_matches(lambda: values[0].to(integer))


def test_hardsigmoids_gradient_has_torchs_own_sixth():
    """1/6 in float32, whatever the dtype: 3e-8 off, which is no rounding in float64."""
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    gradient = torch.full_like(x, 0.7)
    assert_lowering_matches("aten.hardsigmoid_backward.default", gradient, x, tolerance={"rtol": 1e-15, "atol": 0})
