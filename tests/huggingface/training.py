"""Runs one Trainer by itself, with batches in another order, and compiled; and compares."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from parity import Run, assert_same, train
from tasks import Task


def trainer(
    objects: dict[str, Any],
    data: list,
    folder: Path,
    *,
    reverse: bool = False,
    kind: type[hf.Trainer] = hf.Trainer,
    **options: Any,
) -> hf.Trainer:
    """The stock Trainer, quiet, with warm-up and clipping.

    Args:
        objects: Holds the model.
        data: The examples.
        folder: For checkpoints.
        reverse: Whether to turn the rows of every batch round: the same model, summed in another order.
        kind: A subclass of the Trainer.
        **options: For `TrainingArguments`; `trainer`, for the Trainer itself.
    """
    given = options.pop("trainer", {})
    plain = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-3, max_steps=30, warmup_steps=5,
        max_grad_norm=0.5, logging_steps=5, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    collate = given.pop("data_collator", hf.default_data_collator)
    arguments = hf.TrainingArguments(str(folder), **{**plain, **options})
    made = kind(
        model=objects["model"],
        args=arguments,
        train_dataset=data,
        data_collator=(lambda rows: collate(rows[::-1])) if reverse else collate,
        **given,
    )
    made.remove_callback(hf.PrinterCallback)
    return made


def losses(done: hf.Trainer) -> list[float]:
    """What the Trainer has logged: losses, gradient norms, evaluations."""
    names = ("loss", "grad_norm", "eval_loss", "train_loss", "eval_accuracy")
    return [log[name] for log in done.state.log_history for name in names if name in log]


def assert_same_trainer(
    task: Task,
    folder: Path,
    use: Callable[[hf.Trainer], Any] = lambda made: made.train(),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Run:
    """Asserts that the compiled Trainer trains the model that it trains by itself.

    Args:
        task: The model and its data.
        folder: For checkpoints.
        use: What is done with the trainer.
        dtype: Of the weights. float64 leaves little room for noise: the Trainer itself sums losses, and its label
            smoother probabilities, in float32 (1e-7), which ten steps may amplify to 1e-5.
        **options: As for `trainer`.

    Returns:
        The compiled run; its objects have the trainer.
    """

    def run(compiled: bool, reverse: bool = False) -> Run:
        def loop(objects, data):
            made = trainer(objects, data, folder / f"{compiled}{reverse}", reverse=reverse, **copy.deepcopy(options))
            objects["trainer"] = made
            use(made)
            return losses(made)

        return train(lambda: {"model": task.model().to(dtype)}, loop, task.data(), compiled=compiled)

    twin = run(False, reverse=True) if dtype is torch.float32 else None
    eager, compiled = run(False), run(True)
    assert not compiled.fallbacks(), compiled.fallbacks()
    assert_same(eager, compiled, twin, float64_tolerance=1e-5)
    return compiled
