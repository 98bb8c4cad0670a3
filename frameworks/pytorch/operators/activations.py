"""Activation functions and their gradients, as torch dispatches them on CPU.

All compute in float32 for 16-bit types. Inside, arrays and Python numbers meet in jnp operators, for the formulas'
sake: a step holds few of these nodes.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from .dtypes import result_dtype
from .promotion import Array, Number, cast, in_opmath, select, wrap
from .registry import lowers

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _formula(name: str, arrays: int) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Registers a formula whose first `arrays` arguments are arrays, to be computed in opmath."""

    def register(formula: Callable[..., Array]) -> Callable[..., Array]:
        def lowering(*args, **kwargs):
            operands, rest = args[:arrays], args[arrays:]
            return in_opmath(lambda *xs: formula(*xs, *rest, **kwargs), result_dtype(*operands), *operands)

        return lowers(f"aten.{name}.default")(lowering)

    return register


# --- piecewise linear ---


@lowers("aten.relu.default")
def relu(self: Array) -> Array:
    return lax.max(self, cast(0, self.dtype))


@lowers("aten.relu6.default")
def relu6(self: Array) -> Array:
    return hardtanh(self, 0, 6)


@lowers("aten.hardtanh.default")
def hardtanh(self: Array, min_val: Number = -1, max_val: Number = 1) -> Array:
    return lax.clamp(cast(min_val, self.dtype), self, cast(max_val, self.dtype))


@lowers("aten.hardtanh_backward.default")
def hardtanh_backward(grad: Array, self: Array, min_val: Number, max_val: Number) -> Array:
    outside = (self <= cast(min_val, self.dtype)) | (self >= cast(max_val, self.dtype))
    return select(outside, 0, grad)


@lowers("aten.threshold.default")
def threshold(self: Array, threshold: Number, value: Number) -> Array:
    return select(lax.le(self, cast(threshold, self.dtype)), value, self)


@lowers("aten.threshold_backward.default")
def threshold_backward(grad: Array, self: Array, threshold: Number) -> Array:
    return select(lax.le(self, cast(threshold, self.dtype)), 0, grad)


@_formula("leaky_relu", 1)
def leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    return select(x > 0, x, x * negative_slope)


@_formula("leaky_relu_backward", 2)
def leaky_relu_backward(grad: Array, x: Array, negative_slope: float, self_is_result: bool) -> Array:
    return select(x > 0, grad, grad * negative_slope)


@_formula("_prelu_kernel", 2)
def prelu(x: Array, weight: Array) -> Array:
    return select(x > 0, x, x * weight)


@lowers("aten._prelu_kernel_backward.default")
def prelu_backward(grad: Array, self: Array, weight: Array) -> tuple[Array, Array]:
    def to_self(grad, x, weight):
        return select(x > 0, grad, grad * weight)

    def to_weight(grad, x):
        return select(x > 0, 0, grad * x)

    return in_opmath(to_self, grad.dtype, grad, self, weight), in_opmath(to_weight, grad.dtype, grad, self)


@_formula("softshrink", 1)
def softshrink(x: Array, lambd: float = 0.5) -> Array:
    # The last term is 0 inside the band and keeps NaN.
    return select(x > lambd, x - lambd, select(x < -lambd, x + lambd, x * 0))


@_formula("hardshrink", 1)
def hardshrink(x: Array, lambd: float = 0.5) -> Array:
    return select((x >= -lambd) & (x <= lambd), 0, x)


@_formula("softshrink_backward", 2)
def softshrink_backward(grad: Array, x: Array, lambd: float) -> Array:
    return select((x >= -lambd) & (x <= lambd), 0, grad)


@_formula("hardshrink_backward", 2)
def hardshrink_backward(grad: Array, x: Array, lambd: float) -> Array:
    return select((x >= -lambd) & (x <= lambd), 0, grad)


@_formula("hardsigmoid", 1)
def hardsigmoid(x: Array) -> Array:
    return lax.clamp(cast(0, x.dtype), x + 3, cast(6, x.dtype)) / 6


_SIXTH = float(np.float32(1) / np.float32(6))  # torch's kernel has it so for float64 too


@_formula("hardsigmoid_backward", 2)
def hardsigmoid_backward(grad: Array, x: Array) -> Array:
    return select((x > -3) & (x < 3), grad * _SIXTH, 0)


@_formula("hardswish", 1)
def hardswish(x: Array) -> Array:
    return x * lax.clamp(cast(0, x.dtype), x + 3, cast(6, x.dtype)) / 6


@_formula("hardswish_backward", 2)
def hardswish_backward(grad: Array, x: Array) -> Array:
    return select(x <= -3, 0, select(x < 3, grad * (x / 3 + 0.5), grad))


# --- exponential ---


@_formula("sigmoid_backward", 2)
def sigmoid_backward(grad: Array, output: Array) -> Array:
    return grad * (1 - output) * output


@_formula("tanh_backward", 2)
def tanh_backward(grad: Array, output: Array) -> Array:
    return grad * (1 - output * output)


@_formula("logit_backward", 2)
def logit_backward(grad: Array, x: Array, eps: float | None = None) -> Array:
    slope = grad / (x * (1 - x))
    if eps is None:
        return select((x < 0) | (x > 1), math.nan, slope)
    return select((x < eps) | (x > 1 - eps), 0, slope)


@_formula("silu", 1)
def silu(x: Array) -> Array:
    return x * lax.logistic(x)


@_formula("silu_backward", 2)
def silu_backward(grad: Array, x: Array) -> Array:
    sigmoid = lax.logistic(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _log1p_exp(x: Array) -> Array:
    return lax.max(x, cast(0, x.dtype)) + lax.log1p(lax.exp(-lax.abs(x)))


@_formula("mish", 1)
def mish(x: Array) -> Array:
    return x * lax.tanh(_log1p_exp(x))


@_formula("mish_backward", 2)
def mish_backward(grad: Array, x: Array) -> Array:
    gate = lax.tanh(_log1p_exp(x))
    return grad * (gate + x * lax.logistic(x) * (1 - gate * gate))


@_formula("softplus", 1)
def softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    scaled = x * beta
    return select(scaled > threshold, x, lax.log1p(lax.exp(scaled)) / beta)


@_formula("softplus_backward", 2)
def softplus_backward(grad: Array, x: Array, beta: float, threshold: float) -> Array:
    scaled = x * beta
    return select(scaled > threshold, grad, grad * lax.logistic(scaled))


@_formula("log_sigmoid_backward", 2)
def log_sigmoid_backward(grad: Array, x: Array, buffer: Array) -> Array:
    return grad * lax.logistic(-x)  # torch's own formula reads the buffer, which is empty on other devices.


@lowers("aten.log_sigmoid_forward.default")
def log_sigmoid_forward(self: Array) -> tuple[Array, Array]:
    """Returns the result and the buffer that torch keeps for the gradient on CPU, exp(-|x|)."""
    output = in_opmath(lambda x: -_log1p_exp(-x), self.dtype, self)
    return output, in_opmath(lambda x: lax.exp(-lax.abs(x)), self.dtype, self)


@_formula("elu", 1)
def elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    return select(x < 0, lax.expm1(x * input_scale) * (alpha * scale), x * scale)


@lowers("aten.celu.default")
def celu(self: Array, alpha: float = 1) -> Array:
    return elu(self, alpha, 1, 1 / alpha)


@lowers("aten.selu.default")
def selu(self: Array) -> Array:
    return elu(self, _SELU_ALPHA, _SELU_SCALE)


@lowers("aten.elu_backward.default")
def elu_backward(
    grad: Array, alpha: float, scale: float, input_scale: float, is_result: bool, self_or_result: Array
) -> Array:
    def compute(grad, x):
        exponential = x + alpha * scale if is_result else lax.exp(x * input_scale) * (alpha * scale)
        return select(x <= 0, grad * input_scale * exponential, grad * scale)

    return in_opmath(compute, grad.dtype, grad, self_or_result)


# --- gated ---

_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


@_formula("gelu", 1)
def gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "none":
        return x * 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
    return x * 0.5 * (1 + lax.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x)))


@_formula("gelu_backward", 2)
def gelu_backward(grad: Array, x: Array, approximate: str = "none") -> Array:
    if approximate == "none":
        distribution = 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
        density = lax.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi)
        return grad * (distribution + x * density)
    gate = lax.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x))
    slope = _TANH_SCALE * (1 + 3 * _TANH_CUBIC * x * x)
    return grad * 0.5 * (1 + gate + x * (1 - gate * gate) * slope)


def _halves(self: Array, dim: int) -> tuple[Array, Array]:
    dim = wrap(dim, self.ndim)
    middle = self.shape[dim] // 2
    return (
        lax.slice_in_dim(self, 0, middle, axis=dim),
        lax.slice_in_dim(self, middle, None, axis=dim),
    )


@lowers("aten.glu.default")
def glu(self: Array, dim: int = -1) -> Array:
    return in_opmath(lambda value, gate: value * lax.logistic(gate), self.dtype, *_halves(self, dim))


@lowers("aten.glu_backward.default")
def glu_backward(grad: Array, self: Array, dim: int) -> Array:
    def compute(grad, value, gate):
        gate = lax.logistic(gate)
        return jnp.concatenate([grad * gate, grad * value * gate * (1 - gate)], axis=dim)

    return in_opmath(compute, self.dtype, grad, *_halves(self, dim))
