"""Philox random bits as a loop, in place of XLA:CPU's own expansion of them.

XLA:CPU expands `rng_bit_generator` into ten unrolled rounds and fuses those into whoever reads the bits, four times
over under a concatenation: 400 ns a number and two seconds of compiling, measured for a dropout of 64 x 64 numbers.
The same rounds as a loop over arrays take 10 ns a number. The bits are the same (`tests/tensorflow/test_philox.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of Philox4x32, as in XLA's prng.cc and in the Random123 paper
_WEYL = (0x9E3779B9, 0xBB67AE85)
_GENERATOR = "stablehlo.rng_bit_generator"


def random_bits(state: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The next `size` random numbers.

    Args:
        state: uint64[3]: the key, and the low and high half of the counter, as XLA lays them out.
        size: How many.

    Returns:
        The state after them, uint64[3], and uint32[size].
    """
    blocks = -(-size // 4)
    low, high = _counter(state, lax.iota(jnp.uint64, blocks))
    lanes = (_low(low), _high(low), _low(high), _high(high))
    lanes, _ = lax.fori_loop(
        0, _ROUNDS, lambda _, carried: _round(*carried), (lanes, (_low(state[0]), _high(state[0])))
    )
    return jnp.stack([state[0], *_counter(state, jnp.uint64(blocks))]), jnp.stack(lanes, 1).reshape(-1)[:size]


def replace(module: ir.Module) -> None:
    """Replaces every Philox generator of 32-bit numbers in a StableHLO module."""
    for function in list(module.body.operations):
        _replace_in(function.operation, module)


def _replace_in(operation: ir.Operation, module: ir.Module) -> None:
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                _replace_in(inner.operation, module)
                if inner.operation.name == _GENERATOR and _is_ours(inner.operation):
                    _replace_one(inner.operation, module)


def _is_ours(operation: ir.Operation) -> bool:
    state, bits = (ir.RankedTensorType(result.type) for result in operation.results)
    is_philox = "PHILOX" in str(operation.attributes["rng_algorithm"])
    return is_philox and state.shape == [3] and str(bits.element_type) == "ui32"


def _replace_one(operation: ir.Operation, module: ir.Module) -> None:
    bits = ir.RankedTensorType(operation.results[1].type)
    text = _lowered(tuple(bits.shape))
    name = mlir.merge_mlir_modules(module, "philox", ir.Module.parse(text))
    with ir.InsertionPoint(operation), operation.location:
        types = [result.type for result in operation.results]
        call = func.CallOp(types, ir.FlatSymbolRefAttr.get(name), list(operation.operands))
    for old, new in zip(operation.results, call.results, strict=True):
        old.replace_all_uses_with(new)
    operation.erase()


def _lowered(shape: tuple[int, ...]) -> str:
    def philox(state: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = 1
        for length in shape:
            size *= length
        new_state, bits = random_bits(state, size)
        return new_state, bits.reshape(shape)

    with jax.enable_x64(True):
        return jax.jit(philox).lower(jax.ShapeDtypeStruct((3,), jnp.uint64)).as_text()


def _counter(state: jax.Array, steps: Any) -> tuple[jax.Array, jax.Array]:
    low = state[1] + steps
    return low, state[2] + (low < state[1]).astype(jnp.uint64)


def _round(lanes: tuple, key: tuple) -> tuple[tuple, tuple]:
    products = [lane.astype(jnp.uint64) * jnp.uint64(m) for lane, m in zip(lanes[::2], _MULTIPLIERS, strict=True)]
    mixed = (
        _high(products[1]) ^ lanes[1] ^ key[0],
        _low(products[1]),
        _high(products[0]) ^ lanes[3] ^ key[1],
        _low(products[0]),
    )
    return mixed, tuple(part + jnp.uint32(weyl) for part, weyl in zip(key, _WEYL, strict=True))


def _low(values: jax.Array) -> jax.Array:
    return values.astype(jnp.uint32)


def _high(values: jax.Array) -> jax.Array:
    return (values >> jnp.uint64(32)).astype(jnp.uint32)
