"""`torch.use_deterministic_algorithms` holds in a GPU program too."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.aot.step_program import compile_step
from trainingcompiler.targets.target import Target

pytestmark = pytest.mark.gpu_plan


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def text() -> str:
    """A step with an embedding, whose gradient adds rows in any order: atomics, unless told otherwise."""
    model = nn.Sequential(nn.Embedding(100, 64), nn.Flatten(), nn.Linear(64 * 32, 4))
    ids, labels = torch.zeros(16, 32, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compile_step(
        model, optimizer, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (ids, labels), Target.gpu("h200")
    )
    return step.as_text()


def unordered(program: str) -> list[str]:
    """The scatters that may add to one place from two indices, in any order."""
    scatters = [line for line in program.splitlines() if re.search(r" scatter\(", line)]
    return [line for line in scatters if "unique_indices=true" not in line]


def test_rows_are_added_in_any_order_otherwise():
    assert unordered(text())


def test_rows_are_added_in_one_order(deterministic):
    assert not unordered(text())
