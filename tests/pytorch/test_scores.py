"""Written-out attention keeps no scores in a GPU program, and computes the same."""

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.aot.step_program import step_program
from trainingcompiler.frameworks.pytorch.graph import passes
from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER
from trainingcompiler.frameworks.pytorch.graph.passes import Pass
from trainingcompiler.frameworks.pytorch.graph.passes.attention_remat import rematerialize_attention
from trainingcompiler.targets.target import Target, compiling_for

LAYERS, LENGTH = 2, 24


class Fused(nn.Module):
    """As most models do today: one call, with dropout."""

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=True)


class Written(nn.Module):
    """As they did before."""

    def forward(self, query, key, value):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores + torch.full((LENGTH, LENGTH), -1e9).triu(1)
        return F.dropout(scores.softmax(-1), 0.3) @ value


class Model(nn.Module):
    """Layers of attention; `kind` is what they are made of."""

    def __init__(self, kind):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(LAYERS))
        self.attention = kind()

    def forward(self, x):
        for project in self.projections:
            heads = project(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            x = x + self.attention(*heads).transpose(1, 2).flatten(2)
        return x


def loss_of(model, x):
    return model(x).square().mean()


@pytest.fixture
def nodes(monkeypatch) -> list:
    """What the last program for a GPU was lowered from."""
    seen: list = []

    def watched(graph, results):
        seen[:] = rematerialize_attention(graph, results)
        return list(seen)

    without = [one for one in passes.PASSES if one.name != "attention_remat"]
    monkeypatch.setattr(passes, "PASSES", (*without[:-1], Pass("attention_remat", watched, "cuda"), without[-1]))
    return seen


def both(program) -> tuple[list, list]:
    """What the program for this CPU computes, and what that for a GPU does, run here."""
    generator = np.random.default_rng(0)
    state, inputs = (
        tuple((generator.standard_normal(spec.shape) / 4).astype(spec.dtype) for spec in specs)
        for specs in (program.state, program.inputs)
    )
    with jax.enable_x64(True):
        plain = jax.jit(program.function)(state, inputs)
        with compiling_for(Target.gpu("t4")):
            ours = jax.jit(lambda state, inputs: program.function(state, inputs))(state, inputs)
    return jax.tree.leaves(plain), jax.tree.leaves(ours)


@pytest.mark.parametrize("kind", [Fused, Written])
def test_scores_are_computed_again_with_the_same_mask(nodes, kind):
    torch.manual_seed(0)
    model = Model(kind).double()
    program = step_program(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of, torch.zeros(3, LENGTH, 16, dtype=torch.float64)
    )
    plain, ours = both(program)
    barriers = [node for node in nodes if node.operator == BARRIER]
    draws = [node for node in nodes if node.seed is not None]
    assert len(barriers) == LAYERS and len(draws) == 2 * LAYERS
    for one, other in zip(plain, ours, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)  # the same operations on the same numbers


def test_short_sequences_keep_theirs(nodes):
    """Queries, keys and values would take as much."""
    model = Model(Fused)
    program = step_program(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of, torch.zeros(3, LENGTH - 1, 16))
    both(program)
    assert nodes and not any(node.operator == BARRIER for node in nodes)


def test_a_softmax_over_classes_is_left(nodes):
    model = nn.Sequential(nn.Linear(16, 32), nn.Softmax(-1), nn.Linear(32, 4))
    program = step_program(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of, torch.zeros(5, 7, 16))
    both(program)
    assert nodes and not any(node.operator == BARRIER for node in nodes)


def test_what_reads_the_probabilities_elsewhere_reads_the_first_ones(nodes):
    """A loss on the attention's own weights, as in distillation: they are an output of forward."""

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(16, 48)

        def forward(self, x):
            query, key, value = self.project(x).chunk(3, -1)
            weights = (query @ key.transpose(-1, -2)).softmax(-1)
            return weights @ value, weights

    model = Watched().double()
    program = step_program(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: sum(part.square().mean() for part in model(x)),
        torch.zeros(3, LENGTH, 16, dtype=torch.float64),
    )
    plain, ours = both(program)
    for one, other in zip(plain, ours, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)
