"""Loops by chance train the model that eager trains: 50 in CI, 2,000 by `make fuzz`, and every failure so far."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, example, given, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))

from loops import LOOPS, Loop, batches, make, run
from parity import FLOAT64_TOLERANCE, assert_same, train

COUNT = int(os.environ.get("FUZZ_LOOPS", "50"))


def loop(**changes) -> Loop:
    """The plain loop, with changes."""
    plain = dict(
        layers=(), loss="cross entropy", optimizers=("sgd",), schedule=None, accumulate=1, clip=None, zero="first",
        reads=frozenset(), weight=None, events=(),
    )  # fmt: skip
    return Loop(**{**plain, **changes})


@settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=COUNT == 50,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # an example takes a second: shrinking one takes minutes
)
@given(LOOPS)
@example(loop())
@example(loop(clip="value", events=((8, "two calls"), (9, "skip the step"))))  # clipping outlived its gradients
@example(loop(layers=("batch norm",), events=((3, "freeze"),)))  # fake kernels make a gradient that nobody asked for
def test_a_loop_by_chance(loop):
    """In float64, against the noise of eager itself: a twin whose rows are summed in the opposite order.

    A bias before BatchNorm has a true gradient of zero, and adaptive optimizers normalize its rounding.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        data = [(x.double(), y) for x, y in batches(loop)]
        eager, twin = (train(make(loop), run(loop, reverse), data, compiled=False) for reverse in (False, True))
        compiled = train(make(loop), run(loop), data, compiled=True)
    finally:
        torch.set_default_dtype(default)
    assert_same(eager, compiled, twin, floor=FLOAT64_TOLERANCE)
