"""Ordinary training loops, unmodified: compiled, they train the model that eager trains."""

import pytest
import torch
from parity import assert_same_training
from small import adamw, batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize("make", [sgd(), adamw()], ids=["sgd", "adamw"])
def test_tutorial_loop(make):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        criterion = nn.CrossEntropyLoss()
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    run = assert_same_training(make, loop, batches(), max_compiles=1, dtypes=(torch.float64, torch.float32))
    assert run.statistics.eager_steps == 0


@pytest.mark.parametrize("place", ["first", "before backward", "last"])
@pytest.mark.parametrize("of", ["optimizer", "model"])
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(place, of, to_none):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            if place == "first":
                objects[of].zero_grad(set_to_none=to_none)
            loss = F.cross_entropy(model(x), y)
            if place == "before backward":
                objects[of].zero_grad(set_to_none=to_none)
            loss.backward()
            optimizer.step()
            if place == "last":
                objects[of].zero_grad(set_to_none=to_none)
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_gradients_never_cleared():
    def loop(objects, data):
        losses = []
        for x, y in data:
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.01), loop, batches(), max_compiles=1)


@pytest.mark.parametrize("make", [sgd(), adamw()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("place", ["before backward", "between backward and step", "after step", "everywhere"])
def test_loss_read(place, make):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if place in ("before backward", "everywhere"):
                losses.append(loss.item())
            loss.backward()
            if place in ("between backward and step", "everywhere"):
                losses.append(loss.item())
            optimizer.step()
            if place in ("after step", "everywhere"):
                losses.append(loss.item())
        return losses

    assert_same_training(make, loop, batches(), max_compiles=1 if place == "after step" else 2)


@pytest.mark.parametrize("place", ["before backward", "between backward and step", "after step"])
def test_loss_printed_every_few_steps(place, capsys):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []

        def show(here, step, loss):
            if here == place and step % 5 == 0:
                print(f"step {step}: {loss:.4f} {loss.item()}")
                losses.append(loss.item())

        for step, (x, y) in enumerate(data):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            show("before backward", step, loss)
            loss.backward()
            show("between backward and step", step, loss)
            optimizer.step()
            show("after step", step, loss)
        return losses

    # A look in mid-step needs a program for the part before it, one for the rest, and one for the steps without it.
    assert_same_training(sgd(), loop, batches(), max_compiles=1 if place == "after step" else 3)
    assert "step 20: " in capsys.readouterr().out


def test_loss_decides():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        skipped = 0
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if torch.isnan(loss) or loss > 1.4:
                skipped += 1
                continue
            loss.backward()
            optimizer.step()
        return [skipped]

    assert_same_training(sgd(), loop, batches(32))


def test_metrics_of_the_outputs_after_the_step():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen, correct, total = [], 0, 0
        for x, y in data:
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            optimizer.step()
            _, predicted = torch.max(outputs.data, 1)
            total += y.size(0)
            correct += (predicted == y).sum().item()
            seen += [loss.item() * x.size(0), correct / total, outputs.softmax(1).max().item()]
        return seen

    assert_same_training(adamw(), loop, batches(), max_compiles=1)


def test_metrics_of_the_outputs_before_backward():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = []
        for x, y in data:
            outputs = model(x)
            accuracy = (outputs.argmax(dim=1) == y).to(outputs.dtype).mean()
            values, predicted = outputs.max(1)
            best = outputs.topk(2, dim=1).indices.t().eq(y).reshape(-1).float().sum(0)
            loss = F.cross_entropy(outputs, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += [loss.detach().cpu().numpy().item(), accuracy.item(), values.sum().item(), best.item()]
            seen += [(predicted == y).sum().item(), outputs.median(1).values.mean().item()]
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_results_collected_and_read_at_the_end():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses, outputs = [], []
        for x, y in data:
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            outputs.append(out.detach())
        return [*torch.stack(losses).tolist(), torch.cat(outputs).sum().item()]

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_step_in_a_function():
    def train_step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    def loop(objects, data):
        return [train_step(objects["model"], objects["optimizer"], x, y) for x, y in data]

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def batch_norm():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def test_batch_norm():
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    run = assert_same_training(sgd(batch_norm), loop, batches(), max_compiles=1)
    assert run.objects["model"][1].num_batches_tracked.item() == 24


def test_batch_norm_of_a_forward_whose_loss_is_read_early():
    """The forward may be computed twice, its buffers are updated once."""

    def loop(objects, data):
        losses = []
        for x, y in data:
            loss = F.cross_entropy(objects["model"](x), y)
            losses.append(loss.item())
            objects["optimizer"].zero_grad()
            loss.backward()
            objects["optimizer"].step()
        return losses

    run = assert_same_training(sgd(batch_norm), loop, batches(), max_compiles=2)
    assert run.objects["model"][1].num_batches_tracked.item() == 24


class TiedLanguageModel(nn.Module):
    """Predicts the next token; the head is the embedding's own weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8, padding_idx=0)
        self.positions = nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(x))


@pytest.mark.parametrize("make", [sgd(TiedLanguageModel), adamw(TiedLanguageModel)], ids=["sgd", "adamw"])
def test_embeddings_layer_norm_and_tied_weights(make):
    def loop(objects, data):
        losses = []
        for tokens in data:
            objects["optimizer"].zero_grad()
            logits = objects["model"](tokens[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, 12), tokens[:, 1:].reshape(-1))
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 12, (4, 7), generator=generator) for _ in range(22)]
    assert_same_training(make, loop, data, max_compiles=1)


class Agent(nn.Module):
    """Keeps the log-probabilities of an episode on itself, as agents of REINFORCE do."""

    def __init__(self):
        super().__init__()
        self.net, self.scales = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [1.0]
        self.kept, self.rewards = [], {}

    def forward(self, x):
        return F.softmax(self.net(x) * self.scales[0], dim=1)


def test_a_list_that_the_loop_keeps_on_the_model():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for step, (x, y) in enumerate(data):
            for row in range(3):
                probabilities = model(x[row : row + 1])
                model.kept.append(torch.distributions.Categorical(probabilities).log_prob(y[row : row + 1]))
                model.rewards[row] = 0.1 * row + 0.01 * step
            optimizer.zero_grad()
            loss = -torch.cat([kept * model.rewards[row] for row, kept in enumerate(model.kept)]).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del model.kept[:]
        return losses

    # Three looks, as `Categorical` asks whether probabilities are valid; a step, and one whose numbers are inputs.
    assert_same_training(adamw(Agent), loop, batches(), max_compiles=5)


def test_a_list_that_the_forward_reads_counts():
    def loop(objects, data):
        losses = []
        for step, (x, y) in enumerate(data):
            objects["model"].scales[0] = 1.0 if step < 12 else 2.0
            objects["optimizer"].zero_grad()
            loss = F.nll_loss(objects["model"](x).log(), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(adamw(Agent), loop, batches(), max_compiles=2)


@pytest.mark.parametrize("place", ["before backward", "after step"])
def test_a_sum_of_losses_over_an_epoch(place):
    def loop(objects, data):
        model, optimizer, totals = objects["model"], objects["optimizer"], []
        for _ in range(3):
            total = 0
            for x, y in data[:8]:
                loss = nn.functional.cross_entropy(model(x), y)
                if place == "before backward":
                    total += loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if place == "after step":
                    total += loss
            totals.append(total.item() / 8)
        return totals

    assert_same_training(sgd(), loop, batches(), dtypes=(torch.float64,), may_fall_back=True)
