"""Sampling images at positions that a grid gives, in two and three dimensions, and its gradients."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .promotion import INT32, Array, cast, opmath, select
from .registry import lowers

BILINEAR, NEAREST, BICUBIC = 0, 1, 2
ZEROS, BORDER, REFLECTION = 0, 1, 2
"""torch's codes of interpolation and padding."""


def _unnormalized(position: Array, size: int, align_corners: bool) -> Array:
    if align_corners:
        return (position + 1) / 2 * (size - 1)
    return ((position + 1) * size - 1) / 2


def _reflected(position: Array, low: float, high: float) -> Array:
    if low == high:
        return position * 0
    span = high - low
    distance = lax.abs(position - low)
    extra = lax.rem(distance, jnp.full_like(distance, span))
    flips = lax.floor(distance / span)
    return select(lax.rem(flips, jnp.full_like(flips, 2)) == 0, extra + low, span - extra + low)


def _padded(position: Array, size: int, padding: int, align_corners: bool) -> Array:
    if padding == ZEROS:
        return position
    if padding == REFLECTION:
        bounds = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        position = _reflected(position, *bounds)
    # Not lax.clamp, which passes half of a gradient at a bound, where torch passes none.
    return select(position <= 0, 0, select(position >= size - 1, size - 1, position))


def _values_at(image: Array, corner: Sequence[Array]) -> Array:
    """(N, C, *sizes) at whole positions (N, *out) of each axis -> (N, C, *out), zero outside."""
    sizes, out = image.shape[2:], corner[0].shape[1:]
    inside, flat = None, None
    for position, size in zip(corner, sizes, strict=True):
        holds = (position >= 0) & (position <= size - 1)
        inside = holds if inside is None else inside & holds
        place = cast(select(holds, position, 0), INT32)
        flat = place if flat is None else flat * INT32.type(size) + place
    rows = lax.reshape(image, (*image.shape[:2], math.prod(sizes)))
    places = lax.reshape(flat, (flat.shape[0], math.prod(out)))
    values = jax.vmap(lambda row, place: row.at[:, place].get(mode="promise_in_bounds"))(rows, places)
    values = lax.reshape(values, (*image.shape[:2], *out))
    return select(jnp.expand_dims(inside, 1), values, 0)


def _sample(image: Array, grid: Array, interpolation: int, padding: int, align_corners: bool) -> Array:
    rank = image.ndim - 2
    # The grid's last axis counts from the innermost axis of the image.
    raw = [_unnormalized(grid[..., rank - 1 - axis], size, align_corners) for axis, size in enumerate(image.shape[2:])]

    def pad(position: Array, axis: int) -> Array:
        return _padded(position, image.shape[2 + axis], padding, align_corners)

    if interpolation == BICUBIC:
        return _bicubic(image, raw, pad)
    positions = [pad(position, axis) for axis, position in enumerate(raw)]
    if interpolation == NEAREST:
        return _values_at(image, [lax.round(p, lax.RoundingMethod.TO_NEAREST_EVEN) for p in positions])
    first = [lax.stop_gradient(lax.floor(position)) for position in positions]
    shares = [(corner + 1 - position, position - corner) for corner, position in zip(first, positions, strict=True)]
    total = None
    for offsets in itertools.product((0, 1), repeat=rank):
        weight = math.prod(share[offset] for share, offset in zip(shares, offsets, strict=True))
        values = _values_at(image, [corner + offset for corner, offset in zip(first, offsets, strict=True)])
        term = values * jnp.expand_dims(weight, 1)
        total = term if total is None else total + term
    return total


def _cubic_weights(t: Array) -> list[Array]:
    """Keys' kernel with sharpness -0.75 at the four taps around a position `t` past the second."""
    a = -0.75

    def near(x: Array) -> Array:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Array) -> Array:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _bicubic(image: Array, raw: Sequence[Array], pad: Callable[[Array, int], Array]) -> Array:
    first = [lax.stop_gradient(lax.floor(position)) for position in raw]
    weights = [_cubic_weights(position - corner) for position, corner in zip(raw, first, strict=True)]
    total = None
    for taps in itertools.product(range(4), repeat=len(raw)):
        corner = [lax.floor(pad(at + (tap - 1), axis)) for axis, (at, tap) in enumerate(zip(first, taps, strict=True))]
        weight = math.prod(weights[axis][tap] for axis, tap in enumerate(taps))
        term = _values_at(image, corner) * jnp.expand_dims(weight, 1)
        total = term if total is None else total + term
    return total


def _lower_grid(rank: int) -> None:
    @lowers(f"aten.grid_sampler_{rank}d.default")
    def grid_sampler(
        input: Array, grid: Array, interpolation_mode: int, padding_mode: int, align_corners: bool
    ) -> Array:
        wide = opmath(input.dtype)
        return cast(
            _sample(cast(input, wide), cast(grid, wide), interpolation_mode, padding_mode, align_corners), input.dtype
        )

    @lowers(f"aten.grid_sampler_{rank}d_backward.default")
    def grid_sampler_backward(
        grad_output: Array,
        input: Array,
        grid: Array,
        interpolation_mode: int,
        padding_mode: int,
        align_corners: bool,
        output_mask: Sequence[bool],
    ) -> tuple[Array | None, Array]:
        wide = opmath(input.dtype)
        _, pull = jax.vjp(
            lambda image, grid: _sample(image, grid, interpolation_mode, padding_mode, align_corners),
            cast(input, wide),
            cast(grid, wide),
        )
        to_input, to_grid = pull(cast(grad_output, wide))
        return cast(to_input, input.dtype) if output_mask[0] else None, cast(to_grid, grid.dtype)


for _rank in (2, 3):
    _lower_grid(_rank)
