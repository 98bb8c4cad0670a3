"""Pointwise operators against torch, forward and backward."""

import pytest
import torch

from tests.pytorch.lower.harness import assert_lowering_matches, check_operator

UNARY = (
    "abs acos acosh asin asinh atan atanh bitwise_not ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 "
    "floor frac i0 isfinite isinf isnan isneginf isposinf lgamma log log10 log1p log2 logical_not logit nan_to_num neg "
    "positive rad2deg reciprocal round rsqrt sgn sigmoid sign signbit sin sinc sinh special.entr special.i0e "
    "special.i1 special.i1e special.log_ndtr special.ndtr special.ndtri sqrt square tan tanh trunc"
).split()
BINARY = (
    "__radd__ __rdiv__ __rmul__ __rpow__ __rsub__ add atan2 bitwise_and bitwise_left_shift bitwise_or "
    "bitwise_right_shift bitwise_xor copysign eq float_power floor_divide fmax fmin fmod ge gt heaviside hypot "
    "igamma igammac isclose le logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul ne "
    "nextafter pow remainder rsub special.xlog1py special.zeta sub true_divide xlogy gcd lcm __rmod__"
).split()
OTHER = "addcdiv addcmul clamp clamp_max clamp_min clone contiguous fill lerp masked_fill where zero_ to".split()
ACTIVATIONS = (
    "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 selu silu "
    "softplus softshrink softsign tanhshrink threshold"
).split()


@pytest.mark.parametrize("name", [*UNARY, *BINARY, *OTHER])
def test_operator(name):
    integers = {"bitwise_not", "gcd", "lcm", *(n for n in BINARY if n.startswith("bitwise"))}
    if name == "zero_":
        pytest.skip("in place only")
    check_operator(name, torch.int32 if name in integers else torch.float32)
