"""Checkpoints: resumed runs repeat, and either kind of run goes on from the other's."""

from pathlib import Path

import pytest
import torch
from parity import FLOAT32_TOLERANCE, train
from tasks import TASKS, gpt2
from training import losses, trainer

STEPS, SAVED = 12, 6
DATA = TASKS["gpt2"].data()


def run(folder: Path, *, compiled: bool, resume: Path | None = None, **changes) -> tuple[dict, list[float]]:
    """Trains a GPT-2 with dropout; returns its weights and what was logged."""

    def loop(objects, data):
        made = trainer(
            objects, data, folder, max_steps=STEPS, warmup_steps=2, logging_steps=3, save_strategy="steps",
            save_steps=SAVED, gradient_accumulation_steps=2,
        )  # fmt: skip
        made.train(resume_from_checkpoint=None if resume is None else str(resume / f"checkpoint-{SAVED}"))
        return losses(made)

    done = train(lambda: {"model": gpt2(**changes)}, loop, DATA, compiled=compiled)
    assert not done.fallbacks()
    assert not compiled or done.statistics.compiles == 2  # one for each micro-batch; saving changes nothing
    return done.objects["model"].state_dict(), done.observed


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(compiled, tmp_path):
    dropout = {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    whole, logged = run(tmp_path / "whole", compiled=compiled, **dropout)
    resumed, logged_again = run(tmp_path / "again", compiled=compiled, resume=tmp_path / "whole", **dropout)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged_again[:-1] == logged[:-1]  # the last is the mean over the steps of this process


@pytest.mark.parametrize("compiled", [False, True], ids=["eager goes on", "compiled goes on"])
def test_one_goes_on_from_the_checkpoint_of_the_other(compiled, tmp_path):
    expected, logged = run(tmp_path / "expected", compiled=compiled)
    run(tmp_path / "other", compiled=not compiled)
    mixed, logged_again = run(tmp_path / "mixed", compiled=compiled, resume=tmp_path / "other")
    assert logged_again[:-1] == pytest.approx(logged[:-1], rel=FLOAT32_TOLERANCE)
    for name in expected:
        # Adam moves a weight by up to the learning rate (1e-3) where a gradient is rounding alone.
        assert torch.allclose(mixed[name], expected[name], rtol=FLOAT32_TOLERANCE, atol=2e-4), name
