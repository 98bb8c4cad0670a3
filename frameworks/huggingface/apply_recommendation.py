"""What the launcher recommends, set in a Trainer's arguments before it is made; and what they tell a planner."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from trainingcompiler.planning import planner, recommendation
from trainingcompiler.planning.batch_scaling import Scaled
from trainingcompiler.planning.recommendation import NotApplicable, scaled_number, scaled_steps
from trainingcompiler.reporting.events import Note, emit

NAME = "huggingface"
_MARK = "_trainingcompiler_scaled"


def init(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.__init__`, its arguments changed before it reads them."""
    scaled = recommendation.for_library(NAME)
    if scaled is not None:
        given = inspect.signature(original).bind_partial(trainer, *args, **kwargs).arguments
        set_arguments(given.get("args"), scaled, own_optimizer=(given.get("optimizers") or (None,))[0])
    return original(trainer, *args, **kwargs)


def set_arguments(arguments: Any, scaled: Scaled, own_optimizer: Any = None) -> None:
    """Changes `transformers.TrainingArguments` from what was planned to what is recommended, once.

    Args:
        arguments: The Trainer's. Those of another batch size than the planned one are left, which is said.
        scaled: What to change.
        own_optimizer: One that the script has made itself.

    Raises:
        NotApplicable: There are none, or the learning rate is not theirs to change.
    """
    before, after = scaled.before, scaled.recipe
    if arguments is None:
        raise NotApplicable("the Trainer is made without args=, which would hold the batch size")
    if getattr(arguments, _MARK, False):
        return
    planned = (before.batch_size, before.accumulation_steps)
    if (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) != planned:
        emit(Note(text=f"a Trainer with a batch of {arguments.per_device_train_batch_size} is left as it is"))
        return
    if own_optimizer is not None and before.lr != after.lr:
        raise NotApplicable(
            "the script makes its own optimizer, whose learning rate the Trainer's arguments do not hold"
        )
    setattr(arguments, _MARK, True)
    arguments.per_device_train_batch_size = after.batch_size
    arguments.gradient_accumulation_steps = after.accumulation_steps
    arguments.learning_rate = scaled_number(arguments.learning_rate, before.lr, after.lr)
    if before.weight_decay:
        arguments.weight_decay = scaled_number(arguments.weight_decay, before.weight_decay, after.weight_decay)
    if after.betas is not None and after.betas != before.betas:
        arguments.adam_beta1, arguments.adam_beta2 = after.betas
        arguments.adam_epsilon = after.epsilon
    if arguments.warmup_steps >= 1 or (after.warmup_steps and not arguments.warmup_steps):  # a share stays a share
        arguments.warmup_steps = after.warmup_steps
    if arguments.max_steps > 0:
        arguments.max_steps = scaled_steps(arguments.max_steps, scaled.factor)


def tell(waiting: planner.Planner, trainer: Any) -> None:
    """Tells a planner what the trainer's arguments hold."""
    arguments = trainer.args
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    total = arguments.max_steps if arguments.max_steps > 0 else None
    if total is None and hasattr(trainer.train_dataset, "__len__"):
        total = max(1, math.ceil(len(trainer.train_dataset) / rows * arguments.num_train_epochs))
    waiting.tell(
        NAME,
        accumulation_steps=arguments.gradient_accumulation_steps,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        warmup_steps=0 if total is None else min(total, arguments.get_warmup_steps(total)),
        total_steps=total,
    )
