"""The stock Trainer under `enable()`: the same model, one program a step, no look between two logs."""

import pytest
from tasks import TASKS
from training import assert_same_trainer

STEPS, LOGS = 30, 6


@pytest.mark.parametrize("task", TASKS)
def test_thirty_steps_with_accumulation(task, tmp_path):
    run = assert_same_trainer(TASKS[task], tmp_path, gradient_accumulation_steps=2)
    counts = run.statistics
    assert (counts.steps, counts.eager_steps, counts.compiles) == (STEPS, 1, 2)
    assert counts.launches == 2 * counts.compiled_steps  # one for each micro-batch, the step in the last
    assert counts.host_reads <= 2 * LOGS  # the loss and the norm, where they are logged
