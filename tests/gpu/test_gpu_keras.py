"""Keras's training steps compile for a described H200, with their memory plans; no GPU is there."""

import os

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

keras = pytest.importorskip("keras")

from trainingcompiler.compiling import compiler  # noqa: E402
from trainingcompiler.errors import UsageError  # noqa: E402
from trainingcompiler.frameworks.keras.described import step_program  # noqa: E402
from trainingcompiler.targets.target import Target  # noqa: E402

L = keras.layers
ROWS = 32


def convolutional():
    image = keras.Input((16, 16, 3))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(16, 3, padding="same", use_bias=False)(image)))
    x = L.Dropout(0.2)(L.GlobalAveragePooling2D()(x))
    return keras.Model(image, L.Dense(10)(x)), np.zeros((ROWS, 16, 16, 3), np.float32)


def recurrent():
    parts = [keras.Input((12,), dtype="int32"), L.Embedding(100, 16), L.LSTM(16), L.Dense(10)]
    return keras.Sequential(parts), np.zeros((ROWS, 12), np.int32)


def transformer():
    tokens = keras.Input((16,), dtype="int32")
    x = L.Embedding(100, 32)(tokens)
    y = L.LayerNormalization()(x)
    x = x + L.MultiHeadAttention(2, 16, dropout=0.1)(y, y, use_causal_mask=True)
    return keras.Model(tokens, L.Dense(10)(L.GlobalAveragePooling1D()(x))), np.zeros((ROWS, 16), np.int32)


def program(make):
    keras.utils.set_random_seed(0)
    model, x = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"])
    before = model.get_weights()
    made = step_program(model, (x, np.zeros(ROWS, np.int32)))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    return model, made


@pytest.mark.parametrize("make", [convolutional, recurrent, transformer])
def test_the_program_has_the_state_of_the_model(make):
    model, made = program(make)
    parameters = [spec for spec in made.state if spec.role == "parameter"]
    assert sum(spec.size_bytes for spec in parameters) == sum(v.numpy().nbytes for v in model.trainable_variables)
    written = {spec.name for spec in made.state}
    assert any("iteration" in name for name in written) and any("momentum" in name for name in written)
    assert [spec.shape[0] for spec in made.inputs[:2]] == [ROWS, ROWS]


@pytest.mark.gpu_plan
@pytest.mark.parametrize("make", [convolutional, recurrent, transformer])
def test_it_compiles_for_a_described_h200(make):
    _, made = program(make)
    executable = compiler.compile(made, Target.gpu("h200"))
    state_bytes = sum(spec.size_bytes for spec in made.state)
    assert executable.memory.alias_bytes >= state_bytes
    assert executable.memory.peak_bytes > executable.memory.argument_bytes > state_bytes
    if make is convolutional:
        assert "__cudnn$conv" in executable.as_text()


def test_a_model_without_an_optimizer_is_refused():
    model, x = convolutional()
    with pytest.raises(UsageError, match="the model has no optimizer yet; call model.compile"):
        step_program(model, (x, np.zeros(ROWS, np.int32)))
