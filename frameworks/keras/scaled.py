"""What the launcher recommends, set where Keras holds it: `fit` and the optimizer; and what they tell a planner."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from trainingcompiler import planner, recommended
from trainingcompiler.events import Note, emit
from trainingcompiler.recommended import NotApplicable, scaled_number, scaled_steps
from trainingcompiler.scaling import Scaled

NAME = "keras"
_DEFAULT_BATCH_SIZE = 32  # what Keras takes of arrays where `fit` is given none
_fit: Callable = TensorFlowTrainer.fit
_scaled: "weakref.WeakSet[Any]" = weakref.WeakSet()  # optimizers, each of which is changed once


def install() -> None:
    """Puts ours in front of `fit`."""

    @functools.wraps(_fit)
    def fit(model: Any, *args: Any, **kwargs: Any) -> Any:
        if planner.current is not None and model.optimizer is not None:
            planner.current.tell(NAME, **recipe_of(model.optimizer))
        wanted = recommended.for_library(NAME)
        if wanted is None or model.optimizer is None:
            return _fit(model, *args, **kwargs)
        given = inspect.signature(_fit).bind(model, *args, **kwargs)
        set_batch(given.arguments, wanted)
        set_optimizer(model.optimizer, wanted)
        return _fit(*given.args, **given.kwargs)

    TensorFlowTrainer.fit = fit


def uninstall() -> None:
    """Leaves `fit` as it was."""
    TensorFlowTrainer.fit = _fit


def recipe_of(optimizer: Any) -> dict[str, Any]:
    """Fields of `scaling.Recipe` that a Keras optimizer holds."""
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate.get_config().get("initial_learning_rate", 0.0)
    found: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "lr": float(rate) if not callable(rate) else 0.0,
        "weight_decay": optimizer.weight_decay or 0.0,
        "accumulation_steps": optimizer.gradient_accumulation_steps or 1,
        "ema_decay": optimizer.ema_momentum if optimizer.use_ema else None,
    }
    if hasattr(optimizer, "beta_1") and hasattr(optimizer, "beta_2"):
        found["betas"], found["epsilon"] = (optimizer.beta_1, optimizer.beta_2), optimizer.epsilon
    return found


def set_batch(arguments: dict[str, Any], scaled: Scaled) -> None:
    """Changes the arguments of `fit`: its batch size, or that of the dataset it is given.

    A `fit` with another batch size than the planned one is left, which is said.

    Raises:
        NotApplicable: The batches are made by code of the script's own.
    """
    before, after = scaled.before.batch_size, scaled.recipe.batch_size
    if before == after:
        return
    data = arguments.get("x")
    if isinstance(data, tf.data.Dataset):
        arguments["x"] = data.rebatch(after)
    elif data is None or callable(getattr(data, "__next__", None)) or isinstance(data, keras.utils.PyDataset):
        raise NotApplicable(f"fit is given {type(data).__name__}, which makes its own batches")
    elif (own := arguments.get("batch_size") or _DEFAULT_BATCH_SIZE) != before:
        emit(Note(text=f"a fit with a batch of {own} is left as it is"))
        return
    else:
        arguments["batch_size"] = after
    if arguments.get("steps_per_epoch"):
        arguments["steps_per_epoch"] = scaled_steps(arguments["steps_per_epoch"], after / before)


def set_optimizer(optimizer: Any, scaled: Scaled) -> None:
    """Changes an optimizer, once.

    Raises:
        NotApplicable: Its learning rate is a schedule, or it has already been built without accumulation.
    """
    if optimizer in _scaled:
        return
    before, after = scaled.before, scaled.recipe
    if after.lr != before.lr:
        if isinstance(optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            raise NotApplicable("the learning rate is a schedule of the script's own")
        optimizer.learning_rate = scaled_number(float(optimizer.learning_rate), before.lr, after.lr)
    if after.accumulation_steps != before.accumulation_steps:
        if optimizer.built and before.accumulation_steps == 1:
            raise NotApplicable("the optimizer has already been built without accumulation")
        optimizer.gradient_accumulation_steps = after.accumulation_steps if after.accumulation_steps > 1 else None
    if before.weight_decay:
        optimizer.weight_decay = scaled_number(optimizer.weight_decay, before.weight_decay, after.weight_decay)
    if after.betas is not None and after.betas != before.betas:
        (optimizer.beta_1, optimizer.beta_2), optimizer.epsilon = after.betas, after.epsilon
    if after.ema_decay is not None:
        optimizer.ema_momentum = after.ema_decay
    _scaled.add(optimizer)
