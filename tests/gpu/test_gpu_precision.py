"""Float32 products in the GPU program are as exact as torch's flags say: float32, or TF32 where it is allowed.

There are two: one for matrix products, and one for convolutions, for which torch allows TF32 from the start.
"""

import re

import jax
import numpy as np
import pytest
import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.aot.step_program import compile_step, step_program
from trainingcompiler.targets.target import Target, compiling_for

EXPECTED = {"highest": {"HIGHEST"}, "high": {"HIGH"}, "medium": {"DEFAULT"}}


@pytest.fixture(params=EXPECTED)
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 6 * 6, 32))


def square(model, x):
    return model(x).square().mean()


def program(precision_now: str | None = None):
    net = model()
    captured = step_program(net, torch.optim.SGD(net.parameters(), lr=0.1), square, torch.zeros(4, 8, 8, 8))
    if precision_now is not None:
        torch.set_float32_matmul_precision(precision_now)
    with jax.enable_x64(True), compiling_for(Target.gpu("h200")):
        shapes = (
            tuple(jax.ShapeDtypeStruct(spec.shape, np.dtype(spec.dtype)) for spec in specs)
            for specs in (captured.state, captured.inputs)
        )
        return jax.jit(captured.function).lower(*shapes).as_text()


def products_in(text: str, kind: str) -> list[set[str]]:
    products = [line for line in text.splitlines() if kind in line]
    stated = [set(re.findall(r"precision = \[(\w+), (\w+)\]|#stablehlo<precision (\w+)>", line)) for line in products]
    return [{word for words in found for word in words if word} or {"DEFAULT"} for found in stated]


def test_every_product_states_it(precision):
    assert products_in(program(), "dot_general") == 3 * [EXPECTED[precision]]  # forward, gradients of both operands


@pytest.mark.parametrize("allowed", [True, False])
def test_every_convolution_states_its_own(precision, allowed):
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        text = program()
    assert products_in(text, "stablehlo.convolution") == 2 * [{"DEFAULT" if allowed else "HIGHEST"}]


def test_it_is_that_of_the_call_and_not_of_the_compile():
    before = torch.get_float32_matmul_precision()
    try:
        products = products_in(program(precision_now="medium"), "dot_general")
    finally:
        torch.set_float32_matmul_precision(before)
    assert products and all(found == EXPECTED[before] for found in products)


@pytest.mark.gpu_plan
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_only_where_it_is_allowed(precision, allowed):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        step = compile_step(net, optimizer, square, torch.zeros(4, 8, 8, 8), Target.gpu("h200"))

    def exact(pattern: str) -> list[bool]:
        lines = [line for line in step.as_text().splitlines() if re.search(pattern, line)]
        return ["operand_precision={highest,highest" in line for line in lines]

    assert exact(r" dot\(") == 3 * [precision == "highest"]
    assert exact(r"__cudnn\$conv") == 2 * [not allowed]
