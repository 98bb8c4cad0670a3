"""Scaled dot-product attention, forward and backward, met whole before it decomposes.

For an NVIDIA GPU it is cuDNN's flash attention, which never holds the (B, H, L, S) scores; elsewhere, and for what
cuDNN does not take, the scores are computed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from trainingcompiler.targets.target import current as current_target

from .dtypes import jax_dtype
from .matmul import product
from .promotion import HALVES, Array, cast, constant, expand, iota, opmath, select, wrap
from .registry import lowers
from .sharding_constraints import heads

_BATCH = ((0, 1), (0, 1))


def _grouped(query: Array, key: Array) -> Array:
    """The query heads that share a key head, one below the other: (B, H, L, E) -> (B, H of key, group * L, E)."""
    batch, width = query.shape[0], query.shape[3]
    heads = key.shape[1]
    return lax.reshape(query, (batch, heads, query.shape[1] // heads * query.shape[2], width))


def _scores(query: Array, key: Array, mask: Array | None, is_causal: bool, scale: float | None) -> Array:
    """(B, H, L, S) masked scores, in float32 or wider."""
    scores = product(_grouped(query, key), key, ((3,), (3,)), _BATCH)
    scores = lax.reshape(scores, (*query.shape[:3], key.shape[2]))
    scores = scores * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if is_causal:
        corner = scores.shape[2:]
        future = lax.gt(iota(corner, 1, jnp.dtype("int32")), iota(corner, 0, jnp.dtype("int32")))
        scores = select(future, -math.inf, scores)
    if mask is not None:
        mask = expand(mask, scores.shape)
        scores = select(mask, scores, -math.inf) if mask.dtype == bool else scores + cast(mask, scores.dtype)
    return scores


@lowers("aten._scaled_dot_product_flash_attention_for_cpu.default")
def attention(
    query: Array,
    key: Array,
    value: Array,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Attention of (B, H, L, E) queries to (B, H or a divisor of it, S, E) keys and values.

    Returns:
        The (B, H, L, E) result, and the (B, H, L) logarithm of the softmax's denominator, in float32 or wider.
    """
    query, key, value = map(heads, (query, key, value))
    if _fused_applies(query, key, value, attn_mask, is_causal):
        return _fused(query, key, value, attn_mask, is_causal, scale)
    scores = _scores(query, key, attn_mask, is_causal, scale)
    largest = lax.reduce_max(scores, (3,))
    largest = select(largest == -math.inf, 0, largest)  # a row with every key masked
    weights = lax.exp(scores - lax.expand_dims(largest, (3,)))
    total = lax.reduce_sum(weights, (3,))
    mixed = product(_grouped(cast(weights, value.dtype), key), value, ((3,), (2,)), _BATCH)
    mixed = lax.reshape(mixed, (*query.shape[:3], value.shape[3]))
    result = mixed / lax.expand_dims(select(total == 0, 1, total), (3,))
    return cast(result, query.dtype), largest + lax.log(total)


@lowers("aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
def attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    logsumexp: Array,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    grad_out, query, key, value = map(heads, (grad_out, query, key, value))
    if _fused_applies(query, key, value, attn_mask, is_causal):
        return _fused_backward(grad_out, query, key, value, attn_mask, is_causal, scale)
    scores = _scores(query, key, attn_mask, is_causal, scale)
    weights = lax.exp(scores - lax.expand_dims(select(logsumexp == -math.inf, 0, logsumexp), (3,)))
    wide = weights.dtype
    own = lax.reduce_sum(cast(grad_out, wide) * cast(out, wide), (3,))

    grads = _grouped(grad_out, key)
    grad_weights = lax.reshape(product(grads, value, ((3,), (3,)), _BATCH), weights.shape)
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    grad_scores = weights * (grad_weights - lax.expand_dims(own, (3,))) * factor

    weights, grad_scores = (_grouped(cast(array, query.dtype), key) for array in (weights, grad_scores))
    grad_query = lax.reshape(product(grad_scores, key, ((3,), (2,)), _BATCH), query.shape)
    grad_key = product(grad_scores, _grouped(query, key), ((2,), (2,)), _BATCH)
    grad_value = product(weights, grads, ((2,), (2,)), _BATCH)
    return cast(grad_query, query.dtype), cast(grad_key, key.dtype), cast(grad_value, value.dtype)


# --- cuDNN ---

# cuDNN subtracts masked scores from each other: minus infinity, or the least finite number, would give NaN. These are
# what JAX masks with.
_LEAST = {jnp.dtype("bfloat16"): -(2.0**41), jnp.dtype("float16"): -(2.0**15)}
_IMPLEMENTATION: Any = "cudnn"  # tests on a CPU take "xla", which means the same


def _fused_applies(query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool) -> bool:
    """Whether the program is for a GPU on which cuDNN has a kernel for this attention, forward and backward."""
    target = current_target()
    if target is None or target.compute_capability is None or target.compute_capability < (8, 0):
        return False
    length, width = query.shape[2:]
    keys = key.shape[2]
    return (
        query.dtype in HALVES
        and query.dtype == key.dtype == value.dtype
        and query.ndim == 4
        and value.shape == key.shape
        and width % 8 == 0
        and width <= 128
        and (not is_causal or length == keys)  # which corner the triangle starts in is then no question
        and (mask is None or (mask.dtype in (bool, query.dtype) and length % 2 == 0 and keys % 2 == 0))
    )


def _fused_call(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float | None, **how: Any
) -> Any:
    """`jax.nn.dot_product_attention`, whose arrays are (B, L, H, E)."""
    if mask is not None:
        mask = _four(mask)
        kind = "mask" if mask.dtype == bool else "bias"
        if kind == "bias":
            mask = lax.max(mask, constant(_LEAST[mask.dtype], mask.dtype))
        how[kind] = mask
    query, key, value = (lax.transpose(array, (0, 2, 1, 3)) for array in (query, key, value))
    length = query.shape[1]
    if length % 2 or key.shape[1] % 2:  # JAX refuses the gradient of odd ones: one place more, which nobody sees
        rows = query.shape[:1]
        how["query_seq_lengths"], how["key_value_seq_lengths"] = (
            lax.full(rows, array.shape[1], jnp.dtype("int32")) for array in (query, key)
        )
        query, key, value = map(_evened, (query, key, value))
    results = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=is_causal,
        scale=scale,
        implementation=_IMPLEMENTATION,
        **how,
    )
    return jax.tree.map(lambda array: lax.slice_in_dim(array, 0, length, axis=1), results)


def _evened(array: Array) -> Array:
    """(B, L, H, E) with an even L, the last of it zeros where it was odd."""
    return lax.pad(
        array, constant(0, array.dtype), [(0, array.shape[1] % 2 if axis == 1 else 0, 0) for axis in range(4)]
    )


def _fused(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float | None
) -> tuple[Array, Array]:
    out, logsumexp = _fused_call(query, key, value, mask, is_causal, scale, return_residual=True)
    out, logsumexp = lax.transpose(out, (0, 2, 1, 3)), cast(lax.transpose(logsumexp, (0, 2, 1)), jnp.dtype("float32"))
    if mask is not None:  # where every key is masked, cuDNN takes their mean
        reached = _reached(mask, logsumexp.shape)
        out, logsumexp = select(lax.expand_dims(reached, (3,)), out, 0), select(reached, logsumexp, -math.inf)
    return out, logsumexp


def _fused_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Array, Array, Array]:
    """The gradient, for which cuDNN wants its own forward's sums: XLA finds that this forward is `_fused`'s own."""

    def attend(query: Array, key: Array, value: Array) -> Array:
        return lax.transpose(_fused_call(query, key, value, mask, is_causal, scale), (0, 2, 1, 3))

    if mask is not None:
        grad_out = select(lax.expand_dims(_reached(mask, grad_out.shape[:3]), (3,)), grad_out, 0)
    _, pull_back = jax.vjp(attend, query, key, value)
    return pull_back(grad_out)


def _reached(mask: Array, shape: tuple[int, ...]) -> Array:
    """(B, H, L): whether the mask leaves the query any key."""
    seen = mask if mask.dtype == bool else mask > constant(-math.inf, mask.dtype)
    return expand(lax.reduce_or(_four(seen), (3,)), shape)


def _four(mask: Array) -> Array:
    """The mask with leading dims of size 1, up to four."""
    return lax.reshape(mask, (1,) * (4 - mask.ndim) + mask.shape)


@lowers("aten._safe_softmax.default")
def safe_softmax(self: Array, dim: int, dtype: torch.dtype | None = None) -> Array:
    """Softmax that is 0 where every score is -inf."""
    result = self.dtype if dtype is None else jax_dtype(dtype)
    x = cast(self, opmath(result))
    axis = wrap(dim, x.ndim)
    largest = lax.expand_dims(lax.reduce_max(x, (axis,)), (axis,))
    weights = lax.exp(x - select(largest == -math.inf, 0, largest))
    total = lax.expand_dims(lax.reduce_sum(weights, (axis,)), (axis,))
    return cast(weights / select(total == 0, 1, total), result)
