"""Random numbers: torch's own generators govern them, and shuffling sees what eager sees."""

import subprocess
import sys

import pytest
import torch
from parity import assert_same_training, train
from small import adamw, batches, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def with_dropout():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))


def plain_loop(objects, data):
    return train_on(objects["model"], objects["optimizer"], data)


def chosen(model, x):
    """An action that a policy chooses."""
    return torch.distributions.Categorical(logits=model(x)).sample().double().mean()


def kept(model, x):
    with torch.no_grad():
        return torch.bernoulli(model(x).sigmoid()).mean()


def filled(model, x):
    return (torch.empty_like(model(x)).exponential_() * model(x)).mean().sigmoid()


def filled_by_probabilities(model, x):
    with torch.no_grad():
        return torch.zeros(16, 4).bernoulli_(model(x).sigmoid()).mean()


@pytest.mark.parametrize("draw", [chosen, kept, filled, filled_by_probabilities], ids=lambda draw: draw.__name__)
def test_what_a_loop_draws_by_results_is_eagers(draw):
    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        torch.manual_seed(3)
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (1 + draw(model, x))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(mlp), loop, batches(), dtypes=(torch.float64,))


def test_same_seed_same_run_another_seed_another_run():
    def loop_after(seed):
        def loop(objects, data):
            torch.manual_seed(seed)
            return plain_loop(objects, data)

        return loop

    first, second, other = (
        train(adamw(with_dropout), loop_after(seed), batches(), compiled=True) for seed in (5, 5, 6)
    )
    assert first.observed == second.observed
    assert first.observed[0] != other.observed[0] and first.observed[3] != other.observed[3]
    for one, two in zip(first.objects["model"].parameters(), second.objects["model"].parameters(), strict=True):
        assert torch.equal(one, two)
    assert first.statistics.compiles == 1 and not first.fallbacks()


class Masks(nn.Module):
    """Gives back what dropout makes of ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(x) * self.scale


def masks(objects, data):
    """Trains on ones; leaves every step's mask in `objects`."""
    objects["masks"] = []
    for x in data:
        objects["optimizer"].zero_grad()
        out = objects["model"](torch.ones_like(x))
        out.mean().backward()
        objects["optimizer"].step()
        objects["masks"].append(out.detach() != 0)
    return []


def masked():
    model = Masks()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0)}


def test_the_rate_is_right_and_the_scale_keeps_the_mean():
    def loop(objects, data):
        means = []
        for x in data:
            objects["optimizer"].zero_grad()
            out = objects["model"](torch.ones_like(x))
            out.mean().backward()
            objects["optimizer"].step()
            kept = out[out != 0]
            assert torch.allclose(kept, torch.full_like(kept, 1 / 0.7))
            means.append(out.mean().item())
            # The gradient of the scale uses the mask of the forward.
            assert objects["model"].scale.grad.item() == pytest.approx(means[-1], rel=1e-5)  # float32, 10^4 terms
        return means

    run = train(masked, loop, [torch.zeros(100, 100)] * 20, compiled=True, keep_gradients=True)
    mean = sum(run.observed) / 20
    # 2 * 10^5 draws: the standard deviation of the mean is 0.0015.
    assert mean == pytest.approx(1.0, abs=0.01)
    assert len(set(run.observed)) == 20
    assert not run.fallbacks()


def test_a_restored_generator_repeats_the_masks():
    def loop(objects, data):
        masks(objects, data[:2])
        state = torch.get_rng_state()
        masks(objects, data)
        first = objects["masks"]
        torch.set_rng_state(state)
        masks(objects, data)
        return [sum((a != b).sum().item() for a, b in zip(first, objects["masks"], strict=True))]

    run = train(masked, loop, [torch.zeros(10, 10)] * 20, compiled=True)
    assert run.observed == [0]
    assert run.objects["masks"][3].tolist() != run.objects["masks"][4].tolist()


def test_draws_inside_fork_rng_leave_the_generator_alone():
    def loop(objects, data):
        masks(objects, data)
        before = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            masks(objects, data)
        return [float(torch.equal(before, torch.get_rng_state()))]

    assert train(masked, loop, [torch.zeros(4, 4)] * 20, compiled=True).observed == [1.0]


def test_the_mask_of_a_forward_read_early_is_the_mask_of_its_backward():
    """However often the forward is computed, the call has one draw."""

    def loop(objects, data):
        seen = []
        for x in data:
            objects["optimizer"].zero_grad()
            out = objects["model"](torch.ones_like(x))
            early = out.mean().item()
            out.mean().backward()
            gradient = objects["model"].scale.grad.item()
            objects["optimizer"].step()
            assert gradient == pytest.approx(early, rel=1e-6)  # float32
            assert out.mean().item() == pytest.approx(early, rel=1e-6)
            seen.append(early)
        return seen

    run = train(masked, loop, [torch.zeros(10, 10)] * 22, compiled=True)
    assert len(set(run.observed)) > 1 and not run.fallbacks()


def test_two_calls_draw_two_masks():
    def loop(objects, data):
        different = 0
        for x in data:
            objects["optimizer"].zero_grad()
            one, two = objects["model"](torch.ones_like(x)), objects["model"](torch.ones_like(x))
            (one + two).mean().backward()
            objects["optimizer"].step()
            different += int((one != two).any())
        return [different]

    assert train(masked, loop, [torch.zeros(10, 10)] * 20, compiled=True).observed == [20]


def test_dropout_is_off_in_evaluation():
    def loop(objects, data):
        seen = []
        for x, y in data:
            objects["model"].train()
            train_on(objects["model"], objects["optimizer"], [(x, y)])
            objects["model"].eval()
            with torch.no_grad():
                one, two = objects["model"](x), objects["model"](x)
            assert torch.equal(one, two)
            seen.append(one.sum().item())
        return seen

    run = train(adamw(with_dropout), loop, batches(), compiled=True)
    assert run.statistics.compiles <= 2 and not run.fallbacks()


def test_noise_drawn_by_the_loop_is_eagers():
    def loop(objects, data):
        losses = []
        for x, y in data:
            noisy = x + 0.1 * torch.randn_like(x)
            losses += train_on(objects["model"], objects["optimizer"], [(noisy, y)])
        return [*losses, torch.rand(()).item()]

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


@pytest.mark.filterwarnings(r"ignore:os\.fork:RuntimeWarning")  # in the eager run, JAX has started for earlier tests
@pytest.mark.parametrize("workers", [0, 2])
def test_shuffling_is_eagers(workers):
    def loop(objects, data):
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        loader = DataLoader(TensorDataset(x, y, torch.arange(len(x))), 16, shuffle=True, num_workers=workers)
        seen = []
        for _ in range(2):
            for x, y, order in loader:
                seen += [*train_on(objects["model"], objects["optimizer"], [(x, y)]), *order.tolist()]
        return seen

    dtypes = (torch.float64, torch.float32) if workers == 0 else (torch.float32,)
    assert_same_training(sgd(), loop, batches(12), max_compiles=1, dtypes=dtypes)


FORKING_SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import trainingcompiler as tc

tc.enable(tc.TrainingCompilerConfig(engine="xla"))
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.randn(64, 8), torch.randint(0, 4, (64,)))
for epoch in range(2):
    for x, y in DataLoader(data, 16, shuffle=True, num_workers=2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
"""


def test_workers_fork_without_a_warning():
    result = subprocess.run([sys.executable, "-c", FORKING_SCRIPT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "fork" not in result.stderr and "Warning" not in result.stderr, result.stderr
