"""Keras's learning-rate schedules, scaled as a whole: the rates, and the steps that they count."""

import math
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

_RATES = ("initial_learning_rate", "end_learning_rate", "warmup_target", "values")
_STEPS = ("decay_steps", "first_decay_steps", "warmup_steps")
_BOUNDARIES = "boundaries"  # the last steps of a rate: whole numbers, as steps are
_ASKED = (0, *(int(1.1**power) for power in range(150)))  # steps at which a schedule of the script's own tells its rate


def is_schedule(rate: Any) -> bool:
    """Whether a learning rate is a schedule."""
    return isinstance(rate, LearningRateSchedule)


def scaled_schedule(schedule: Any, *, rate_factor: float, step_factor: float) -> Any:
    """The schedule whose rate at step s is `rate_factor` times that of `schedule` at step s x `step_factor`.

    Keras's own are made anew with other numbers, so that a model that is saved with one can be loaded anywhere.
    """
    if not _is_of_keras(schedule):
        return ScaledSchedule(schedule, rate_factor, step_factor)
    config = dict(schedule.get_config())
    for name in _RATES:
        if config.get(name) is not None:
            config[name] = _times(config[name], rate_factor)
    for name in _STEPS:
        if config.get(name) is not None:
            config[name] = _times(config[name], 1 / step_factor)
    if config.get(_BOUNDARIES) is not None:
        config[_BOUNDARIES] = [math.floor(boundary / step_factor) for boundary in config[_BOUNDARIES]]
    return type(schedule).from_config(config)


def peak_of(schedule: Any) -> float:
    """The highest rate of a schedule; of one of the script's own, at the steps at which it is asked."""
    if isinstance(schedule, ScaledSchedule):
        return schedule.rate_factor * peak_of(schedule.schedule)
    if not _is_of_keras(schedule):
        return max((rate for step in _ASKED if math.isfinite(rate := float(schedule(step)))), default=0.0)
    config = schedule.get_config()
    rates = [config.get("initial_learning_rate"), config.get("warmup_target"), *(config.get("values") or ())]
    return max(float(rate) for rate in rates if rate is not None)


@keras.saving.register_keras_serializable("trainingcompiler")
class ScaledSchedule(LearningRateSchedule):
    """A schedule of the script's own, with other rates and another pace.

    Args:
        schedule: The script's.
        rate_factor: Of its rates.
        step_factor: How many of its steps one step is.
    """

    def __init__(self, schedule: Any, rate_factor: float, step_factor: float):
        self.schedule, self.rate_factor, self.step_factor = schedule, rate_factor, step_factor

    def __call__(self, step: Any) -> Any:
        """The rate at a step; the script's schedule is asked with steps of the kind that Keras gives it."""
        whole = self.step_factor == int(self.step_factor)
        factor = int(self.step_factor) if whole else self.step_factor
        asked = step * factor if whole else keras.ops.cast(step, "float32") * factor
        return self.schedule(asked) * self.rate_factor

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes it of again."""
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "rate_factor": self.rate_factor,
            "step_factor": self.step_factor,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ScaledSchedule":
        """A schedule as `get_config` describes it."""
        return cls(**{**config, "schedule": keras.saving.deserialize_keras_object(config["schedule"])})


def _is_of_keras(schedule: Any) -> bool:
    return type(schedule).__module__.split(".")[0] == "keras"


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list | tuple):
        return [_times(item, factor) for item in value]
    product = value * factor
    return int(product) if isinstance(value, int) and product == int(product) else product
