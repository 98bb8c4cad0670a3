"""Connectionist temporal classification: the loss of all alignments of a sequence with its labels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .promotion import INT64, Array, cast, iota, select
from .registry import FAKES, lowers
from .value_checks import require_between

_NEVER = -1e30
"""The logarithm of a probability of 0: finite, so that no gradient is inf - inf."""


def _lengths(lengths: Sequence[int] | Array) -> Array:
    return cast(jnp.asarray(lengths), INT64)


def _padded(targets: Array, target_lengths: Sequence[int] | Array) -> Array:
    """(N, S) labels, of which each row's first `target_lengths` count."""
    if targets.ndim == 2:
        return targets
    if not isinstance(target_lengths, list | tuple):
        raise NotImplementedError("CTC loss of concatenated targets whose lengths are tensors")
    starts = np.cumsum([0, *target_lengths[:-1]])[:, None]
    places = np.minimum(starts + np.arange(max(target_lengths, default=0)), max(targets.size - 1, 0))
    return targets[places] if targets.size else jnp.zeros(places.shape, targets.dtype)


def _alignments(
    log_probs: Array, labels: Array, input_lengths: Array, target_lengths: Array, blank: int
) -> tuple[Array, Array]:
    """Each sample's negative log-likelihood, and (N, T, 2 S + 1) log-probabilities of its prefixes."""
    batch, count = labels.shape
    states = 2 * count + 1
    extended = jnp.full((batch, states), blank, INT64).at[:, 1::2].set(cast(labels, INT64))
    differs = jnp.pad(extended[:, 2:] != extended[:, :-2], ((0, 0), (2, 0)))
    skips = differs & (extended != blank)

    def shifted(alpha: Array, by: int) -> Array:
        return jnp.pad(alpha, ((0, 0), (by, 0)), constant_values=_NEVER)[:, :states]

    def emitted(now: Array) -> Array:
        return jnp.take_along_axis(now, extended, 1, mode="clip")

    def step(alpha: Array, timed: tuple[Array, Array]) -> tuple[Array, Array]:
        time, now = timed
        paths = jnp.stack([alpha, shifted(alpha, 1), select(skips, shifted(alpha, 2), _NEVER)])
        new = lax.max(jax.nn.logsumexp(paths, axis=0) + emitted(now), jnp.full_like(alpha, _NEVER))
        alpha = select((time < input_lengths)[:, None], new, alpha)
        return alpha, alpha

    place = iota((batch, states), 1)
    begins = (place == 0) | ((place == 1) & (target_lengths > 0)[:, None])
    first = select(begins, emitted(log_probs[0]), _NEVER)
    times = jnp.arange(1, log_probs.shape[0], dtype=INT64)
    last, rest = lax.scan(step, first, (times, log_probs[1:]))
    ends = (place == 2 * target_lengths[:, None]) | (place == 2 * target_lengths[:, None] - 1)
    total = jax.nn.logsumexp(select(ends, last, _NEVER), axis=1)
    return -total, jnp.swapaxes(jnp.concatenate([first[None], rest]), 0, 1)


@lowers("aten._ctc_loss.default", "aten._ctc_loss.Tensor")
def ctc_loss(
    log_probs: Array,
    targets: Array,
    input_lengths: Sequence[int] | Array,
    target_lengths: Sequence[int] | Array,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Array, Array]:
    labels = _padded(targets, target_lengths)
    lengths = _lengths(input_lengths), _lengths(target_lengths)
    require_between(lengths[0], 1, log_probs.shape[0])
    require_between(lengths[1], 0, labels.shape[1])
    loss, alphas = _alignments(log_probs, labels, *lengths, blank)
    return select(loss > -_NEVER / 2, jnp.inf, loss), select(alphas < _NEVER / 2, -jnp.inf, alphas)


@lowers("aten._ctc_loss_backward.default", "aten._ctc_loss_backward.Tensor")
def ctc_loss_backward(
    grad: Array,
    log_probs: Array,
    targets: Array,
    input_lengths: Sequence[int] | Array,
    target_lengths: Sequence[int] | Array,
    neg_log_likelihood: Array,
    log_alpha: Array,
    blank: int,
    zero_infinity: bool = False,
) -> Array:
    """torch's gradient, which is that of the logits: the one of the log-probabilities plus the probabilities."""
    labels = _padded(targets, target_lengths)
    lengths = _lengths(input_lengths), _lengths(target_lengths)
    _, pull = jax.vjp(lambda x: _alignments(x, labels, *lengths, blank)[0], log_probs)
    [slope] = pull(jnp.ones_like(neg_log_likelihood))
    inside = (iota(log_probs.shape[:2], 0) < lengths[0][None])[:, :, None]
    result = select(inside, (slope + lax.exp(log_probs)) * grad[None, :, None], 0)
    endless = lax.eq(neg_log_likelihood, jnp.full_like(neg_log_likelihood, jnp.inf))[None, :, None]
    return select(endless, 0.0 if zero_infinity else jnp.nan, result)


def _fake_loss(log_probs, targets, input_lengths, target_lengths, *options):
    longest = targets.shape[1] if targets.ndim == 2 else max(target_lengths, default=0)
    times, batch, _ = log_probs.shape
    return log_probs.new_empty((batch,)), log_probs.new_empty((batch, times, 2 * longest + 1))


def _fake_gradient(grad, log_probs, *rest):
    return log_probs.new_empty(log_probs.shape)


for _kind in ("default", "Tensor"):
    FAKES[f"aten._ctc_loss.{_kind}"] = _fake_loss
    FAKES[f"aten._ctc_loss_backward.{_kind}"] = _fake_gradient
