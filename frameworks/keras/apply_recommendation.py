"""What the launcher recommends, set where Keras holds it: `fit` and the optimizer; and what they tell a planner."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.frameworks.keras.schedules import is_schedule, peak_of, scaled_schedule
from trainingcompiler.planning import first_step, planner, recommendation
from trainingcompiler.planning.batch_scaling import Scaled
from trainingcompiler.planning.first_step import BY_HAND, FirstStep, Group
from trainingcompiler.planning.recommendation import NotApplicable, scaled_number, scaled_steps
from trainingcompiler.reporting.events import Note, emit

NAME = "keras"
_DEFAULT_BATCH_SIZE = 32  # what Keras takes of arrays where `fit` is given none
_fit: Callable = TensorFlowTrainer.fit
_patches = Patches()
_scaled: "weakref.WeakSet[Any]" = weakref.WeakSet()  # optimizers, each of which is changed once
_bases: "weakref.WeakKeyDictionary[Any, float]" = weakref.WeakKeyDictionary()  # optimizer -> its rate when `fit` began
_is_over = False  # the first step of the run has been taken


def install() -> None:
    """Puts ours in front of `fit`."""

    @functools.wraps(_fit)
    def fit(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.optimizer is None:
            return _fit(model, *args, **kwargs)
        given = inspect.signature(_fit).bind(model, *args, **kwargs)
        wanted = recommendation.for_library(NAME)
        if wanted is not None:
            set_batch(given.arguments, wanted)
            set_optimizer(model.optimizer, wanted)
        if planner.current is not None:
            planner.current.tell(NAME, **recipe_of(model.optimizer))
        for optimizer in _parts(model.optimizer):
            _bases.setdefault(optimizer, _rate(optimizer))
        return _fit(*given.args, **given.kwargs)

    _patches.replace(TensorFlowTrainer, "fit", fit, "the batch and the rate that were decided are set here")


def uninstall() -> None:
    """Leaves `fit` as it was."""
    _patches.restore()


def recipe_of(optimizer: Any) -> dict[str, Any]:
    """Fields of `scaling.Recipe` that a Keras optimizer holds."""
    found: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "lr": max(map(_peak, _parts(optimizer)), default=0.0),
        "weight_decay": optimizer.weight_decay or 0.0,
        "accumulation_steps": optimizer.gradient_accumulation_steps or 1,
        "ema_decay": optimizer.ema_momentum if optimizer.use_ema else None,
    }
    if hasattr(optimizer, "beta_1") and hasattr(optimizer, "beta_2"):
        found["betas"], found["epsilon"] = (optimizer.beta_1, optimizer.beta_2), optimizer.epsilon
    return found


def see_first_step(optimizer: Any, batch: Any) -> None:
    """Tells a planner what the first step trains with; in a run, holds it against what was decided.

    Args:
        optimizer: Of the model, with the step still to be taken.
        batch: What the step is given; None where TensorFlow takes it, and nobody sees it.

    Raises:
        UsageError: It is not what was decided.
    """
    global _is_over
    if _is_over or optimizer is None:
        return
    decided = recommendation.decided()
    calls = (_rows(batch),) if batch is not None else decided.calls if decided is not None else ()
    seen = FirstStep(calls=calls, groups=tuple(map(_group, _parts(optimizer))))
    if planner.current is not None:
        planner.current.first_step = seen
    elif decided is not None:
        first_step.check(decided, seen)
    _is_over = True


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that have a rate: of a `MultiOptimizer`, those inside, which may be known once it is built."""
    return list(getattr(optimizer, "_inner_optimizers", [optimizer]))


def _rows(batch: Any) -> int:
    shapes = [leaf.shape for leaf in tf.nest.flatten(batch) if hasattr(leaf, "shape")]
    return next((int(shape[0]) for shape in shapes if len(shape)), 0)


def _group(optimizer: Any) -> Group:
    lr, rate = _rate(optimizer), optimizer._learning_rate
    peak = base = _bases.get(optimizer, lr)
    if is_schedule(rate):
        schedule, peak = type(rate).__name__, _peak(optimizer)
    else:
        schedule = BY_HAND if not first_step.is_close(base, lr) else ""
    return Group(
        name=type(optimizer).__name__,
        lr=lr,
        base=base,
        peak=peak,
        schedule=schedule,
        weight_decay=float(optimizer.weight_decay or 0.0),
    )


def _rate(optimizer: Any) -> float:
    """The rate of the next step."""
    return float(optimizer.learning_rate)


def _peak(optimizer: Any) -> float:
    rate = optimizer._learning_rate
    return peak_of(rate) if is_schedule(rate) else _rate(optimizer)


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

    A schedule counts the batches of `fit`, of which there are fewer if they have more rows: it is read at what was
    that place in the data, whatever becomes of the rate.

    Raises:
        NotApplicable: Its learning rate is a function, or it has already been built without accumulation.
    """
    if optimizer in _scaled:
        return
    before, after = scaled.before, scaled.recipe
    if _parts(optimizer) != [optimizer]:
        raise NotApplicable(f"{type(optimizer).__name__} has several optimizers, each with a rate of its own")
    rate = optimizer._learning_rate
    rows, factor = after.batch_size / before.batch_size, after.lr / before.lr
    if is_schedule(rate):
        if rows != 1 or factor != 1:
            optimizer.learning_rate = scaled_schedule(rate, rate_factor=factor, step_factor=rows)
            emit(
                Note(
                    text=f"{type(rate).__name__} goes {rows:g} times as fast, because a step has as many times the "
                    f"rows, and its rates are multiplied by {factor:.6g}"
                )
            )
    elif factor != 1:
        if not isinstance(rate, keras.Variable) and callable(rate):
            raise NotApplicable("the learning rate is a function of the script's own")
        optimizer.learning_rate = scaled_number(_rate(optimizer), before.lr, after.lr)
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
