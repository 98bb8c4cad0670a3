"""Hyperparameters that change while training, and what is trained."""

import pytest
import torch
from parity import assert_same_training
from small import adamw, batches, made, mlp, sgd
from torch.nn import functional as F
from torch.optim import lr_scheduler

PER_BATCH = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=30),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=10),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.2, step_size_up=5),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 30)], [5]
    ),
}


def scheduled(schedule):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        scheduler = schedule(optimizer)
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            seen += [loss.item(), scheduler.get_last_lr()[0]]
        return seen

    return loop


@pytest.mark.parametrize("schedule", PER_BATCH.values(), ids=PER_BATCH)
def test_scheduler_per_batch(schedule):
    assert_same_training(sgd(), scheduled(schedule), batches(), max_compiles=1)


@pytest.mark.parametrize(
    "make",
    [sgd(), adamw(), made(mlp, torch.optim.Adam, lr=1e-2, amsgrad=True), made(mlp, torch.optim.RMSprop, momentum=0.9)],
    ids=["momentum", "betas", "amsgrad", "rmsprop"],
)
def test_one_cycle_with_momentum(make):
    def schedule(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=30)

    assert_same_training(make, scheduled(schedule), batches(), max_compiles=1)


def test_warm_up_from_zero():
    """Whether a learning rate is zero may be part of the signature; how large it is may not."""

    def schedule(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1.0))

    assert_same_training(adamw(), scheduled(schedule), batches(), max_compiles=2)


@pytest.mark.parametrize("metric", [False, True])
def test_scheduler_per_epoch(metric):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        if metric:
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5)
        else:
            scheduler = lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.2)
        seen = []
        for _ in range(5):
            total = 0.0
            for x, y in data:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                total += loss.item()
            scheduler.step(*([total / len(data)] if metric else []))
            seen += [total, optimizer.param_groups[0]["lr"]]
        assert seen[-1] < seen[1]
        return seen

    assert_same_training(sgd(), loop, batches(5), max_compiles=1)


def test_tensor_learning_rate():
    def make():
        model = mlp()
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-2))}

    def loop(objects, data):
        seen = scheduled(PER_BATCH["exponential"])(objects, data)
        return [float(value) for value in seen]

    assert_same_training(make, loop, batches(), max_compiles=2)


def in_groups(optimizer, **options):
    def make():
        model = mlp()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.002},
        ]
        return {"model": model, "optimizer": optimizer(groups, **options)}

    return make


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_parameter_groups(optimizer):
    assert_same_training(in_groups(optimizer, lr=0.01), scheduled(PER_BATCH["cosine"]), batches(), max_compiles=1)


@pytest.mark.parametrize(
    ("name", "values", "compiles"),
    [
        ("lr", (0.05, 0.01, 0.2), 1),
        ("weight_decay", (0.1, 0.01, 0.3), 1),
        ("weight_decay", (0.1, 0.0, 0.3), 2),
        ("momentum", (0.5, 0.8, 0.1), 1),
        ("momentum", (0.5, 0.0, 0.3), 2),
        ("dampening", (0.1, 0.2, 0.3), 1),
        ("nesterov", (True, False, True), 2),
    ],
)
def test_hyperparameter_changed_in_mid_run(name, values, compiles):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for step, (x, y) in enumerate(data):
            if step % 8 == 3:
                optimizer.param_groups[-1][name] = values[step // 8]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    make = in_groups(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=False)
    # The values before the first change may need a program of their own.
    assert_same_training(make, loop, batches(), max_compiles=compiles + 1)


@pytest.mark.parametrize("make", [sgd(), adamw()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("to_none", [True, False])
def test_freezing_and_unfreezing(make, to_none):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for step, (x, y) in enumerate(data):
            if step in (6, 18):
                model[0].requires_grad_(step == 18)
            optimizer.zero_grad(set_to_none=to_none)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    # Frozen without a gradient, frozen with one that is zero, thawed: a program each.
    assert_same_training(make, loop, batches(), max_compiles=4)


def test_frozen_from_the_start_and_unfrozen_later():
    """The optimizer meets new parameters in the middle of the run, and creates state for them."""

    def make():
        model = mlp()
        model[0].requires_grad_(False)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for step, (x, y) in enumerate(data):
            if step == 8:
                for p in model[0].parameters():
                    p.requires_grad = True
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    run = assert_same_training(make, loop, batches(), max_compiles=3)
    assert run.statistics.eager_steps == 0


def test_frozen_part_outside_of_the_optimizer():
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        return {"model": model, "optimizer": torch.optim.AdamW(trained, lr=0.01)}

    assert_same_training(make, scheduled(PER_BATCH["cosine"]), batches(), max_compiles=1)
