"""What a planner is told of the groups of a script's optimizers."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.frameworks.pytorch.session.first_step_watch import FirstStepWatch
from trainingcompiler.frameworks.pytorch.session.session import Session
from trainingcompiler.planning import planner
from trainingcompiler.planning.first_step import BY_HAND, Group


class Own(schedules.LRScheduler):
    """A scheduler as scripts have them: a warm-up to a rate that it is given."""

    def __init__(self, optimizer, max_lr):
        self.max_lr = max_lr
        super().__init__(optimizer)

    def get_lr(self):
        return [min(self.max_lr, 0.01 * (1 + self.last_epoch)) for _ in self.base_lrs]


@pytest.fixture
def groups(monkeypatch):
    """Tells the groups of an SGD at 0.1, after something has been done with it."""
    monkeypatch.setattr(planner, "current", planner.Planner())

    def seen(change) -> tuple[Group, ...]:
        session = Session(TrainingCompilerConfig(engine="xla"))
        watch = FirstStepWatch(session)
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.2)
        session.registry.register(optimizer)
        watch.made(optimizer)
        kept = change(optimizer)  # a scheduler that somebody holds
        watch.steps()
        del kept
        return planner.current.first_step.groups

    return seen


@pytest.mark.parametrize(
    ("make", "schedule", "lr", "base", "peak"),
    [
        (lambda o: None, "", 0.1, 0.1, 0.1),
        (lambda o: schedules.CosineAnnealingLR(o, 100), "CosineAnnealingLR", 0.1, 0.1, 0.1),
        (lambda o: schedules.LinearLR(o, 0.1), "LinearLR", 0.01, 0.1, 0.1),
        (lambda o: schedules.OneCycleLR(o, 0.5, total_steps=100), "OneCycleLR", 0.02, 0.5, 0.5),
        (lambda o: schedules.CyclicLR(o, 0.1, 0.4), "CyclicLR", 0.1, 0.1, 0.4),
        (lambda o: schedules.LambdaLR(o, lambda step: min(step + 1, 500) / 1000), "LambdaLR", 1e-4, 0.1, 0.05),
        (lambda o: schedules.LambdaLR(o, lambda step: [0.5, 4.0][step]), "LambdaLR", 0.05, 0.1, 0.4),
        (
            lambda o: schedules.SequentialLR(
                o, [schedules.LambdaLR(o, lambda step: step + 1), schedules.ExponentialLR(o, 0.9)], [1]
            ),
            "SequentialLR", 0.1, 0.1, 0.1,
        ),
        (lambda o: Own(o, 0.3), "Own", 0.01, 0.1, 0.3),
        (lambda o: o.param_groups[0].update(lr=0.04), BY_HAND, 0.04, 0.1, 0.1),
        (lambda o: o.param_groups[0].update(lr=torch.tensor(0.25)), BY_HAND, 0.25, 0.1, 0.1),
    ],
)  # fmt: skip
def test_where_a_rate_comes_from(groups, make, schedule, lr, base, peak):
    (group,) = groups(make)
    assert group.schedule == schedule and group.name == "SGD" and group.weight_decay == 0.2
    assert (group.lr, group.base, group.peak) == pytest.approx((lr, base, peak))
