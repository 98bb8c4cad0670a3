"""What the launcher recommends, in `fit` and in a Keras optimizer."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainingcompiler.frameworks.keras import apply_recommendation as keras_scaled
from trainingcompiler.frameworks.keras.schedules import peak_of, scaled_schedule
from trainingcompiler.planning.batch_scaling import Recipe, keep_global, rescale
from trainingcompiler.planning.recommendation import NotApplicable

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


def launched(tmp_path, source: str, *options: str) -> subprocess.CompletedProcess:
    """Launches a script; returns the finished process."""
    (tmp_path / "train.py").write_text(source)
    environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "trainingcompiler.launch", *options, "train.py"]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_a_script_is_trained_with_another_batch(tmp_path):
    done = launched(tmp_path, SCRIPT, "--batch-size=64")
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


schedules = keras.optimizers.schedules


class Stairs(schedules.LearningRateSchedule):
    """A schedule of a script's own: 0.1 for four steps, then 0.4, then 0.2."""

    def __call__(self, step):
        return keras.ops.where(step < 4, 0.1, keras.ops.where(step < 8, 0.4, 0.2))

    def get_config(self):
        return {}


EVERY = {
    "cosine": (schedules.CosineDecay(0.1, 40, alpha=0.1), 0.1),
    "warm-up": (schedules.CosineDecay(0.0, 30, warmup_target=0.1, warmup_steps=9), 0.1),
    "restarts": (schedules.CosineDecayRestarts(0.1, 8, t_mul=2.0, m_mul=0.5), 0.1),
    "exponential": (schedules.ExponentialDecay(0.1, 10, 0.5), 0.1),
    "stairs": (schedules.ExponentialDecay(0.1, 10, 0.5, staircase=True), 0.1),
    "inverse": (schedules.InverseTimeDecay(0.1, 7, 0.5), 0.1),
    "polynomial": (schedules.PolynomialDecay(0.1, 20, 0.01, power=2.0), 0.1),
    "piecewise": (schedules.PiecewiseConstantDecay([5, 17], [0.05, 0.2, 0.01]), 0.2),
    "own": (Stairs(), 0.4),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [4, 0.5, 3])
def test_a_schedule_is_scaled_as_a_whole(name, rows):
    own, peak = EVERY[name]
    assert peak_of(own) == pytest.approx(peak)
    made = scaled_schedule(own, rate_factor=2.0, step_factor=rows)
    assert peak_of(made) == pytest.approx(2 * peak)
    for step in range(12):
        # float32, in which a step is divided by a number of steps that is not whole.
        wanted = 2 * float(own(step * rows))
        assert float(made(keras.ops.convert_to_tensor(step))) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    if name != "own":  # a model that is saved with one can be loaded anywhere
        assert type(made) is type(own)


def test_a_scaled_schedule_of_the_scripts_own_is_saved():
    made = scaled_schedule(Stairs(), rate_factor=2.0, step_factor=4)
    content = keras.saving.serialize_keras_object(made)
    again = keras.saving.deserialize_keras_object(content, custom_objects={"Stairs": Stairs})
    assert [float(again(step)) for step in range(3)] == pytest.approx([0.2, 0.8, 0.4])


def test_an_optimizers_schedule_is_changed_once_also_where_only_its_steps_are_fewer():
    optimizer = keras.optimizers.SGD(schedules.CosineDecay(0.1, 100), gradient_accumulation_steps=4)
    told = keras_scaled.recipe_of(optimizer)
    assert told["lr"] == 0.1
    wanted = keep_global(Recipe(batch_size=8, **told), batch_size=32)
    keras_scaled.set_optimizer(optimizer, wanted)
    keras_scaled.set_optimizer(optimizer, wanted)
    config = optimizer._learning_rate.get_config()
    assert (config["initial_learning_rate"], config["decay_steps"]) == (0.1, 25)  # it counts batches


def test_a_rate_that_is_a_function_is_the_scripts_own():
    optimizer = keras.optimizers.SGD(lambda: 0.1)
    assert keras_scaled.recipe_of(optimizer)["lr"] == pytest.approx(0.1)
    with pytest.raises(NotApplicable, match="the learning rate is a function of the script's own"):
        keras_scaled.set_optimizer(optimizer, rescale(recipe(), batch_size=32))
    keras_scaled.set_optimizer(optimizer, rescale(recipe(), batch_size=32, policy="none"))


SCHEDULED = SCRIPT.replace("SGD(0.05)", "SGD(keras.optimizers.schedules.CosineDecay(0.0, 40, 0.0, 'c', 0.05, 8))")


@pytest.mark.exhaustive
def test_a_scheduled_script_is_trained_with_another_batch(tmp_path):
    """24 steps of 16 rows are 6 of 64: as far along the cosine, and 4 times as high."""
    rates = {}
    for options in ((), ("--batch-size=64",)):
        done = launched(tmp_path, SCHEDULED, *options)
        assert done.returncode == 0, done.stderr
        _, rate, steps = done.stdout.splitlines()[-1].split()
        rates[int(steps)] = float(rate)
    assert rates[6] == pytest.approx(4 * rates[24], abs=4e-6) and rates[24] > 0.01  # printed with six places
    assert (
        "CosineDecay goes 4 times as fast, because a step has as many times the rows, and its rates are" in done.stderr
    )


def test_a_callback_that_sets_the_rate_is_an_error_before_the_first_step(tmp_path):
    setter = "callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.03)], "
    done = launched(
        tmp_path, SCRIPT.replace("batch_size=16, epochs=2", setter + "batch_size=16, epochs=2"), "--batch-size=64"
    )
    assert done.returncode == 2 and "trained" not in done.stdout
    assert (
        "the learning rate of SGD in the first step: 0.12 decided, 0.03 in the script, which sets it by hand"
        in done.stderr
    )
    assert "The optimizer has been changed, and the script sets these itself, most likely in a callback" in done.stderr


def test_the_run_is_held_against_the_rehearsal(tmp_path):
    late = "import trainingcompiler.planning.planner as planner\nrate = 0.05 if planner.current is not None else 0.07\n"
    done = launched(tmp_path, late + SCRIPT.replace("SGD(0.05)", "SGD(rate)"), "--batch-size=64")
    assert done.returncode == 2 and "trained" not in done.stdout
    assert "  the learning rate of SGD: 0.2 decided, 0.28 in the run\n" in done.stderr
