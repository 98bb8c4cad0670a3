"""What a first step trains with, compared with what was decided."""

import dataclasses

import pytest

from trainingcompiler.errors import UsageError
from trainingcompiler.planning import first_step
from trainingcompiler.planning.first_step import BY_HAND, FirstStep, Group, compare


def step(*rates: float, calls: tuple[int, ...] = (8,), **more) -> FirstStep:
    groups = [Group(**{"lr": rate, "base": rate, "peak": rate, **more, "name": str(i)}) for i, rate in enumerate(rates)]
    return FirstStep(calls=calls, groups=tuple(groups))


def scheduled(lr: float, peak: float, schedule: str) -> FirstStep:
    return FirstStep(calls=(8,), groups=(Group(name="SGD", lr=lr, base=peak, peak=peak, schedule=schedule),))


def test_what_is_as_decided():
    assert compare(step(0.1, 0.0, 1.0), step(0.2, 0.0, 2.0 * (1 + 1e-7)), lr=2, weight_decay=1).differences == ()


@pytest.mark.parametrize(
    ("seen", "factor", "said"),
    [
        (step(0.8, 8.0), 4.0, ("the learning rate of 0: 0.2 decided, 0.8 in the script", "the learning rate of 1: 2")),
        (step(0.2, 1.0), 1.0, ("the learning rate of 1: 2 decided, 1 in the script",)),
        (step(0.1, 2.0), 1.0, ("the learning rate of 0: 0.2 decided, 0.1 in the script",)),
        (step(0.0, 0.0), 1.0, ("the learning rate of 0: 0.2 decided, 0 in the script", "the learning rate of 1")),
        (step(0.2), 1.0, ("groups of the optimizers: 2 when planned, 1 with the changes",)),
    ],
)
def test_rates_that_differ_have_one_factor_or_none(seen, factor, said):
    found = compare(step(0.1, 1.0), seen, lr=2, weight_decay=1)
    assert found.factor == pytest.approx(factor) and len(found.differences) == len(said)
    assert all(line.startswith(text) for line, text in zip(found.differences, said, strict=True))


def test_a_weight_decay_is_never_made_up_for():
    found = compare(step(0.1, weight_decay=0.1), step(0.2, weight_decay=0.1), lr=2, weight_decay=3)
    assert found.differences == ("the weight decay of 0: 0.3 decided, 0.1 in the script",) and found.factor == 1


def test_a_schedulers_first_rate_is_its_own_and_said():
    found = compare(scheduled(0.01, 0.1, "LambdaLR"), scheduled(0.05, 0.2, "LambdaLR"), lr=2, weight_decay=1)
    assert found.differences == ()
    assert found.remarks == (
        "LambdaLR begins at 0.05 and goes up to 0.2; planned it began at 0.01: it follows from the script's own number "
        "of steps",
    )


def test_a_rate_that_is_set_by_hand_has_to_be_right_at_once():
    planned = scheduled(0.01, 0.1, BY_HAND)
    assert compare(planned, scheduled(0.02, 0.2, BY_HAND), lr=2, weight_decay=1).differences == ()
    assert compare(planned, scheduled(0.02, 0.1, BY_HAND), lr=2, weight_decay=1).differences == ()  # made with any rate
    (said,) = compare(planned, scheduled(0.08, 0.2, BY_HAND), lr=2, weight_decay=1).differences
    assert said == (
        "the learning rate of SGD in the first step: 0.02 decided, 0.08 in the script, which sets it by hand"
    )


def test_a_run_is_held_against_its_rehearsal():
    decided = step(0.1, 1.0, calls=(8, 8), weight_decay=0.1)
    first_step.check(decided, first_step.from_json(first_step.as_json(decided)))
    other = dataclasses.replace(decided.groups[1], lr=0.5, weight_decay=0.0)
    with pytest.raises(UsageError) as refused:
        first_step.check(decided, FirstStep(calls=(8,) * 6, groups=(decided.groups[0], other)))
    assert str(refused.value).splitlines()[:4] == [
        "the first step is not the one that was decided and rehearsed, and nothing has been trained:",
        "  the rows of each batch that the step adds up: 8, 8 decided, 8, 8, 8, 8, and 2 more in the run",
        "  the learning rate of 1: 1 decided, 0.5 in the run",
        "  the weight decay of 1: 0.1 decided, 0 in the run",
    ]
    with pytest.raises(UsageError, match="groups of the optimizers: 2 decided, 1 in the run"):
        first_step.check(decided, step(0.1, calls=(8, 8), weight_decay=0.1))
