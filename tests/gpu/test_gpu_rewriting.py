"""What is rewritten for GPUs: masks that say no more than "causal", or nothing."""

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainingcompiler.frameworks.pytorch.aot.step_program import step_program
from trainingcompiler.frameworks.pytorch.operators import attention
from trainingcompiler.program import StepProgram
from trainingcompiler.targets.target import Target, compiling_for

LENGTH = 6


def causal(x):
    """As Transformers computes it: from positions, for every row of the batch."""
    places = torch.arange(x.shape[1])
    rows = torch.arange(x.shape[0])[:, None, None, None]
    return (places[None, :] <= places[:, None])[None, None] & (rows >= 0)


def causal_least(x):
    return torch.full((LENGTH, LENGTH), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)


def causal_written(x):
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bfloat16)
    places = torch.arange(LENGTH)
    return mask.masked_fill_(places[None, :] > places[:, None], -torch.inf)


def nothing(x):
    return torch.ones(x.shape[0], 1, LENGTH, LENGTH, dtype=torch.bool)


def windowed(x):
    places = torch.arange(x.shape[1])
    return causal(x) & (places[None, :] > places[:, None] - 3)


def padded(x):
    return causal(x) & (x[:, None, None, :, 0] < 3)


class Attention(nn.Module):
    def __init__(self, mask, dropout=0.0):
        super().__init__()
        self.mask = mask
        self.dropout = dropout
        self.project = nn.Linear(8, 3 * 16)

    def forward(self, x):
        heads = self.project(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*heads, attn_mask=self.mask(x), dropout_p=self.dropout)


def loss_of(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x).float().square().mean()


def program_of(mask, dropout=0.0, rows=2) -> StepProgram:
    torch.manual_seed(0)
    model = Attention(mask, dropout)
    return step_program(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of, torch.empty(rows, LENGTH, 8))


def arguments(program: StepProgram) -> list[tuple]:
    generator = np.random.default_rng(0)
    return [
        tuple(generator.standard_normal(spec.shape).astype(spec.dtype) for spec in specs)
        for specs in (program.state, program.inputs)
    ]


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Whether each attention is causal, and whether it has a mask; JAX's implementation stands in for cuDNN's."""
    monkeypatch.setattr(attention, "_IMPLEMENTATION", "xla")
    seen: list[tuple] = []
    real = attention._fused_call

    def watched(query, key, value, mask, is_causal, *rest, **how):
        seen.append((is_causal, mask is not None))
        return real(query, key, value, mask, is_causal, *rest, **how)

    monkeypatch.setattr(attention, "_fused_call", watched)
    return seen


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal, (True, False)),
        (causal_least, (True, False)),
        (causal_written, (True, False)),
        (nothing, (False, False)),
        (windowed, (False, True)),
        (padded, (False, True)),
    ],
)
def test_a_mask_that_says_causal_or_nothing_is_not_a_mask(calls, mask, expected):
    program = program_of(mask)
    given = arguments(program)
    with jax.enable_x64(True):
        plain = jax.jit(program.function)(*given)
        assert not calls  # not for a CPU
        with compiling_for(Target.gpu("h200")):
            # A function of its own: JAX would find the program traced for the CPU.
            ours = jax.jit(lambda state, inputs: program.function(state, inputs))(*given)
    assert calls == 2 * [expected]  # forward, and in the backward
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("mask", "expected"), [(causal, (True, False)), (windowed, (False, True))])
def test_rows_that_are_all_alike_are_looked_at_once(calls, mask, expected):
    """A mask of 2^29 elements, half a gigabyte of booleans and 2 GB of floats: the global batch of many GPUs."""
    program = program_of(mask, rows=2**29 // LENGTH**2)
    state, inputs = (
        tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs)
        for specs in (program.state, program.inputs)
    )
    with jax.enable_x64(True), compiling_for(Target.gpu("h200")):
        jax.eval_shape(lambda *given: program.function(*given), state, inputs)
    assert calls == 2 * [expected]


def test_dropout_is_drawn_by_us(calls):
    """cuDNN's seed would be a constant of the program."""
    program = program_of(causal, dropout=0.5)
    (seed,) = (index for index, spec in enumerate(program.inputs) if spec.role == "rng")
    state, inputs = arguments(program)
    losses = []
    with jax.enable_x64(True), compiling_for(Target.gpu("h200")):
        step = jax.jit(program.function)
        for value in (1, 1, 2):
            inputs = (*inputs[:seed], np.array([value]), *inputs[seed + 1 :])
            losses.append(float(step(state, inputs)[1][0]))
    assert not calls
    assert losses[0] == losses[1] != losses[2]


def test_transformers_causal_mask_is_recognized(calls):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=20, use_cache=False, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).train()

    def own_loss(model, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids, labels=ids).loss

    ids = torch.zeros(2, 8, dtype=torch.int64)
    program = step_program(model, torch.optim.SGD(model.parameters(), lr=0.1), own_loss, ids)
    with jax.enable_x64(True), compiling_for(Target.gpu("h200")):
        jax.eval_shape(program.function, *arguments(program))
    assert calls == 4 * [(True, False)]


@pytest.mark.parametrize(("mask", "is_made"), [(causal, False), (windowed, True)])
def test_a_mask_that_nobody_reads_is_not_kept_for_a_block_that_is_computed_again(calls, mask, is_made):
    """The block is given the mask, so that what is computed again would read it through the barrier."""

    class Checkpointed(Attention):
        def forward(self, x):
            return checkpoint(self.attend, x, self.mask(x), use_reentrant=False)

        def attend(self, x, mask):
            heads = self.project(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(*heads, attn_mask=mask)

    model = Checkpointed(mask)
    program = step_program(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of, torch.empty(3, LENGTH, 8, requires_grad=True)
    )
    with jax.enable_x64(True), compiling_for(Target.gpu("h200")):
        text = jax.jit(program.function).lower(*arguments(program)).as_text()
    assert program.recomputes and "optimization_barrier" in text
    assert calls == 3 * [(not is_made, is_made)]  # forward, again, and in the backward
    assert (f"tensor<3x1x{LENGTH}x{LENGTH}xi1>" in text) == is_made
