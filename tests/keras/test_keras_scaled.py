"""What the launcher recommends, in `fit` and in a Keras optimizer."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainingcompiler.frameworks.keras import scaled as keras_scaled
from trainingcompiler.recommended import NotApplicable
from trainingcompiler.scaling import Recipe, keep_global, rescale

SCRIPT = """
import keras
import numpy as np

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(3)])
model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
x, y = np.random.rand(128, 16).astype("float32"), np.random.randint(0, 3, 128)
model.fit(x, y, batch_size=16, epochs=2, verbose=0)
model.fit(x, y, batch_size=16, epochs=1, verbose=0)
print("trained", round(float(model.optimizer.learning_rate), 6), int(model.optimizer.iterations))
"""


def test_a_script_is_trained_with_another_batch(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "trainingcompiler.launch", "--batch-size=64", "train.py"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained 0.2 6"  # 4 x the rate once, and 2 steps an epoch


def recipe(**more) -> Recipe:
    return Recipe(**{"batch_size": 8, "lr": 0.1, "optimizer": "SGD", **more})


def test_a_dataset_is_batched_again():
    data = tf.data.Dataset.from_tensor_slices(np.arange(48)).batch(8)
    arguments = {"x": data, "steps_per_epoch": 6}
    keras_scaled.set_batch(arguments, rescale(recipe(), batch_size=32))
    assert [len(batch) for batch in arguments["x"]] == [32, 16] and arguments["steps_per_epoch"] == 2


def test_batches_of_the_scripts_own_are_refused():
    left = {"x": np.zeros((4, 2)), "batch_size": 4}
    keras_scaled.set_batch(left, rescale(recipe(), batch_size=32))
    assert left["batch_size"] == 4  # another fit than the planned one
    with pytest.raises(NotApplicable, match="fit is given generator, which makes its own batches. Either leave it as"):
        keras_scaled.set_batch({"x": (batch for batch in ())}, rescale(recipe(), batch_size=32))


def test_accumulation_becomes_less():
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=4)
    told = keras_scaled.recipe_of(optimizer)
    assert told["accumulation_steps"] == 4 and told["betas"] == (0.9, 0.999) and told["optimizer"] == "Adam"
    keras_scaled.set_optimizer(optimizer, keep_global(Recipe(batch_size=8, **told), batch_size=32))
    assert optimizer.gradient_accumulation_steps is None
    assert float(optimizer.learning_rate) == pytest.approx(0.1)


def test_the_whole_adam_rule():
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.01, use_ema=True)
    before = Recipe(batch_size=8, **keras_scaled.recipe_of(optimizer))
    keras_scaled.set_optimizer(optimizer, rescale(before, batch_size=32, policy="adam"))
    assert float(optimizer.learning_rate) == pytest.approx(0.2)
    assert (optimizer.beta_1, optimizer.beta_2) == pytest.approx((0.6, 0.996))
    assert optimizer.weight_decay == pytest.approx(0.02) and optimizer.ema_momentum == pytest.approx(0.99**4)


def test_a_schedule_is_the_scripts_own():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    optimizer = keras.optimizers.SGD(schedule)
    assert keras_scaled.recipe_of(optimizer)["lr"] == 0.1
    with pytest.raises(NotApplicable, match="the learning rate is a schedule of the script's own"):
        keras_scaled.set_optimizer(optimizer, rescale(recipe(), batch_size=32))
    keras_scaled.set_optimizer(optimizer, rescale(recipe(), batch_size=32, policy="none"))
