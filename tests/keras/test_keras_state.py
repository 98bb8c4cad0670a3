"""Whoever looks at a variable sees what the last step made of it, and what is written to one holds at the next step."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_small import compiled, data, dense

from trainingcompiler.frameworks.tensorflow import state


class Watcher(keras.callbacks.Callback):
    """Keeps what `look` returns after every batch."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen = look, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.look(self.model))


def both(callbacks, epochs=2, make=dense, **compile_options):
    """Trains plainly and compiled, with fresh callbacks; returns both models and callbacks."""
    results = []
    for option in (False, True):
        model, made = compiled(make, training_compiler=option, **compile_options), callbacks()
        model.fit(*data(), batch_size=8, epochs=epochs, verbose=0, callbacks=made, validation_data=data(16, seed=1))
        results.append((model, made))
    return results


def assert_close(one, other):
    """Float32 over a few steps of a tiny model: sums in another order differ by about 1e-6."""
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def is_away(model):
    """Whether the values of the model's weights are in XLA's buffers."""
    return [state._states[id(vars(w.value)["_handle"])].array is not None for w in model.trainable_weights]


READERS = {
    "get_weights": lambda model: model.get_weights(),
    "numpy": lambda model: [w.numpy() for w in model.weights],
    "optimizer.variables": lambda model: [v.numpy() for v in model.optimizer.variables],
    "convert_to_numpy": lambda model: [keras.ops.convert_to_numpy(w) for w in model.weights],
    "tf.convert_to_tensor": lambda model: [tf.convert_to_tensor(w.value).numpy() for w in model.weights],
    "operator": lambda model: [(w.value + 0.0).numpy() for w in model.weights],
    "call": lambda model: [model(data()[0]).numpy()],
    "predict_on_batch": lambda model: [model.predict_on_batch(data()[0])],
    "test_on_batch": lambda model: [np.array(model.test_on_batch(*data()))],
    "get_state_tree": lambda model: tf.nest.flatten(
        model.get_state_tree(value_format="numpy_array")["trainable_variables"]
    ),
}


@pytest.mark.parametrize("look", READERS.values(), ids=READERS.keys())
@pytest.mark.exhaustive(but=["get_weights", "optimizer.variables", "tf.convert_to_tensor", "predict_on_batch"])
def test_a_callback_that_looks_after_every_batch_sees_current_values(look):
    (_, (plain,)), (_, (ours,)) = both(lambda: [Watcher(look)])
    assert len(plain.seen) == len(ours.seen) == 8
    for one, other in zip(plain.seen, ours.seen, strict=True):
        assert_close(one, other)


def test_nobody_looking_moves_nothing():
    model = compiled(dense)
    model.fit(*data(), batch_size=8, epochs=1, verbose=0)
    assert all(is_away(model))
    given_back = []
    original = state.VariableState.give_back
    state.VariableState.give_back = lambda cell: given_back.append(cell) or original(cell)
    try:
        model.train_function(iter([tuple(part[:8] for part in data())]))
    finally:
        state.VariableState.give_back = original
    assert not given_back and all(is_away(model))


def test_a_value_that_was_read_does_not_change_later():
    model = compiled(dense)
    model.train_on_batch(*data())
    read = tf.convert_to_tensor(model.weights[0].value)
    kept = read.numpy()
    model.train_on_batch(*data())
    np.testing.assert_array_equal(read.numpy(), kept)
    assert not np.array_equal(model.weights[0].numpy(), kept)


@pytest.mark.parametrize("way", ["set_weights", "assign", "assign_add", "load_weights", "scatter"])
def test_what_is_written_holds_at_the_next_step(way, tmp_path):
    results = []
    for option in (False, True):
        model = compiled(dense, training_compiler=option)
        model.train_on_batch(*data())
        path = tmp_path / f"{option}.weights.h5"
        model.save_weights(path)
        model.train_on_batch(*data())
        if way == "set_weights":
            model.set_weights([w * 0.5 for w in model.get_weights()])
        elif way == "assign":
            model.weights[0].assign(np.ones(model.weights[0].shape))
        elif way == "assign_add":
            model.weights[0].value.assign_add(np.ones(model.weights[0].shape, np.float32))
        elif way == "scatter":
            model.weights[0].value.scatter_nd_update([[0, 0]], [3.0])
        else:
            model.load_weights(path)
        model.train_on_batch(*data())
        results.append([*model.get_weights(), *[v.numpy() for v in model.optimizer.variables]])
    assert_close(*results)


def test_a_learning_rate_that_is_set_takes_effect_without_a_recompile():
    results = []
    for option in (False, True):
        model = compiled(dense, training_compiler=option)
        for rate in (0.1, 0.01, 0.0):
            model.optimizer.learning_rate = rate
            before = model.get_weights()
            model.train_on_batch(*data())
        if option:
            assert len(model.train_function._runner._steps) == 1
        for one, other in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)  # the rate is 0
        results.append(model.get_weights())
    assert_close(*results)


def schedule(epoch, rate):
    return rate * 0.5


CALLBACKS = {
    "LearningRateScheduler": lambda folder: [keras.callbacks.LearningRateScheduler(schedule)],
    "ReduceLROnPlateau": lambda folder: [keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=10)],
    "EarlyStopping": lambda folder: [
        keras.callbacks.EarlyStopping(monitor="val_loss", mode="max", patience=1, restore_best_weights=True)
    ],
    "ModelCheckpoint by batch": lambda folder: [
        keras.callbacks.ModelCheckpoint(str(folder / "{batch}.weights.h5"), save_freq=2, save_weights_only=True)
    ],
    "ModelCheckpoint by epoch": lambda folder: [keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.keras"))],
    "BackupAndRestore": lambda folder: [keras.callbacks.BackupAndRestore(str(folder / "backup"), save_freq=3)],
    "TensorBoard": lambda folder: [
        keras.callbacks.TensorBoard(str(folder / "logs"), histogram_freq=1, update_freq="batch", write_graph=False)
    ],
    "SwapEMAWeights": lambda folder: [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
    "CSVLogger": lambda folder: [keras.callbacks.CSVLogger(str(folder / "log.csv"))],
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.exhaustive(but=["LearningRateScheduler", "ModelCheckpoint by batch", "BackupAndRestore", "SwapEMAWeights"])
def test_keras_callbacks(name, tmp_path):
    options = {"optimizer": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5)}
    folders = iter([tmp_path / "plain", tmp_path / "ours"])

    def make():
        folder = next(folders)
        folder.mkdir()
        return CALLBACKS[name](folder)

    (plain, _), (ours, _) = both(make, epochs=4, **options)
    assert_close(plain.get_weights(), ours.get_weights())
    assert plain.history.history.keys() == ours.history.history.keys()
    assert_close(plain.history.history.values(), ours.history.history.values())
    files = [
        sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if "tfevents" not in p.name)
        for f in (tmp_path / "plain", tmp_path / "ours")
    ]
    assert files[0] == files[1]
    for path in (tmp_path / "ours").glob("*.weights.h5"):
        plain.load_weights(tmp_path / "plain" / path.name)
        ours.load_weights(path)
        assert_close(plain.get_weights(), ours.get_weights())
    for path in (tmp_path / "ours").glob("*.keras"):
        one, other = (keras.models.load_model(tmp_path / kind / path.name) for kind in ("plain", "ours"))
        assert_close(one.get_weights(), other.get_weights())


def test_a_saved_model_holds_current_values_and_trains_on(tmp_path):
    model = compiled(dense)
    model.train_on_batch(*data())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_close(model.get_weights(), again.get_weights())
    model.export(tmp_path / "exported", verbose=False)
    x = data()[0]
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    served = exported.serve(x)
    np.testing.assert_allclose(served, model(x), rtol=1e-5, atol=1e-6)
    for trained in (model, again):
        trained.train_on_batch(*data())
    assert_close(model.get_weights(), again.get_weights())


def test_a_checkpoint_of_tensorflow(tmp_path):
    model = compiled(dense)
    model.train_on_batch(*data())
    checkpoint = tf.train.Checkpoint(model=model)
    path = checkpoint.write(str(tmp_path / "state"))
    kept = model.get_weights()
    model.train_on_batch(*data())
    assert not np.array_equal(kept[0], model.get_weights()[0])
    checkpoint.read(path)
    assert_close(kept, model.get_weights())


def test_a_graph_made_before_the_first_step_sees_current_values():
    model = compiled(dense)
    x = tf.constant(data()[0])
    forward = tf.function(lambda: model(x))
    forward()
    model.train_on_batch(*data())
    after = forward().numpy()
    np.testing.assert_allclose(after, model(x), rtol=1e-4, atol=1e-6)
    model.train_on_batch(*data())
    assert not np.allclose(forward(), after)


def test_a_dataset_that_reads_a_trained_variable_sees_current_values():
    model = compiled(dense)
    model.build((None, 4))
    weight = model.weights[0].value
    plain = tf.data.Options()  # by default tf.data reads ahead, and so before the step whose result is looked for
    plain.experimental_optimization.apply_default_optimizations = False
    plain.autotune.enabled = False
    pipeline = iter(tf.data.Dataset.range(100).map(lambda _: tf.reduce_sum(weight)).with_options(plain))
    for _ in range(4):
        model.train_on_batch(*data())
        np.testing.assert_allclose(next(pipeline), weight.numpy().sum(), rtol=1e-5)


def test_another_thread_sees_a_whole_step():
    model = compiled(dense)
    model.train_on_batch(*data())
    seen, failed, stop = [], [], threading.Event()

    def look():
        while not stop.is_set():
            try:
                seen.append(model.weights[0].numpy().shape)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    model.fit(*data(), batch_size=8, epochs=5, verbose=0)
    stop.set()
    thread.join()
    assert not failed and set(seen) == {(4, 16)}


def test_compiling_the_model_again_keeps_its_weights():
    results = []
    for option in (False, True):
        model = compiled(dense, training_compiler=option)
        model.train_on_batch(*data())
        model.compile("sgd", "mse", **({} if option else {"training_compiler": False}))
        model.train_on_batch(*data())
        results.append(model.get_weights())
    assert_close(*results)
