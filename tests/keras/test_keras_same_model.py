"""Twenty compiled steps leave the model, its optimizer and its metrics as Keras's own twenty do."""

import keras
import numpy as np
import pytest
from keras_parity import assert_same_training, floatx, train
from keras_small import data, dense

from trainingcompiler import TrainingCompilerConfig

L = keras.layers
ROWS = 160  # 20 batches of 8


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((ROWS, *shape))


def classes(count, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, count, (ROWS, *shape))


def adam():
    return keras.optimizers.Adam(0.01)


def with_dropout():
    return keras.Sequential(
        [keras.Input((4,)), L.Dense(16, "relu"), L.Dropout(0.3), L.Dense(16), L.Dropout(0.3), L.Dense(2)]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            L.Conv2D(4, 3, padding="same", use_bias=False),
            L.BatchNormalization(),
            L.ReLU(),
            L.MaxPooling2D(),
            L.DepthwiseConv2D(3),
            L.GlobalAveragePooling2D(),
            L.Dense(3, "softmax"),
        ]
    )


def recurrent(cell):
    return lambda: keras.Sequential(
        [keras.Input((6,)), L.Embedding(20, 8, mask_zero=True), cell(), L.Dense(3, "softmax")]
    )


def transformer():
    tokens = keras.Input((6,))
    x = L.Embedding(20, 8)(tokens)
    y = L.LayerNormalization()(x)
    x = x + L.MultiHeadAttention(2, 4)(y, y, use_causal_mask=True)
    y = L.Dense(16, "gelu")(L.LayerNormalization()(x))
    return keras.Model(tokens, L.Dense(3, "softmax")(L.GlobalAveragePooling1D()(x + L.Dense(8)(y))))


def two_by_two():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    both = L.Concatenate()([L.Dense(8, "tanh")(a), L.Dense(8, "tanh")(b)])
    return keras.Model({"a": a, "b": b}, {"p": L.Dense(2, name="p")(both), "q": L.Dense(1, "sigmoid", name="q")(both)})


class OwnStep(keras.Model):
    """A subclassed model with a `train_step` of its own, that keeps a metric of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = L.Dense(16, "tanh"), L.Dense(2)
        self.norm = keras.metrics.Mean(name="gradient_norm")

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, batch):
        import tensorflow as tf

        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True)) + 0.01 * tf.add_n(
                [tf.reduce_sum(w**2) for w in self.trainable_variables]
            )
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.norm.update_state(tf.linalg.global_norm([tf.convert_to_tensor(g) for g in gradients]))
        return {"loss": loss, "gradient_norm": self.norm.result(), "constant": 3.0}


def test_dense_with_dropout_draws_the_masks_of_tensorflows_own_xla():
    assert_same_training(
        with_dropout, data(ROWS), reference=True, dtype="float32", optimizer=adam, loss="mse", metrics=["mae"]
    )


def test_convolutions_and_batch_normalization():
    assert_same_training(
        convolutional, (numbers(8, 8, 2), classes(3)), optimizer=adam, loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )  # fmt: skip


CELLS = {
    "lstm": lambda: L.LSTM(8),
    "gru": lambda: L.GRU(8),
    "bidirectional": lambda: L.Bidirectional(L.LSTM(4)),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_recurrent_layers(cell):
    assert_same_training(
        recurrent(cell), (classes(20, 6), classes(3)), optimizer=adam, loss="sparse_categorical_crossentropy"
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.exhaustive(but=["float64"])
def test_a_transformer(dtype):
    assert_same_training(
        transformer, (classes(20, 6), classes(3)), dtype=dtype, optimizer=adam, loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )  # fmt: skip


def test_two_inputs_and_two_outputs():
    x = {"a": numbers(4), "b": numbers(3, seed=2)}
    y = {"p": numbers(2, seed=3), "q": classes(2, 1)}
    assert_same_training(
        two_by_two, (x, y), optimizer=adam, loss={"p": "mse", "q": "binary_crossentropy"},
        loss_weights={"p": 0.3, "q": 2.0}, metrics={"p": ["mae"], "q": ["accuracy"]},
    )  # fmt: skip


def test_a_train_step_of_its_own():
    run = assert_same_training(OwnStep, data(ROWS), optimizer=adam, loss="mse")
    assert run.logs[-1]["constant"] == 3.0


def test_mixed_bfloat16():
    """bfloat16 keeps 8 bits: the engines of Keras differ by some 1e-2, which the twin measures."""

    def make():
        with floatx("float32"):
            keras.config.set_dtype_policy("mixed_bfloat16")
            return keras.Sequential([keras.Input((4,)), L.Dense(16, "relu"), L.Dense(2, dtype="float32")])

    assert_same_training(make, data(ROWS), dtype="float32", optimizer=adam, loss="mse")


def test_mixed_float16_scales_its_loss():
    def make():
        keras.config.set_dtype_policy("mixed_float16")
        return dense()

    try:
        run = assert_same_training(make, data(ROWS), reference=True, dtype="float32", optimizer=adam, loss="mse")
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(run.model.optimizer).__name__ == "LossScaleOptimizer"


def test_class_weights():
    assert_same_training(
        lambda: keras.Sequential([keras.Input((4,)), L.Dense(8, "tanh"), L.Dense(3, "softmax")]),
        (numbers(4), classes(3)), fit={"class_weight": {0: 0.5, 1: 1.0, 2: 3.0}}, optimizer=adam,
        loss="sparse_categorical_crossentropy", weighted_metrics=["accuracy"],
    )  # fmt: skip


def test_sample_weights():
    weights = np.linspace(0.1, 2.0, ROWS)
    assert_same_training(dense, data(ROWS), fit={"sample_weight": weights}, optimizer=adam, loss="mse")


def test_several_steps_per_execution():
    """10 batches in executions of 4, 4 and 2; callbacks see each execution once."""
    x, y = data(80)
    run = assert_same_training(dense, (x, y), fit={"epochs": 2}, optimizer=adam, loss="mse", steps_per_execution=4)
    assert len(run.logs) == 6 and int(run.model.optimizer.iterations.numpy()) == 20


QUICK_OPTIMIZERS = "Adam AdamW Muon MultiOptimizer momentum schedule global_clipnorm gradient_accumulation ema".split()
OPTIMIZERS = {
    **{
        name: lambda name=name: getattr(keras.optimizers, name)(0.01)
        for name in (
            "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl", "Lamb", "Lion", "Muon", "Nadam",
            "RMSprop", "SGD", "ScheduleFreeAdamW",
        )
    },
    "MultiOptimizer": lambda: keras.optimizers.MultiOptimizer(
        lambda variable: keras.optimizers.Adam(0.01) if "kernel" in variable.path else keras.optimizers.SGD(0.1)
    ),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 20)),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.5),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "gradient_accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=7),
    "weight_decay": lambda: keras.optimizers.Adam(0.01, weight_decay=0.1, amsgrad=True),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.exhaustive(but=QUICK_OPTIMIZERS)
def test_optimizers(optimizer):
    assert_same_training(dense, data(ROWS), optimizer=optimizer, loss="mse")


def test_every_optimizer_of_keras_is_tested():
    known = {name for name, item in vars(keras.optimizers).items() if isinstance(item, type)}
    wrappers = {"Optimizer", "OptimizerMap", "LossScaleOptimizer", "TFOptimizer"}  # float16's test has the third
    assert known - wrappers <= set(OPTIMIZERS)


def test_auto_uses_every_batch_once():
    """Whoever runs a step, the steps are those of one training."""
    with floatx("float64"):
        right = train(dense, data(ROWS), False, {"epochs": 3}, optimizer=adam, loss="mse")
        config = TrainingCompilerConfig(engine="auto", fallback="error")
        ours = train(dense, data(ROWS), config, {"epochs": 3}, optimizer=adam, loss="mse")
    assert ours.model.train_function._runner._choice.chosen is not None
    np.testing.assert_allclose(right.history["loss"], ours.history["loss"], rtol=1e-7)
    np.testing.assert_allclose(right.model.get_weights()[0], ours.model.get_weights()[0], rtol=1e-6)
