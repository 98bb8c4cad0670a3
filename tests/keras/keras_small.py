"""Small models and data for the tests of the Keras adapter."""

import keras
import numpy as np

from trainingcompiler import TrainingCompilerConfig


def data(rows=32, seed=0):
    """Inputs float32[rows, 4] and targets float32[rows, 2]."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, 4)).astype(np.float32)
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)


def dense():
    """Two dense layers."""
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(2)])


def compiled(make, optimizer=lambda: keras.optimizers.Adam(0.01), loss="mse", training_compiler=True, **options):
    """A model made from seed 0 and compiled; `training_compiler=True` stands for the xla engine without fallback."""
    keras.utils.set_random_seed(0)
    model = make()
    if training_compiler is True:
        training_compiler = TrainingCompilerConfig(engine="xla", fallback="error")
    model.compile(optimizer(), loss, training_compiler=training_compiler, **options)
    return model
