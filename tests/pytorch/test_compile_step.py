"""`tc.compile`: one function that does forward, backward and step."""

import pytest
import torch
from parity import assert_same_training, train
from small import adamw, batches, made, mlp, sgd
from test_fallback import WithFunction, WithUnknownOperator
from test_recording import Counting
from torch import nn
from torch.nn import functional as F

import trainingcompiler as tc
from trainingcompiler import FallbackError, UsageError
from trainingcompiler.frameworks import pytorch
from trainingcompiler.reporting.events import Note, subscribe

CONFIG = tc.TrainingCompilerConfig(engine="xla", quiet=True)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.alpha = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)), 1.0

    def forward(self, x):
        return self.alpha * self.net(x)


def plain_step(objects):
    model, optimizer = objects["model"], objects["optimizer"]

    def train_step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return train_step


def assert_same_step(make, make_step, data, *, max_compiles=None, may_fall_back=False, config=CONFIG):
    """As `assert_same_training`, for a loop over a compiled function; returns the compiled run."""

    def loop(objects, data):
        step = make_step(objects)
        if pytorch.current_session() is not None:  # the run that is to be judged: `train` has enabled it
            pytorch.disable()
            step = tc.compile(step, config)
        return [step(*batch).item() for batch in data]

    return assert_same_training(make, loop, data, max_compiles=max_compiles, may_fall_back=may_fall_back)


@pytest.mark.parametrize("make", [sgd(), adamw()], ids=["sgd", "adamw"])
def test_same_training(make):
    assert_same_step(make, plain_step, batches(), max_compiles=1)


def test_two_shapes_are_two_programs():
    data = [tuple(t[: 16 if i % 2 else 7] for t in batch) for i, batch in enumerate(batches())]
    assert_same_step(sgd(), plain_step, data, max_compiles=2)


@pytest.mark.parametrize("max_norm", [0.1, 0.5])
def test_clipping_accumulation_and_two_calls_in_the_step(max_norm):
    def make_step(objects):
        model, optimizer = objects["model"], objects["optimizer"]

        def train_step(x, y):
            optimizer.zero_grad(set_to_none=False)
            total = 0.0
            for half in range(2):
                loss = F.cross_entropy(model(x[half::2]), y[half::2]) / 2
                loss.backward()
                total = total + loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            return total + norm

        return train_step

    run = assert_same_step(adamw(), make_step, batches(), max_compiles=2)  # one for each micro-batch
    assert run.statistics.compiled_steps == 23


def test_buffers_and_several_optimizers():
    def make():
        one = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        two = nn.Linear(16, 4)
        return {
            "one": one,
            "two": two,
            "first": torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9),
            "second": torch.optim.Adam(two.parameters(), lr=0.01),
        }

    def make_step(objects):
        def train_step(x, y):
            objects["first"].zero_grad()
            objects["second"].zero_grad()
            loss = F.cross_entropy(objects["two"](objects["one"](x)), y)
            loss.backward()
            objects["first"].step()
            objects["second"].step()
            return loss.detach()

        return train_step

    run = assert_same_step(make, make_step, batches(), max_compiles=2)  # one up to each optimizer's step
    assert run.statistics.compiled_steps == 23


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_hyperparameters_are_read_at_every_step(name):
    def make_step(objects):
        step, count = plain_step(objects), 0

        def train_step(x, y):
            return step(x, y)

        class Scheduled:
            def __call__(self, x, y):
                nonlocal count
                count += 1
                objects["optimizer"].param_groups[0][name] = 0.1 + 0.01 * count
                return self.step(x, y)

        objects["scheduled"] = scheduled = Scheduled()
        scheduled.step = train_step
        return scheduled

    def loop(objects, data):
        scheduled = make_step(objects)
        if pytorch.current_session() is not None:
            pytorch.disable()
            scheduled.step = tc.compile(scheduled.step, CONFIG)
        return [scheduled(x, y).item() for x, y in data]

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_the_structure_of_what_the_step_returns():
    objects = adamw()()
    model, optimizer = objects["model"], objects["optimizer"]

    def train_step(batch, *, name):
        optimizer.zero_grad()
        outputs = model(batch["x"])
        loss = F.cross_entropy(outputs, batch["y"])
        loss.backward()
        optimizer.step()
        return {"loss": loss, "more": [outputs.argmax(1), (name, None, 3)]}

    step = tc.compile(train_step, CONFIG)
    assert step.__name__ == "train_step"
    for x, y in batches(20):
        result = step({"x": x, "y": y}, name="n")
        assert list(result) == ["loss", "more"] and result["more"][1] == ("n", None, 3)
        assert result["loss"].shape == () and result["more"][0].dtype is torch.int64
        assert result["more"][0].shape == (16,) and 0 < result["loss"].item() < 3


def test_the_model_between_steps():
    """Evaluation, edits and checkpoints between steps see and change the state."""

    def loop(objects, data):
        step = plain_step(objects)
        if pytorch.current_session() is not None:
            pytorch.disable()
            step = tc.compile(step, CONFIG)
        seen = []
        for index, (x, y) in enumerate(data):
            seen.append(step(x, y).item())
            with torch.no_grad():
                seen.append(objects["model"](x).sum().item())
                objects["model"][0].weight.mul_(0.99)
            if index == 10:
                saved = {name: value.clone() for name, value in objects["model"].state_dict().items()}
        objects["model"].load_state_dict(saved)
        return [*seen, *(step(x, y).item() for x, y in data[:3])]

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_dropout_follows_the_seed():
    def run(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 4))
        objects = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
        step = tc.compile(plain_step(objects), CONFIG)
        torch.manual_seed(seed)
        return [step(x, y).item() for x, y in batches(20)]

    assert run(1) == run(1) != run(2)


def test_a_function_without_an_optimizer_is_a_usage_error():
    model = mlp()

    def forward_only(x, y):
        return F.cross_entropy(model(x), y)

    with pytest.raises(UsageError, match=r"forward_only.*optimizer\.step\(\)"):
        tc.compile(forward_only, CONFIG)(*batches(1)[0])


def test_a_function_that_trains_nothing_is_a_usage_error():
    objects = sgd()()

    def no_backward(x, y):
        objects["optimizer"].step()
        return F.cross_entropy(objects["model"](x), y)

    with pytest.raises(UsageError, match=r"no_backward.*loss\.backward\(\)"):
        tc.compile(no_backward, CONFIG)(*batches(1)[0])


def test_its_python_runs_at_every_call():
    run = assert_same_step(made(Counting, torch.optim.SGD, lr=0.1), plain_step, batches(), max_compiles=2)
    assert run.objects["model"].calls == 24 and run.statistics.compiled_steps == 23


@pytest.mark.parametrize("model", [WithUnknownOperator, WithFunction])
def test_fallback(model):
    run = assert_same_step(made(model, torch.optim.SGD, lr=0.1), plain_step, batches(), may_fall_back=True)
    (fallback,) = run.fallbacks()
    assert fallback.permanent and fallback.where.startswith(("test_fallback.py:", "test_compile_step.py:"))


def test_debug_shows_the_error_behind_the_line():
    events = []
    unsubscribe = subscribe(events.append)
    try:
        objects = made(WithUnknownOperator, torch.optim.SGD, lr=0.1)()
        step = tc.compile(plain_step(objects), tc.TrainingCompilerConfig(engine="xla", quiet=True, debug=True))
        for batch in batches()[:3]:
            step(*batch)
    finally:
        unsubscribe()
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert "Traceback" in note and "twice.default has no lowering" in note


def test_module_changes_are_seen_between_steps():
    """The step has no hooks in the loop, but has to know that an attribute or the mode has changed."""

    def loop(objects, data):
        step = plain_step(objects)
        if pytorch.current_session() is not None:
            pytorch.disable()
            step = tc.compile(step, CONFIG)
        seen = []
        for index, batch in enumerate(data):
            if index == 8:
                objects["model"].alpha = 2.0
            if index == 16:
                objects["model"].eval()
            seen.append(step(*batch).item())
        return seen

    assert_same_training(made(Scaled, torch.optim.SGD, lr=0.1), loop, batches(), max_compiles=3)


def test_fallback_error():
    objects = made(WithUnknownOperator, torch.optim.SGD, lr=0.1)()
    step = tc.compile(plain_step(objects), tc.TrainingCompilerConfig(engine="xla", quiet=True, fallback="error"))
    with pytest.raises(FallbackError, match=r"trainingcompiler_tests\.twice\.default"):
        for x, y in batches(3):
            step(x, y)


def test_switched_off_it_is_the_function_itself():
    def train_step():
        return 1

    assert tc.compile(train_step, tc.TrainingCompilerConfig(enabled=False, quiet=True)) is train_step


def test_eager_engine_compiles_nothing():
    def loop(objects, data):
        step = tc.compile(plain_step(objects), tc.TrainingCompilerConfig(engine="eager", quiet=True))
        return [step(x, y).item() for x, y in data]

    run = train(sgd(), loop, batches(20), compiled=True, engine="eager")
    assert run.statistics.compiles == 0 and run.statistics.eager_steps >= 20
