"""Calls without gradients: a text that grows is not compiled at each of its lengths."""

import pytest
import torch
from parity import FLOAT32_TOLERANCE, assert_same_training, train
from small import adamw
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.session.eval_policy import EvalCompilePolicy, key_of
from trainingcompiler.reporting.events import Note


class Letters(nn.Module):
    """Predicts the next of 16 letters from the ones before."""

    def __init__(self, noise: float = 0.0):
        super().__init__()
        self.table, self.head, self.noise = nn.Embedding(16, 8), nn.Linear(8, 16), noise

    def forward(self, ids):
        x = self.table(ids).cumsum(1)
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        return self.head(x)


def texts() -> list:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 16, (4, 9), generator=generator),) for _ in range(20)]


def learns(objects, data):
    model, optimizer = objects["model"], objects["optimizer"]
    losses = []
    for (ids,) in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def writes(objects, data, rounds: int = 1):
    """Learns, and writes 12 letters."""
    losses = learns(objects, data)
    with torch.no_grad():
        for _ in range(rounds):
            ids = data[0][0][:, :2]
            for _ in range(12):
                logits = objects["model"](ids)[:, -1]
                ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
                losses.append(logits.square().mean().item())
    return losses


def test_a_text_that_grows_is_compiled_at_its_first_length():
    eager = train(adamw(Letters), writes, texts(), compiled=False)
    run = train(adamw(Letters), writes, texts(), compiled=True, fallback="error")
    assert run.observed == pytest.approx(eager.observed, rel=FLOAT32_TOLERANCE)
    assert run.statistics.compiles == 2
    notes = [event.text for event in run.events if isinstance(event, Note)]
    assert sum("Letters is evaluated in PyTorch at shapes other than the first" in text for text in notes) == 1


def test_what_draws_random_numbers_is_compiled_whenever_it_comes():
    run = train(adamw(lambda: Letters(0.1)), writes, texts(), compiled=True)
    assert run.statistics.compiles == 13  # whoever is faster, the generator goes the same way


def test_what_is_seen_to_draw_waits_no_more():
    def loop(objects, data):
        model = objects["model"]
        seen = learns(objects, data)
        with torch.no_grad():
            model(data[0][0])  # draws nothing, and is compiled
            model.noise = 0.1
            for _ in range(3):
                seen += [model(data[0][0][:, :places]).sum().item() for places in (2, 3)]
        return [*seen, torch.rand(()).item()]

    runs = [train(adamw(Letters), loop, texts(), compiled=True) for _ in range(2)]
    assert runs[0].observed == runs[1].observed
    assert runs[0].statistics.compiles == 4  # the first of them ran in torch, once


def test_a_shape_that_has_taken_as_long_as_compiling_is_compiled():
    evaluations, module = EvalCompilePolicy(), nn.Linear(2, 2)
    long, short = ((key_of(module, [torch.zeros(rows, 2)], None)) for rows in (8, 3))
    assert not evaluations.waits(module, long)  # the first is compiled
    evaluations.compiled(module, long, 2.0, is_random=False)
    assert not evaluations.waits(module, long)
    for _ in range(4):
        assert evaluations.waits(module, short)
        evaluations.waited(module, short, 0.5, is_random=False)
    assert not evaluations.waits(module, short)
    evaluations.compiled(module, short, 0.1, is_random=False)
    assert not evaluations.waits(module, short)


def test_what_the_caller_gives_besides_tensors_tells_evaluations_apart():
    module = nn.Linear(2, 2)
    keys = {
        key_of(module, [torch.zeros(2), 1], "a"),
        key_of(module, [torch.zeros(2), 2], "a"),
        key_of(module, [torch.zeros(3), 2], "a"),
        key_of(module, [torch.zeros(3), 2], "b"),
        key_of(module.eval(), [torch.zeros(3), 2], "b"),
    }
    assert len(keys) == 5
    assert key_of(module, [0.5], "a") == key_of(module, [0.6], "a")  # such numbers are inputs, once they change


def test_an_evaluation_in_inference_mode_moves_the_state_and_training_goes_on():
    """What is made in inference mode has no gradient for good, and the first program gives parameters their memory."""

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for (ids,) in data:
            optimizer.zero_grad()
            with torch.inference_mode():
                teacher = model(ids[:, :-1]).softmax(-1)
            loss = F.mse_loss(model(ids[:, :-1]), teacher.clone()) + model.head.bias.pow(2).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert not any(parameter.is_inference() for parameter in model.parameters())
        return losses

    assert_same_training(adamw(Letters), loop, texts(), dtypes=(torch.float64,))
