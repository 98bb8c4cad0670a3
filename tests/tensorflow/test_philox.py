"""Our loop of Philox rounds gives the bits of XLA's own generator."""

import jax
import numpy as np
import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir

from trainingcompiler.frameworks.tensorflow import philox, stablehlo

MODULE = """
module {{
  func.func @main(%state: tensor<3xui64>) -> (tensor<3xui64>, tensor<{shape}xui32>) {{
    %new, %bits = stablehlo.rng_bit_generator %state, algorithm = PHILOX
        : (tensor<3xui64>) -> (tensor<3xui64>, tensor<{shape}xui32>)
    return %new, %bits : tensor<3xui64>, tensor<{shape}xui32>
  }}
}}
"""
STATES = {
    "zero": (0, 0, 0),
    "ordinary": (123456789012345, 77, 3),
    "low counter overflows": (2**64 - 1, 2**64 - 2, 5),
    "both overflow": (1 << 40, 2**64 - 2, 2**64 - 1),
}


def bits(shape, state, monkeypatch, ours):
    """What a module with one generator returns, through our lowering or with XLA's own generator."""
    if not ours:
        monkeypatch.setattr(philox, "replace", lambda module: None)
    text = MODULE.format(shape="x".join(map(str, shape))).encode()
    results = (((3,), np.dtype(np.uint64)), (shape, np.dtype(np.uint32)))
    module = stablehlo.Module(name="random", text=text, results=results)
    with jax.enable_x64(True):
        compiled = (
            jax.jit(lambda state: stablehlo.call(module, (state,)))
            .lower(jax.ShapeDtypeStruct((3,), np.uint64))
            .compile()
        )
        assert ("while" in compiled.as_text()) == ours
        return [np.asarray(array) for array in compiled(np.array(state, np.uint64))]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("shape", [(1,), (7,), (64, 33)], ids=str)
def test_the_bits_are_those_of_xla(shape, state, monkeypatch):
    ours = bits(shape, state, monkeypatch, ours=True)
    for one, other in zip(ours, bits(shape, state, monkeypatch, ours=False), strict=True):
        np.testing.assert_array_equal(one, other)


def test_other_generators_are_left_alone():
    text = MODULE.format(shape="8").replace("PHILOX", "THREE_FRY").replace("tensor<3xui64>", "tensor<2xui64>")
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        philox.replace(module)
        assert "rng_bit_generator" in str(module)
