"""Errors stay errors: a value that torch refuses is refused by the compiled step too, in torch's own words.

XLA clamps an index out of range, or drops the write, and trains on.
"""

import copy

import pytest
import torch
from parity import assert_same_training, train
from small import made, sgd, train_on
from torch import nn
from torch.nn import functional as F

import trainingcompiler as tc
from trainingcompiler.reporting.events import Note


class Words(nn.Module):
    """Classifies rows of 4 word numbers below 10."""

    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, words):
        return self.net(self.table(words).mean(1))


class Bags(Words):
    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(10, 8)

    def forward(self, words):
        return self.net(self.table(words))


class Gathers(Words):
    def forward(self, words):
        return self.net(torch.gather(self.table.weight, 0, words.repeat(1, 2)))


class Indexes(Words):
    def forward(self, words):
        return self.net(self.table.weight[words].mean(1))


class Scatters(Words):
    def forward(self, words):
        counts = torch.zeros(len(words), 10).scatter_add(1, words, torch.ones(words.shape))
        return self.net(counts @ self.table.weight)


class Selects(Words):
    def forward(self, words):
        return self.net(torch.index_select(self.table.weight, 0, words[:, 0]))


class Probabilities(Words):
    """Gives something above 1 for a large word."""

    def forward(self, words):
        loss = F.binary_cross_entropy(words.float().mean(1) / 10, torch.ones(len(words)))
        return self.net(self.table(words.clamp(max=9)).mean(1)) + loss


class Bernoulli(Words):
    def forward(self, words):
        mask = torch.bernoulli(words.float().mean(1, keepdim=True) / 10)
        return self.net(self.table(words.clamp(max=9)).mean(1)) * mask


class Cholesky(Words):
    """Factorizes a matrix that is not positive for a large word."""

    def forward(self, words):
        matrix = torch.eye(4) * (10 - words.max())
        return self.net(self.table(words.clamp(max=9)).mean(1)) @ torch.linalg.cholesky(matrix)


def batches(count=20):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 10, (16, 4), generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(count)
    ]


def spoiled(words=None, label=None):
    """A batch with one wrong value."""
    ((x, y),) = batches(1)
    if words is not None:
        x[3] = words
    if label is not None:
        y[5] = label
    return x, y


CASES = {
    "embedding": (Words, {"words": 10}),
    "negative embedding": (Words, {"words": -1}),
    "far embedding": (Words, {"words": 2**32 + 1}),
    "label": (Words, {"label": 4}),
    "negative label": (Words, {"label": -1}),
    "bag": (Bags, {"words": 10}),
    "gather": (Gathers, {"words": 10}),
    "index": (Indexes, {"words": 10}),
    "negative index": (Indexes, {"words": -11}),
    "scatter": (Scatters, {"words": 10}),
    "index_select": (Selects, {"words": 10}),
    "binary_cross_entropy": (Probabilities, {"words": 12}),
    "bernoulli": (Bernoulli, {"words": 12}),
    "cholesky": (Cholesky, {"words": 12}),
}


def failure_of(step, batch) -> Exception:
    with pytest.raises((IndexError, RuntimeError)) as raised:
        step(*batch)
    return raised.value


@pytest.mark.parametrize(("model", "wrong"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("way", ["tape", "tc.compile"])
def test_torchs_own_error_and_the_model_as_it_was(model, wrong, way):
    objects = sgd(model)()
    net, optimizer = objects["model"], objects["optimizer"]
    config = tc.TrainingCompilerConfig(engine="xla", fallback="error", quiet=True)

    def step(x, y):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    plain = step
    if way == "tape":
        tc.enable(config)
    else:
        step = tc.compile(step, config)
    try:
        for batch in batches(4):
            step(*batch)
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
        error = failure_of(step, spoiled(**wrong))
        torch.testing.assert_close((net.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
        step(*batches(5)[4])  # the loop may go on
        assert not torch.equal(net.net.weight, before[0]["net.weight"])
    finally:
        tc.disable()
    torchs = failure_of(plain, spoiled(**wrong))
    assert (type(error), str(error)) == (type(torchs), str(torchs))


@pytest.mark.parametrize("look", ["before backward", "after backward"])
def test_a_look_at_the_loss_raises_it(look):
    objects = sgd(Words)()

    def loop(objects, data):
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            if look == "before backward":
                loss.item()
            loss.backward()
            loss.item()
            objects["optimizer"].step()
        return []

    with pytest.raises(IndexError, match="out of range"):
        train(lambda: objects, loop, [*batches(4), spoiled(words=10)], compiled=True)


def test_evaluation_raises_it():
    def loop(objects, data):
        losses = train_on(objects["model"], objects["optimizer"], data)
        with torch.no_grad():
            objects["model"](spoiled(words=10)[0])
        return losses

    with pytest.raises(IndexError, match="out of range"):
        train(sgd(Words), loop, batches(4), compiled=True)


def test_ignored_labels_are_no_error():
    data = [(x, torch.where(torch.arange(16) < 3, -100, y)) for x, y in batches()]
    run = assert_same_training(sgd(Words), lambda o, d: train_on(o["model"], o["optimizer"], d), data, max_compiles=1)
    assert not [event for event in run.events if isinstance(event, Note)]


@pytest.mark.parametrize("wrong", [{"words": 10}, {"words": -1}, {"label": 4}, {"label": -3}], ids=str)
def test_what_a_batch_has_out_of_range_raises_at_the_call(wrong):
    """A script may catch it there."""

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for index, batch in enumerate(data):
            x, y = spoiled(**wrong) if index % 4 == 3 else batch
            optimizer.zero_grad()
            try:
                loss = F.cross_entropy(model(x), y)
            except IndexError:
                losses.append(-1.0)
                continue
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    run = assert_same_training(made(Words, torch.optim.Adam, lr=0.01), loop, batches(), max_compiles=1)
    assert [loss for loss in run.observed if loss < 0] == [-1.0] * 5


def test_a_script_that_catches_the_error_goes_on():
    def loop(objects, data):
        losses = []
        for index, batch in enumerate(data):
            if index % 4 == 3:
                batch = spoiled(words=10)
            try:
                losses += train_on(objects["model"], objects["optimizer"], [batch])
            except IndexError:
                losses.append(-1.0)
        return losses

    run = assert_same_training(made(Words, torch.optim.Adam, lr=0.01), loop, batches(24), max_compiles=1)
    assert [loss for loss in run.observed if loss < 0] == [-1.0] * 6
