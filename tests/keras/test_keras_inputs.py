"""Whatever `fit` can be given trains as it trains in Keras, and a shape costs one program."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_parity import CONFIG, assert_same_training, train
from keras_small import compiled, data, dense

from trainingcompiler.reporting.events import Recompiled, subscribe

X, Y = data(44)  # five batches of 8, and one of 4


def adam():
    return keras.optimizers.Adam(0.01)


class Batches(keras.utils.PyDataset):
    """The data as a `PyDataset`."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[index * 8 : index * 8 + 8], Y[index * 8 : index * 8 + 8]


class Endless:
    """A generator that can be made again for the second training."""

    def __iter__(self):
        while True:
            for index in range(6):
                yield X[index * 8 : index * 8 + 8], Y[index * 8 : index * 8 + 8]


INPUTS = {
    "arrays": lambda: ((X, Y), {}),
    "tensors": lambda: ((tf.constant(X), tf.constant(Y)), {}),
    "tf.data": lambda: (tf.data.Dataset.from_tensor_slices((X, Y)).batch(8), {}),
    "PyDataset": lambda: (Batches(), {}),
    "validation_split": lambda: ((X, Y), {"validation_split": 0.25}),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_a_ragged_last_batch_costs_one_more_program(make):
    given, fit = make()
    run = assert_same_training(
        dense, given, fit={"epochs": 3, **fit}, dtype="float32", programs=2, optimizer=adam, loss="mse"
    )
    if not fit:
        assert int(run.model.optimizer.iterations.numpy()) == 18


def test_generators_with_steps_per_epoch():
    runs = [
        train(dense, iter(Endless()), option, {"epochs": 3, "steps_per_epoch": 6}, optimizer=adam, loss="mse")
        for option in (False, CONFIG)
    ]
    np.testing.assert_allclose(runs[0].history["loss"], runs[1].history["loss"], rtol=1e-5)
    assert len(runs[1].model.train_function._runner._steps) == 2


def test_a_dataset_that_goes_on_over_epochs_gives_every_batch_once():
    numbers = tf.data.Dataset.range(40).map(lambda i: (tf.fill((2, 4), tf.cast(i, tf.float32)), tf.zeros((2, 2))))

    class Seen(keras.Model):
        """Adds up its inputs, whose sum tells which were seen."""

        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(2)
            self.total = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.total.assign_add(keras.ops.mean(x))
            return self.layer(x)

    for config in (CONFIG, type(CONFIG)(engine="auto")):
        model = compiled(Seen, training_compiler=config, optimizer=lambda: keras.optimizers.SGD(0.0))
        model.fit(numbers, epochs=4, steps_per_epoch=10, verbose=0, shuffle=False)
        assert float(model.total.numpy()) == sum(range(40))


def test_train_on_batch_returns_what_keras_returns():
    for options in ({"metrics": ["mae"]}, {}):
        plain, ours = (compiled(dense, training_compiler=option, **options) for option in (False, True))
        for _ in range(3):
            np.testing.assert_allclose(plain.train_on_batch(X, Y), ours.train_on_batch(X, Y), rtol=1e-5)
        one, other = (model.train_on_batch(X, Y, return_dict=True) for model in (plain, ours))
        assert one.keys() == other.keys() and all(type(other[key]) is type(one[key]) for key in one)


def test_the_callers_array_may_change_when_the_step_has_returned():
    plain, ours = (compiled(dense, training_compiler=option) for option in (False, True))
    for model in (plain, ours):
        x = X.copy()
        for _ in range(5):
            model.train_on_batch(x, Y)
            x *= 0.5
    np.testing.assert_allclose(plain.get_weights()[0], ours.get_weights()[0], rtol=1e-4, atol=1e-6)


def test_a_further_shape_is_told_with_its_cure():
    seen = []
    unsubscribe = subscribe(lambda event: seen.append(event) if isinstance(event, Recompiled) else None)
    compiled(dense).fit(X, Y, batch_size=8, epochs=2, verbose=0)
    unsubscribe()
    (event,) = seen
    assert event.changed == "x float32[8, 4] -> float32[4, 4], y float32[8, 2] -> float32[4, 2]"
    assert "drop_remainder=True" in event.cure
