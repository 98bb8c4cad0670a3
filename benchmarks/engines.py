"""The engines of the benchmark: who runs the step. Each is a function from a workload to one that runs a step.

A step returns its loss, and is finished when that has been read as a Python number, for every engine alike.
What an engine has to import and to start is imported and started here, inside the timed first steps.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import LEARNING_RATE, Workload

Step = Callable[[], Any]


def eager(work: Workload, cache: Path) -> Step:
    """PyTorch as it is."""
    return _loop(work, work.model, work.optimizer.step)


def inductor(work: Workload, cache: Path) -> Step:
    """`torch.compile` of the model and of the optimizer's step."""
    return _loop(work, torch.compile(work.model), torch.compile(work.optimizer.step))


def tc_compile(work: Workload, cache: Path) -> Step:
    """`trainingcompiler.compile` of the function that does one step."""
    import trainingcompiler as tc

    def train_step(*batch):
        work.optimizer.zero_grad()
        loss = work.loss(work.model, *batch)
        loss.backward()
        work.optimizer.step()
        return loss

    step = tc.compile(train_step, config=_config(cache))
    return lambda: step(*work.batch)


def tape(work: Workload, cache: Path) -> Step:
    """The ordinary loop under `trainingcompiler.enable()`."""
    import trainingcompiler as tc

    tc.enable(_config(cache))
    return _loop(work, work.model, work.optimizer.step)


def jax_by_hand(work: Workload, cache: Path) -> Step:
    """The step of `jax_gpt2`, GPT-2 only."""
    import jax
    import jax_gpt2

    if jax_gpt2.LEARNING_RATE != LEARNING_RATE:
        raise AssertionError("the hand-written step must train like the workload")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    step = jax_gpt2.make_step(work.model.config.n_head)
    state = jax_gpt2.initial_state(work.model)
    ids = work.batch[0].numpy()

    def run() -> Any:
        nonlocal state
        state, loss = step(state, ids)
        return loss

    return run


BEFORE = "before"  # the tape of another checkout
ENGINES = {
    "eager": eager,
    "inductor": inductor,
    "tc.compile": tc_compile,
    "tape": tape,
    BEFORE: tape,
    "jax": jax_by_hand,
}


def _loop(work: Workload, model: Callable, optimizer_step: Callable) -> Step:
    def run() -> torch.Tensor:
        work.optimizer.zero_grad()
        loss = work.loss(model, *work.batch)
        loss.backward()
        optimizer_step()
        return loss

    return run


def _config(cache: Path):
    """Always compiled: a benchmark of the fallback would be one of eager, under another name."""
    from trainingcompiler import TrainingCompilerConfig

    return TrainingCompilerConfig(engine="xla", fallback="error", cache_dir=str(cache), quiet=True)
