"""What most lowerings share: torch's type promotion and broadcasting, spelled in `jax.lax`.

Thousands of nodes are lowered for one step, so these stay on `lax` primitives, which cost about 15 us each to trace;
a `jnp` function costs several times as much.
"""

import math
import platform
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from trainingcompiler.targets.target import current as current_target

from .dtypes import jax_dtype, result_dtype

Array = jax.Array
Number = bool | int | float
Operand = Array | Number

BOOL, INT32, INT64 = jnp.dtype("bool"), jnp.dtype("int32"), jnp.dtype("int64")
FLOAT32 = jnp.dtype("float32")
HALVES = frozenset({jnp.dtype("float16"), jnp.dtype("bfloat16")})


def is_number(operand: object) -> bool:
    """Whether `operand` is a Python number rather than an array."""
    return isinstance(operand, bool | int | float | complex)


def is_float(dtype: jnp.dtype) -> bool:
    """Whether `dtype` is a real floating-point type, bfloat16 included."""
    return jnp.issubdtype(dtype, jnp.floating)


def constant(value: Number, dtype: jnp.dtype) -> np.ndarray:
    """`value` as a 0-d array: integers wrap and floats overflow to infinity, silently, as in torch."""
    with np.errstate(all="ignore"):
        return np.asarray(value).astype(dtype)


def cast(operand: Operand, dtype: jnp.dtype) -> Array:
    """`operand` as an array of `dtype`; the same array where it already is one."""
    if is_number(operand):
        return constant(operand, dtype)
    if operand.dtype == dtype:
        return operand
    if is_float(operand.dtype) and jnp.issubdtype(dtype, jnp.integer) and _is_x86():
        return _truncated(operand, dtype)
    return lax.convert_element_type(operand, dtype)


def _truncated(array: Array, dtype: jnp.dtype) -> Array:
    """An integer of each float, as torch's kernels for x86 make it: C++ leaves open what becomes of one out of range.

    The processor gives the lowest integer of 64 or 32 bits for all of these, and for NaN; a narrower integer is the low
    end of that. XLA gives the nearest integer, and 0 for NaN.
    """
    wide = INT64 if dtype == INT64 else INT32
    array = cast(array, opmath(array.dtype))
    limits = np.iinfo(wide)
    integers = lax.convert_element_type(array, wide)  # what is too low, is at the lowest
    is_below = lax.lt(array, constant(-float(limits.min), array.dtype))  # a power of two, which any float has exactly
    integers = lax.select(is_below, integers, lax.full_like(integers, limits.min))
    return integers if wide == dtype else lax.convert_element_type(integers, dtype)


def _is_x86() -> bool:
    """Whether the program is for a processor of that kind. On others, and on GPUs, torch has what XLA has."""
    target = current_target()
    return platform.machine() in ("x86_64", "AMD64") and (target is None or target.platform == "cpu")


def expand(array: Array, shape: Sequence[int]) -> Array:
    """`array` broadcast to `shape`, aligned at the last dimension."""
    if array.shape == tuple(shape):
        return array
    lead = len(shape) - array.ndim
    kept = [d for d in range(array.ndim) if array.shape[d] == shape[d + lead]]
    if len(kept) != array.ndim:
        array = lax.reshape(array, [array.shape[d] for d in kept])
    return lax.broadcast_in_dim(array, tuple(shape), [d + lead for d in kept])


def aligned(dtype: jnp.dtype, *operands: Operand) -> list[Array]:
    """The operands cast to `dtype` and broadcast against each other; 0-d ones stay 0-d where `lax` broadcasts them."""
    arrays = [cast(operand, dtype) for operand in operands]
    shapes = {array.shape for array in arrays if array.ndim}
    if len(shapes) <= 1:
        return arrays
    shape = np.broadcast_shapes(*shapes)
    return [expand(array, shape) if array.ndim else array for array in arrays]


def full(shape: Sequence[int], value: Number, dtype: jnp.dtype) -> Array:
    """An array of one repeated value."""
    return lax.broadcast(constant(value, dtype), tuple(shape))


def select(condition: Array, chosen: Operand, other: Operand) -> Array:
    """`chosen` where `condition` holds, `other` elsewhere, broadcast; arrays must agree in dtype, numbers follow."""
    dtype = next((x.dtype for x in (chosen, other) if not is_number(x)), FLOAT32)
    chosen, other = cast(chosen, dtype), cast(other, dtype)
    shape = np.broadcast_shapes(condition.shape, chosen.shape, other.shape)
    return lax.select(expand(condition, shape), expand(chosen, shape), expand(other, shape))


def opmath(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype torch computes in before it rounds to `dtype`."""
    return FLOAT32 if dtype in HALVES else dtype


def float_dtype(*operands: Operand) -> jnp.dtype:
    """The promoted dtype of `operands`, torch's default float dtype where that is not floating."""
    dtype = result_dtype(*operands)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax_dtype(torch.get_default_dtype())


def in_opmath(function: Callable[..., Array], dtype: jnp.dtype, *operands: Operand) -> Array:
    """`function` of the aligned operands in `opmath(dtype)`, rounded to `dtype`.

    Operands go straight to the wider type: torch does not round a Python number or 0-d tensor to 16 bits first.
    """
    return cast(function(*aligned(opmath(dtype), *operands)), dtype)


def wrap(dim: int, ndim: int) -> int:
    """A dimension counted from the front; a 0-d array has one, as in torch."""
    return dim + max(ndim, 1) if dim < 0 else dim


def wrap_all(dims: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The dimensions to reduce, sorted; None and an empty list mean all of them."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return tuple(range(ndim))
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted(wrap(dim, ndim) for dim in dims if ndim))


def iota(shape: Sequence[int], dim: int, dtype: jnp.dtype = INT64) -> Array:
    """Each element's own position along `dim`."""
    return lax.broadcasted_iota(dtype, tuple(shape), dim)


def size_of(shape: Sequence[int], dims: Sequence[int]) -> int:
    """The number of elements that a reduction over `dims` combines."""
    return math.prod(shape[dim] for dim in dims)
