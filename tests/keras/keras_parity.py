"""Trains one model twice, by Keras alone and through compiled steps, and compares everything that training changes.

In float64 two orders of summation differ by about 1e-13, and 20 steps may amplify it: 1e-7 relative. In float32 they
differ by about 1e-6 a step: 1e-4 after 20, or three times the difference between Keras's own two engines, its graph
and its XLA, where that is larger (Adam normalises the rounding of a gradient that is truly zero).
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from trainingcompiler import TrainingCompilerConfig

FLOAT64_TOLERANCE = 1e-7
FLOAT32_TOLERANCE = 1e-4
TWIN_FACTOR = 3.0
CONFIG = TrainingCompilerConfig(engine="xla", fallback="error")


@dataclass
class Run:
    """What a training has left behind: the logs of every step, and all variables by path."""

    model: Any
    logs: list[dict]
    history: dict

    def values(self) -> dict[str, np.ndarray]:
        """Everything to compare, by name; the part before "/" is its kind, whose scale judges small values."""
        found = {f"log/{key} {i}": np.float64(value) for i, log in enumerate(self.logs) for key, value in log.items()}
        found |= {f"history/{key}": np.array(value, np.float64) for key, value in self.history.items()}
        for kind, variables in {
            "trainable": self.model.trainable_variables,
            "fixed": self.model.non_trainable_variables,
            "optimizer": self.model.optimizer.variables if self.model.optimizer else [],
            "metric": self.model.metrics_variables,
        }.items():
            found |= {f"{kind}/{index} {v.path}": v.numpy().astype(np.float64) for index, v in enumerate(variables)}
        return found


class _Logs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


def train(make: Callable, data: tuple, option: Any, fit: dict, **compile_options: Any) -> Run:
    """Makes a model from seed 0, and fits it; functions among the compile options are called for a fresh object."""
    keras.utils.set_random_seed(0)
    model = make()
    fresh = {key: value() if callable(value) else value for key, value in compile_options.items()}
    model.compile(**fresh, training_compiler=option)
    logs = _Logs()
    options = {"batch_size": 8, "epochs": 1, "verbose": 0, "shuffle": False} | fit
    if not isinstance(data, tuple):
        options.pop("batch_size")
    given = data if isinstance(data, tuple) else (data,)
    history = model.fit(*given, callbacks=[logs], **options)
    return Run(model, logs.logs, history.history)


def assert_same_training(
    make: Callable,
    data: Any,
    *,
    fit: dict | None = None,
    reference: bool | None = None,
    dtype: str = "float64",
    programs: int = 1,
    **compile_options: Any,
) -> Run:
    """Asserts that compiled steps train the model that Keras trains.

    Args:
        make: Makes the model.
        data: What `fit` trains on: a tuple of its first arguments, or a dataset or the like.
        fit: Further arguments of `fit`.
        reference: `jit_compile` of Keras's own training; with dropout it has to be True, because TensorFlow's graph
            draws other random numbers than its XLA.
        dtype: Keras's `floatx`.
        programs: How many programs are compiled.
        **compile_options: Of `model.compile`; functions make fresh objects.
    """
    with floatx(dtype):
        right = train(make, data, False, fit or {}, jit_compile=bool(reference), **compile_options)
        ours = train(make, data, CONFIG, fit or {}, **compile_options)
        assert len(ours.model.train_function._runner._steps) == programs
        difference = differences(right, ours)
        tolerance = dict.fromkeys(difference, FLOAT64_TOLERANCE if dtype == "float64" else FLOAT32_TOLERANCE)
        if dtype != "float64" and reference is None and any(difference[key] > tolerance[key] for key in difference):
            twin = train(make, data, False, fit or {}, jit_compile=True, **compile_options)
            noise = differences(right, twin)
            tolerance = {key: max(tolerance[key], TWIN_FACTOR * noise[key]) for key in tolerance}
    wrong = {key: (difference[key], tolerance[key]) for key in difference if not difference[key] <= tolerance[key]}
    assert not wrong, wrong
    return ours


def differences(right: Run, other: Run) -> dict[str, float]:
    """The largest relative difference of each value; one far below the scale of its kind is judged by that scale."""
    one, two = right.values(), other.values()
    assert [key.split(" ")[0] for key in one] == [key.split(" ")[0] for key in two]
    scales: dict[str, float] = {}
    for key, value in one.items():
        scales[key.split("/")[0]] = max(scales.get(key.split("/")[0], 0.0), _largest(value))
    result = {}
    for (key, a), b in zip(one.items(), two.values(), strict=True):
        assert a.shape == b.shape, key
        scale = max(_largest(a), 1e-3 * scales[key.split("/")[0]], 1e-30)
        result[key] = _largest(a - b) / scale
    return result


@contextmanager
def floatx(dtype: str):
    """Keras's default dtype inside."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)


def _largest(value: Any) -> float:
    return float(np.max(np.abs(value), initial=0.0))
