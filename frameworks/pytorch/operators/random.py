"""Random draws: bits hashed from positions, under a key that no other node of the program has.

Every function registered here takes `key`, a 0-d uint64 array (see `node_key`), besides the overload's own arguments.
The values are not torch's, their distributions are.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .dtypes import jax_dtype
from .promotion import (
    BOOL,
    INT32,
    INT64,
    Array,
    Number,
    cast,
    constant,
    expand,
    float_dtype,
    full,
    iota,
    is_float,
    is_number,
    opmath,
    select,
)
from .registry import lowers, lowers_random
from .value_checks import require, require_between

UINT64 = jnp.dtype("uint64")
FLOAT64 = jnp.dtype("float64")

_GOLDEN = 0x9E3779B97F4A7C15
_MIXING = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)


def node_key(seed: Array, index: int) -> Array:
    """The key of one node's draw.

    Args:
        seed: 0-d int64, drawn anew for each run of the program.
        index: The node's position in the program.

    Returns:
        A 0-d uint64 array: splitmix64 of the seed, stepped to `index` and mixed again, so that neither neighbouring
        seeds nor neighbouring nodes have related keys.
    """
    start = _mix(lax.add(cast(seed, UINT64), np.uint64(_GOLDEN)))
    return _mix(lax.add(start, np.uint64((index + 1) * _GOLDEN % 2**64)))


def keyed(seed: int, index: int) -> np.uint64:
    """`node_key` of a seed that is known, outside of any program."""
    start = _mixed((seed + _GOLDEN) % 2**64)
    return np.uint64(_mixed((start + (index + 1) * _GOLDEN) % 2**64))


def _mixed(z: int) -> int:
    for shift, factor in _MIXING:
        z = ((z ^ (z >> shift)) * factor) % 2**64
    return z ^ (z >> 31)


def _mix(z: Array) -> Array:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014), a bijection of 64 bits."""
    for shift, factor in _MIXING:
        z = lax.mul(lax.bitwise_xor(z, lax.shift_right_logical(z, np.uint64(shift))), np.uint64(factor))
    return lax.bitwise_xor(z, lax.shift_right_logical(z, np.uint64(31)))


# --- bits and numbers ---


def _bits(key: Array, shape: Sequence[int]) -> Array:
    """64 random bits for each element, a function of the key and of the element's own position.

    Counting and mixing is elementwise, so that XLA fuses it into what uses the bits and partitions it like any other
    operation, to the same values; XLA:CPU's own generators take 10 to 50 times as long. The second round keeps two
    keys from sharing a stretch of one sequence.
    """
    position = full(shape, 0, UINT64)
    for dim, stride in enumerate(_strides(shape)):
        position = lax.add(position, lax.mul(iota(shape, dim, UINT64), np.uint64(stride)))
    counter = lax.add(lax.mul(position, np.uint64(_GOLDEN)), key)
    return _mix(lax.bitwise_xor(_mix(counter), _mix(lax.bitwise_not(key))))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _digits(dtype: jnp.dtype) -> int:
    """The significant bits of a floating-point dtype."""
    return jnp.finfo(dtype).nmant + 1


def _integers(key: Array, shape: Sequence[int], digits: int) -> Array:
    """Whole numbers of `digits` random bits, in the narrowest signed type that holds twice as much."""
    bits = lax.shift_right_logical(_bits(key, shape), np.uint64(64 - digits))
    return lax.convert_element_type(bits, INT32 if digits < 31 else INT64)


def _uniform(key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Uniform on [0, 1), on the grid of the dtype's resolution below 1, so that nothing rounds up to 1."""
    digits = _digits(dtype)
    return cast(_integers(key, shape, digits), dtype) * constant(2.0**-digits, dtype)


def _positive_uniform(key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Uniform on (0, 1]."""
    digits = _digits(dtype)
    return cast(_integers(key, shape, digits) + 1, dtype) * constant(2.0**-digits, dtype)


def _normal(key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Standard normal, in float32 or wider."""
    wide = opmath(dtype)
    digits = _digits(wide)
    # An odd numerator: symmetric about 0, exact in `wide`, and never the -1 or 1 whose quantile is infinite.
    numerator = 2 * _integers(key, shape, digits) + 1 - (1 << digits)
    return lax.erf_inv(cast(numerator, wide) * constant(2.0**-digits, wide)) * constant(math.sqrt(2), wide)


def _below(key: Array, shape: Sequence[int], span: int | Array) -> Array:
    """Whole numbers on [0, span) as uint64; the bias is at most span / 2**64, as in torch."""
    bits = _bits(key, shape)
    if is_number(span) and span >= 1 << 64:
        return bits
    return lax.rem(bits, expand(cast(span, UINT64), bits.shape))


def _default(dtype: torch.dtype | None) -> jnp.dtype:
    return jax_dtype(torch.get_default_dtype() if dtype is None else dtype)


def _like(array: Array, dtype: torch.dtype | None) -> jnp.dtype:
    return array.dtype if dtype is None else jax_dtype(dtype)


# --- creation ---


@lowers_random("aten.rand.default", "aten.rand.generator")
def rand(size: Sequence[int], *, key: Array, dtype: torch.dtype | None = None, **ignored: object) -> Array:
    return _uniform(key, size, _default(dtype))


@lowers_random("aten.randn.default", "aten.randn.generator")
def randn(size: Sequence[int], *, key: Array, dtype: torch.dtype | None = None, **ignored: object) -> Array:
    return cast(_normal(key, size, _default(dtype)), _default(dtype))


@lowers_random("aten.rand_like.default", "aten.rand_like.generator")
def rand_like(self: Array, *, key: Array, dtype: torch.dtype | None = None, **ignored: object) -> Array:
    return _uniform(key, self.shape, _like(self, dtype))


@lowers_random("aten.randn_like.default", "aten.randn_like.generator")
def randn_like(self: Array, *, key: Array, dtype: torch.dtype | None = None, **ignored: object) -> Array:
    return cast(_normal(key, self.shape, _like(self, dtype)), _like(self, dtype))


def _random_integers(key: Array, shape: Sequence[int], low: int, high: int | Array, dtype: jnp.dtype) -> Array:
    span = high - low
    offset = lax.bitcast_convert_type(_below(key, shape, span), INT64)
    return cast(offset + constant(low, offset.dtype), dtype)


@lowers_random("aten.randint.default", "aten.randint.generator")
def randint(
    high: int, size: Sequence[int], *, key: Array, dtype: torch.dtype | None = torch.int64, **ignored: object
) -> Array:
    return _random_integers(key, size, 0, high, jax_dtype(dtype or torch.int64))


@lowers_random("aten.randint.low", "aten.randint.low_generator")
def randint_low(
    low: int,
    high: int,
    size: Sequence[int],
    *,
    key: Array,
    dtype: torch.dtype | None = torch.int64,
    **ignored: object,
) -> Array:
    return _random_integers(key, size, low, high, jax_dtype(dtype or torch.int64))


@lowers_random(
    "aten.randint_like.default",
    "aten.randint_like.generator",
    "aten.randint_like.Tensor",
    "aten.randint_like.Tensor_generator",
)
def randint_like(
    self: Array, high: int | Array, *, key: Array, dtype: torch.dtype | None = None, **ignored: object
) -> Array:
    return _random_integers(key, self.shape, 0, high, _like(self, dtype))


@lowers_random("aten.randint_like.low_dtype", "aten.randint_like.low_generator_dtype")
def randint_like_low(
    self: Array, low: int, high: int, *, key: Array, dtype: torch.dtype | None = None, **ignored: object
) -> Array:
    return _random_integers(key, self.shape, low, high, _like(self, dtype))


@lowers_random("aten.randperm.default", "aten.randperm.generator")
def randperm(n: int, *, key: Array, dtype: torch.dtype | None = torch.int64, **ignored: object) -> Array:
    places = lax.iota(jax_dtype(dtype or torch.int64), n)
    return lax.sort_key_val(_bits(key, (n,)), places)[1]


# --- normal ---


def _normal_like(
    mean: Number | Array, std: Number | Array, shape: Sequence[int], dtype: jnp.dtype, key: Array
) -> Array:
    z = _normal(key, shape, dtype)
    mean, std = (expand(cast(moment, z.dtype), tuple(shape)) for moment in (mean, std))
    return cast(z * std + mean, dtype)


@lowers_random("aten.normal.Tensor_float")
def normal_around(mean: Array, std: float = 1.0, *, key: Array, **ignored: object) -> Array:
    return _normal_like(mean, std, mean.shape, mean.dtype, key)


@lowers_random("aten.normal.float_Tensor")
def normal_with(mean: float, std: Array, *, key: Array, **ignored: object) -> Array:
    return _normal_like(mean, std, std.shape, std.dtype, key)


@lowers_random("aten.normal.Tensor_Tensor")
def normal_around_with(mean: Array, std: Array, *, key: Array, **ignored: object) -> Array:
    return _normal_like(mean, std, np.broadcast_shapes(mean.shape, std.shape), mean.dtype, key)


@lowers_random("aten.normal.float_float")
def normal_sized(
    mean: float, std: float, size: Sequence[int], *, key: Array, dtype: torch.dtype | None = None, **ignored: object
) -> Array:
    return _normal_like(mean, std, size, _default(dtype), key)


@lowers_random("aten.normal_functional.default", "aten.normal.default")
def normal(self: Array, mean: float = 0.0, std: float = 1.0, *, key: Array, **ignored: object) -> Array:
    return _normal_like(mean, std, self.shape, self.dtype, key)


@lowers_random("aten.log_normal.default")
def log_normal(self: Array, mean: float = 1.0, std: float = 2.0, *, key: Array, **ignored: object) -> Array:
    return cast(lax.exp(_normal_like(mean, std, self.shape, opmath(self.dtype), key)), self.dtype)


# --- other continuous distributions ---


@lowers_random("aten.uniform.default")
def uniform(self: Array, low: float = 0.0, to: float = 1.0, *, key: Array, **named: Any) -> Array:
    """Uniform on [low, to); the schema calls the first bound `from`, which Python cannot."""
    low = named.get("from", low)
    wide = opmath(self.dtype)
    return cast(cast(_uniform(key, self.shape, self.dtype), wide) * _at(to - low, wide) + _at(low, wide), self.dtype)


def _at(value: Number | Array, dtype: jnp.dtype) -> Array:
    return cast(value, dtype)


def _exponential(key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Exponential of rate 1, never 0, since its logarithm is what Gumbel noise is made of."""
    digits = _digits(dtype)
    return lax.max(-lax.log(_positive_uniform(key, shape, dtype)), constant(2.0 ** -(digits + 1), dtype))


@lowers_random("aten.exponential.default")
def exponential(self: Array, lambd: float = 1.0, *, key: Array, **ignored: object) -> Array:
    wide = opmath(self.dtype)
    return cast(_exponential(key, self.shape, wide) / _at(lambd, wide), self.dtype)


@lowers_random("aten.cauchy.default")
def cauchy(self: Array, median: float = 0.0, sigma: float = 1.0, *, key: Array, **ignored: object) -> Array:
    wide = opmath(self.dtype)
    angle = (_uniform(key, self.shape, wide) - 0.5) * math.pi
    return cast(lax.tan(angle) * _at(sigma, wide) + _at(median, wide), self.dtype)


# --- discrete distributions ---


@lowers_random("aten.geometric.default")
def geometric(self: Array, p: float, *, key: Array, **ignored: object) -> Array:
    wide = opmath(self.dtype) if is_float(self.dtype) else FLOAT64
    trials = lax.ceil(lax.log(_positive_uniform(key, self.shape, wide)) / lax.log1p(-_at(p, wide)))
    return cast(lax.max(trials, constant(1, wide)), self.dtype)


@lowers_random("aten.random.default")
def random(self: Array, *, key: Array, **ignored: object) -> Array:
    """Every whole number that the dtype holds exactly, from 0 up, alike."""
    largest = 1 << _digits(self.dtype) if is_float(self.dtype) else _largest(self.dtype)
    return _random_integers(key, self.shape, 0, largest + 1, self.dtype)


def _largest(dtype: jnp.dtype) -> int:
    return 1 if dtype == BOOL else int(jnp.iinfo(dtype).max)


@lowers_random("aten.random.to")
def random_to(self: Array, to: int, *, key: Array, **ignored: object) -> Array:
    return _random_integers(key, self.shape, 0, to, self.dtype)


@lowers_random("aten.random.from")
def random_from(self: Array, low: int, to: int | None, *, key: Array, **ignored: object) -> Array:
    if to is None:
        to = (1 << _digits(self.dtype) if is_float(self.dtype) else _largest(self.dtype)) + 1
    return _random_integers(key, self.shape, low, to, self.dtype)


def _bernoulli(key: Array, shape: Sequence[int], p: Number | Array) -> Array:
    """A mask that holds with probability `p`, to a float64's own resolution for numbers, to 2**-24 for tensors."""
    if not is_number(p):
        wide = opmath(p.dtype)
        require_between(p, 0, 1)
        return lax.lt(_uniform(key, shape, wide), expand(cast(p, wide), tuple(shape)))
    threshold = round(p * 2**64)
    if threshold >= 2**64:
        return full(shape, True, BOOL)
    return lax.lt(_bits(key, shape), np.uint64(threshold))


@lowers_random("aten.bernoulli.p", "aten.bernoulli.Tensor", "aten.bernoulli.float")
def bernoulli(self: Array, p: float | Array = 0.5, *, key: Array, **ignored: object) -> Array:
    return cast(_bernoulli(key, self.shape, p), self.dtype)


@lowers_random("aten.bernoulli.default")
def bernoulli_of(self: Array, *, key: Array, **ignored: object) -> Array:
    return cast(_bernoulli(key, self.shape, self), self.dtype)


@lowers_random("aten.multinomial.default")
def multinomial(self: Array, num_samples: int, replacement: bool = False, *, key: Array, **ignored: object) -> Array:
    weights = cast(self, opmath(self.dtype))
    axis = weights.ndim - 1
    require_between(weights, 0, float(jnp.finfo(weights.dtype).max))
    require(lax.gt(lax.reduce_sum(weights, (axis,)), constant(0, weights.dtype)))
    if replacement:
        cumulative = lax.cumsum(weights, axis)
        total = lax.slice_in_dim(cumulative, weights.shape[axis] - 1, weights.shape[axis], axis=axis)
        draws = _uniform(key, (*weights.shape[:-1], num_samples), weights.dtype) * total
        passed = lax.le(*(jnp.expand_dims(cumulative, -2), jnp.expand_dims(draws, -1)))
        return lax.min(lax.reduce_sum(cast(passed, INT64), (axis + 1,)), constant(weights.shape[axis] - 1, INT64))
    # The category whose exponential clock of rate `weight` rings first, then the next: sampling without replacement.
    rates = weights / _exponential(key, weights.shape, weights.dtype)
    return cast(lax.top_k(rates, num_samples)[1], INT64)


# --- dropout ---


@lowers_random("aten.native_dropout.default")
def native_dropout(input: Array, p: float, train: bool | None, *, key: Array) -> tuple[Array, Array]:
    if train is False:
        return input, full(input.shape, True, BOOL)
    mask = _bernoulli(key, input.shape, 1 - p)
    return native_dropout_backward(input, mask, 0.0 if p == 1 else 1 / (1 - p)), mask


@lowers("aten.native_dropout_backward.default")
def native_dropout_backward(grad_output: Array, mask: Array, scale: float) -> Array:
    target = float_dtype(grad_output)
    wide = opmath(target)
    return cast(cast(grad_output, wide) * cast(mask, wide) * _at(scale, wide), target)


@lowers_random("aten.rrelu_with_noise_functional.default")
def rrelu_with_noise(
    self: Array,
    noise: Array,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
    *,
    key: Array,
) -> tuple[Array, Array]:
    negative = self <= 0
    if not training:
        return select(negative, self * _at((lower + upper) / 2, self.dtype), self), noise
    wide = opmath(self.dtype)
    slopes = _uniform(key, self.shape, wide) * _at(upper - lower, wide) + _at(lower, wide)
    noise = select(negative, cast(slopes, self.dtype), 1)
    return self * noise, noise


@lowers("aten.rrelu_with_noise_backward.default")
def rrelu_with_noise_backward(
    grad_output: Array,
    self: Array,
    noise: Array,
    lower: float,
    upper: float,
    training: bool,
    self_is_result: bool,
) -> Array:
    if training and upper - lower > 1e-6:
        return grad_output * noise
    return select(self > 0, grad_output, grad_output * _at((lower + upper) / 2, self.dtype))
