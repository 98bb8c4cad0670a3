"""What cannot be compiled is named, and trains as Keras trains it; what is wrong is said in Keras's own words."""

import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_small import compiled, data, dense

import trainingcompiler as tc
from trainingcompiler import TrainingCompilerConfig
from trainingcompiler.errors import ConfigError, FallbackError, UsageError
from trainingcompiler.reporting.events import FellBack, subscribe
from trainingcompiler.reporting.statistics import current as statistics

L = keras.layers
XLA = TrainingCompilerConfig(engine="xla", fallback="eager")


class Shout(L.Layer):
    """A layer that runs Python in the middle of a step."""

    def call(self, x):
        return tf.ensure_shape(tf.py_function(lambda a: a * 2.0, [x], tf.float32), x.shape)


class Words(L.Layer):
    """A layer of string operations."""

    def call(self, x):
        return x + tf.cast(tf.strings.length(tf.strings.as_string(x)), tf.float32) * 0.0


class Nonzero(L.Layer):
    """A layer whose result has as many rows as its values say."""

    def call(self, x):
        return x + tf.cast(tf.reduce_sum(tf.boolean_mask(x, x > 0)), x.dtype) * 0.0


class GlobalRandom(L.Layer):
    """A layer that draws from TensorFlow's global generator."""

    def call(self, x):
        return x + tf.random.normal(tf.shape(x)) * 0.0


def with_layer(kind):
    return lambda: keras.Sequential([keras.Input((4,)), L.Dense(4), kind(), L.Dense(2)])


@pytest.fixture
def fallbacks():
    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, FellBack) else None)
    yield events
    unsubscribe()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Shout, "XLA has no kernel for EagerPyFunc (sequential"),
        (Words, "XLA has no kernel for AsString (sequential"),
        (GlobalRandom, "RandomStandardNormal draws from TensorFlow's global generator"),
    ],
)
def test_a_layer_without_a_kernel_is_named_and_trains_in_tensorflow(kind, named, fallbacks):
    x, y = data()
    model = compiled(with_layer(kind), training_compiler=XLA)
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
    plain = compiled(with_layer(kind), training_compiler=False)
    np.testing.assert_allclose(
        history["loss"], plain.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"], rtol=1e-5
    )
    (event,) = fallbacks
    assert named in event.reason
    assert event.where and event.where.startswith("test_keras_fallback.py:") and event.how == "as TensorFlow runs it"
    assert int(model.optimizer.iterations.numpy()) == 8  # every batch once, also the one that was being captured


@pytest.mark.parametrize("kind", [Shout, Words])
def test_error_forbids_it(kind):
    model = compiled(with_layer(kind))
    with pytest.raises(FallbackError, match='fallback="error" forbids'):
        model.train_on_batch(*data())


def test_a_shape_that_depends_on_values_gives_keras_result_or_is_named(fallbacks):
    """TensorFlow's bridge bounds such shapes where it can."""
    x, y = data()
    model = compiled(with_layer(Nonzero), training_compiler=XLA)
    plain = compiled(with_layer(Nonzero), training_compiler=False)
    for _ in range(2):
        np.testing.assert_allclose(model.train_on_batch(x, y), plain.train_on_batch(x, y), rtol=1e-5)


def test_sparse_inputs_are_named(fallbacks):
    x, y = data()
    dataset = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(x), y)).batch(8)
    model = compiled(lambda: keras.Sequential([keras.Input((4,), sparse=True), L.Dense(2)]), training_compiler=XLA)
    model.fit(dataset, verbose=0, shuffle=False)
    assert "SparseTensor, whose size XLA cannot know; make it dense" in fallbacks[0].reason
    assert int(model.optimizer.iterations.numpy()) == 4


def test_many_shapes_end_in_tensorflow(fallbacks, monkeypatch):
    from trainingcompiler.frameworks.tensorflow import runner

    monkeypatch.setattr(runner, "_MOST_PROGRAMS", 2)
    model = compiled(dense, training_compiler=XLA)
    for rows in (4, 5, 6, 7):
        model.train_on_batch(*data(rows))
    (event,) = fallbacks
    assert "2 different shapes; pad them to few" in event.reason
    assert int(model.optimizer.iterations.numpy()) == 4


@pytest.mark.parametrize("option", [{"run_eagerly": True}, {}], ids=["run_eagerly", "strategy"])
def test_what_the_script_asks_for_is_honoured(option, fallbacks):
    def train():
        model = compiled(dense, training_compiler=XLA, **option)
        model.train_on_batch(*data())

    if option:
        train()
        assert "model.compile(run_eagerly=True) asks for it" in fallbacks[0].reason
    else:
        with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
            train()
        assert "tf.distribute strategy" in fallbacks[0].reason


def test_a_train_function_of_its_own_is_named(fallbacks):
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            self.train_function = lambda iterator: {"loss": 0.0}
            return self.train_function

    model = Own([keras.Input((4,)), L.Dense(2)])
    model.compile("sgd", "mse", training_compiler=XLA)
    model.fit(*data(), verbose=0)
    assert "make_train_function of its own" in fallbacks[0].reason


def test_engine_tensorflow_compiles_nothing():
    before = statistics().compiles
    model = compiled(dense, training_compiler=TrainingCompilerConfig(engine="tensorflow"))
    steps = statistics().tensorflow_steps
    model.fit(*data(), batch_size=8, verbose=0)
    assert statistics().compiles == before and statistics().tensorflow_steps == steps + 4


def test_the_option_is_checked():
    model = dense()
    with pytest.raises(UsageError, match=r"training_compiler='yes'\): must be True, False or a"):
        model.compile("sgd", "mse", training_compiler="yes")
    with pytest.raises(ConfigError):
        model.compile("sgd", "mse", training_compiler=TrainingCompilerConfig(engine="gpu"))


def test_engine_eager_is_pytorchs():
    tc.disable()
    tc.enable(TrainingCompilerConfig(engine="eager", quiet=True))
    with pytest.raises(UsageError, match="engine=eager is for PyTorch.*--engine=tensorflow"):
        dense().compile("sgd", "mse")


BAD = {
    "no loss": lambda: (dense(), None, data()),
    "labels of another shape": lambda: (dense(), "mse", (data()[0], np.zeros((32, 5), np.float32))),
    "inputs of another shape": lambda: (dense(), "mse", (np.zeros((32, 7), np.float32), data()[1])),
    "no data": lambda: (dense(), "mse", (np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32))),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_keras_own_words(make, fallbacks):
    messages = []
    for option in (False, XLA):
        keras.utils.set_random_seed(0)
        model, loss, given = make()
        model.compile("sgd", loss, training_compiler=option)
        with pytest.raises(Exception) as caught:
            model.fit(*given, batch_size=8, verbose=0)
        messages.append((type(caught.value), str(caught.value).split("\n")[0].split("sequential")[0]))
    assert messages[0] == messages[1] and not fallbacks


def test_a_model_that_was_never_built_is_built_by_fit():
    model = compiled(lambda: keras.Sequential([L.Dense(8), L.Dense(2)]))
    model.fit(*data(), batch_size=8, verbose=0)
    plain = compiled(lambda: keras.Sequential([L.Dense(8), L.Dense(2)]), training_compiler=False)
    plain.fit(*data(), batch_size=8, verbose=0)
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        assert one.shape == other.shape


def test_terminate_on_nan():
    seen = []
    for option in (False, True):
        model = compiled(dense, training_compiler=option, optimizer=lambda: keras.optimizers.SGD(1e30))
        history = model.fit(*data(), batch_size=8, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
        seen.append((len(history.epoch), int(model.optimizer.iterations.numpy())))
    assert seen[0] == seen[1] and seen[0][0] == 1


class StopAt(keras.callbacks.Callback):
    """Raises after batch 2."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise self.error


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
def test_an_error_in_a_callback_loses_nothing(error):
    results = []
    for option in (False, True):
        model = compiled(dense, training_compiler=option)
        with pytest.raises(type(error)):
            model.fit(*data(), batch_size=8, verbose=0, shuffle=False, callbacks=[StopAt(error)])
        assert int(model.optimizer.iterations.numpy()) == 3
        model.fit(*data(), batch_size=8, verbose=0, shuffle=False)
        results.append(model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_ctrl_c_at_any_moment_leaves_a_whole_step():
    model = compiled(dense)
    x, y = data()
    model.train_on_batch(x, y)
    interrupted = 0
    for delay_s in np.linspace(0.0005, 0.02, 12):
        timer = threading.Timer(delay_s, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            for _ in range(500):  # bounded: an interrupt in a finalizer is swallowed by Python
                model.train_on_batch(x, y)
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
        count = int(model.optimizer.iterations.numpy())
        state = [v.numpy() for v in model.optimizer.variables]
        assert count > 0 and all(np.isfinite(v).all() for v in state)
        assert np.isfinite(model.evaluate(x, y, verbose=0))
    assert interrupted > 6


def test_augmentation_inside_the_model_trains_either_way(fallbacks):
    """Keras says of some of these layers that XLA cannot run them; whether it can is for the export to say."""

    def make():
        return keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                L.RandomFlip(),
                L.RandomRotation(0.1),
                L.RandomContrast(0.2),
                L.Flatten(),
                L.Dense(2),
            ]
        )

    x, y = np.random.default_rng(0).random((32, 8, 8, 3)).astype(np.float32), data()[1]
    model = compiled(make, training_compiler=XLA)
    losses = model.fit(x, y, batch_size=8, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0] and int(model.optimizer.iterations.numpy()) == 20
    for event in fallbacks:
        assert "XLA has no kernel for ImageProjectiveTransformV3" in event.reason


def test_disabling_leaves_the_model_to_keras_as_it_is():
    results = []
    for option in (False, True):
        model = compiled(dense, training_compiler=option)
        model.fit(*data(), batch_size=8, verbose=0, shuffle=False)
        before = statistics().compiled_steps
        tc.disable()
        model.fit(*data(), batch_size=8, verbose=0, shuffle=False)
        assert statistics().compiled_steps == before
        tc.enable(TrainingCompilerConfig(quiet=True))
        results.append(model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
