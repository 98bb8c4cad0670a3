"""A step is traced once, as Keras traces it: Python runs as often, and sees the sizes that it sees there."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_small import compiled, data, dense

from trainingcompiler import TrainingCompilerConfig
from trainingcompiler.reporting.events import FellBack, subscribe
from trainingcompiler.reporting.statistics import current as statistics

L = keras.layers
ENGINES = {"plain": False, **{name: TrainingCompilerConfig(engine=name) for name in ("xla", "auto")}}
ROWS = 44  # five batches of 8, and one of 4


@pytest.fixture
def fallbacks():
    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, FellBack) else None)
    yield events
    unsubscribe()


class Noted(keras.Sequential):
    """Notes what its step sees whenever Python runs it, and has a number that is read then."""

    weight = 0.0

    def train_step(self, batch):
        vars(self).setdefault("seen", []).append(batch[0].shape[0])
        return super().train_step(batch)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training) + self.weight * keras.ops.mean(y_pred**2)


def noted():
    return Noted([keras.Input((4,)), L.Dense(8, "tanh"), L.Dense(2)])


class Anneal(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.weight += 0.1


class Freeze(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.layers[0].trainable = False


@pytest.mark.parametrize("engine", ["xla", "auto"])
@pytest.mark.parametrize("kind", [Anneal, Freeze])
def test_what_a_callback_changes_of_python_is_seen_when_keras_would_see_it(kind, engine):
    losses = []
    for option in (False, ENGINES[engine]):
        model = compiled(noted, lambda: keras.optimizers.SGD(0.05), training_compiler=option)
        options = {"batch_size": 8, "epochs": 6, "shuffle": False, "verbose": 0, "callbacks": [kind()]}
        losses.append(model.fit(*data(ROWS), **options).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)  # float32


def in_turn(model):
    """Trains in all the ways that trace; sizes go up and down."""
    x, y = data(ROWS)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    model.fit(x, y, batch_size=16, verbose=0)
    for rows in (4, 5, 6):
        model.train_on_batch(x[:rows], y[:rows])
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(8, drop_remainder=True), shuffle=False, verbose=0)


def one_by_one(model):
    x, y = data(ROWS)
    for rows in (4, 5, 6, 4):
        model.train_on_batch(x[:rows], y[:rows])
    model.fit(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize("ways", [in_turn, one_by_one])
def test_python_runs_as_often_and_sees_the_same_sizes(ways):
    seen = []
    for option in ENGINES.values():
        model = compiled(noted, training_compiler=option)
        ways(model)
        seen.append(model.seen)
    assert seen[0] == seen[1] == seen[2] and None in seen[0]


def test_a_further_size_costs_no_tracing():
    model = compiled(noted)
    x, y = data(ROWS)
    model.fit(x, y, batch_size=8, verbose=0)
    seen = list(model.seen)
    for size in (7, 9, 10):
        model.fit(x, y, batch_size=size, verbose=0)
    steps = model.train_function._runner._steps.values()
    assert model.seen == seen
    assert sorted({step.bridged.program.inputs[0].shape[0] for step in steps}) == [2, 4, 7, 8, 9, 10]
    assert len({step.bridged.trace for step in steps}) == 1


class Words(L.Layer):
    """A layer of string operations."""

    def call(self, x):
        return x + tf.cast(tf.strings.length(tf.strings.as_string(x)), tf.float32) * 0.0


def test_python_does_not_run_again_where_tensorflow_takes_over(fallbacks):
    seen = []
    for option in (False, ENGINES["xla"]):
        model = compiled(lambda: Noted([keras.Input((4,)), Words(), L.Dense(2)]), training_compiler=option)
        model.fit(*data(ROWS), batch_size=8, verbose=0)
        seen.append(model.seen)
    assert len(fallbacks) == 1 and seen[0] == seen[1]


@pytest.mark.parametrize("engine", ["xla", "auto"])
def test_losses_of_several_outputs_are_averaged_as_keras_averages_them(engine):
    def two():
        x = keras.Input((4,))
        return keras.Model(x, [L.Dense(1, name="p")(x), L.Dense(1, name="q")(x)])

    x, _ = data(40)
    y = [x.sum(1, keepdims=True), (x**2).sum(1, keepdims=True)]
    y[0][32:] += 5
    histories = []
    for option in (False, ENGINES[engine]):
        model = compiled(two, lambda: keras.optimizers.SGD(0.01), ["mse", "mae"], training_compiler=option)
        histories.append(model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0).history)
    assert histories[0].keys() == histories[1].keys()
    for key in histories[0]:
        np.testing.assert_allclose(histories[0][key], histories[1][key], rtol=1e-4)  # float32


def embedded():
    layers = [keras.Input((6,), dtype="int64"), L.Embedding(20, 8), L.Flatten(), L.Dense(3)]
    return keras.Sequential(layers)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LATE = {"token": r"indices\[0,0\] = 20 is not in \[0, 20\)", "label": "Received a label value of 3 which is outside"}


@pytest.mark.parametrize("engine", ["xla", "auto"])
@pytest.mark.parametrize("what", LATE)
def test_a_late_value_out_of_range_is_tensorflows_error(what, engine):
    random = np.random.default_rng(0)
    tokens, labels = random.integers(0, 20, (400, 6)), random.integers(0, 3, 400)
    if what == "token":
        tokens[45 * 8, 0] = 20
    else:
        labels[45 * 8] = 3
    weights = []
    for option in (False, ENGINES[engine]):
        model = compiled(embedded, loss=CROSS_ENTROPY, training_compiler=option)
        with pytest.raises(tf.errors.InvalidArgumentError, match=LATE[what]):
            model.fit(tokens, labels, batch_size=8, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)  # float32, 45 steps of Adam


def test_an_assertion_in_a_layer_is_raised():
    class Bounded(L.Layer):
        def call(self, x):
            tf.debugging.assert_less(x, 10.0, "too large")
            return x

    model = compiled(lambda: keras.Sequential([keras.Input((4,)), Bounded(), L.Dense(2)]))
    x, y = data(16)
    model.train_on_batch(x, y)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
        model.train_on_batch(x + 20, y)
    model.train_on_batch(x, y)


def test_the_same_model_made_again_is_not_compiled_again():
    for again in (False, True):
        before = statistics().cache_hits
        model = compiled(dense, lambda: keras.optimizers.Nadam(0.0125))
        model.train_on_batch(*data(12))
        assert not again or statistics().cache_hits == before + 1


def test_a_fallback_names_the_operation_and_the_line(fallbacks):
    lookup = L.IntegerLookup(vocabulary=[3, 7, 11])
    model = keras.Sequential([keras.Input((1,), dtype="int64"), lookup, L.Embedding(4, 4), L.Flatten(), L.Dense(1)])
    model.compile("sgd", "mse", training_compiler=ENGINES["xla"])
    model.fit(np.array([[3], [7]] * 8), np.ones((16, 1)), verbose=0)

    half = {"dtype": "mixed_float16"}
    layers = [L.Conv2D(4, 3, activation="relu", **half), L.UpSampling2D(interpolation="bilinear", **half)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers, L.Conv2D(1, 3, **half)])
    model.compile("sgd", "mse", training_compiler=ENGINES["xla"])
    model.fit(np.ones((16, 8, 8, 1)), np.ones((16, 10, 10, 1)), verbose=0)

    table, unsound = fallbacks
    assert (
        table.operator == "LookupTableFindV2"
        and "reads a resource that is no variable, such as a table" in table.reason
    )
    assert unsound.operator == "ReluGrad" and "into what XLA does not accept: " in unsound.reason
    for event in fallbacks:
        assert event.where.startswith("test_keras_tracing.py:") and "\n" not in event.reason
        assert "stack trace" not in event.reason and "RET_CHECK" not in event.reason
