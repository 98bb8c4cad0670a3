"""Keras on JAX and on PyTorch: what the hook does there, each on one model, in a process of its own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import keras, numpy as np, sys
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
x = np.random.default_rng(0).standard_normal((44, 4)).astype("float32")
history = model.fit(x, x[:, :2], batch_size=8, epochs=3, verbose=0, shuffle=False).history
model.optimizer.learning_rate = 0.001
model.fit(x, x[:, :2], batch_size=8, verbose=0)
print("tensorflow" in sys.modules, "torch" in sys.modules)
print([round(value, 4) for value in history["loss"] + history["mae"]])
print([round(float(abs(weight).sum()), 3) for weight in model.get_weights()])
"""


def run(backend: str, folder, *options: str, launched: bool = True) -> subprocess.CompletedProcess:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "trainingcompiler.launch", f"--cache-dir={folder / 'cache'}", *options] if launched else []
    environment = os.environ | {"KERAS_BACKEND": backend}
    return subprocess.run(
        [sys.executable, *launcher, str(script)], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_on_jax_the_step_is_planned_and_its_programs_are_counted(tmp_path):
    ours, plain = run("jax", tmp_path), run("jax", tmp_path, launched=False)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout
    assert "compiled: yes because Keras does it on JAX" in ours.stderr
    assert ours.stderr.count("[compile]") == 2 and " MB" in ours.stderr
    assert "[recompile]  #2" in ours.stderr and "[8, 4] -> float32[4, 4]" in ours.stderr
    assert "[done]       24 steps, " in ours.stderr and "2 compiles" in ours.stderr


def test_on_pytorch_it_is_refused_with_what_to_do(tmp_path):
    ours, plain = run("torch", tmp_path), run("torch", tmp_path, launched=False)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout
    assert "[fallback]   this step runs as Keras runs it from now on: Keras on PyTorch steps with" in ours.stderr
    assert "KERAS_BACKEND=tensorflow trains the same model compiled" in ours.stderr
    assert "[done]       24 steps (0 compiled, 24 eager)" in ours.stderr
    refused = run("torch", tmp_path, "--fallback=error")
    assert refused.returncode == 1 and 'fallback="error" forbids' in refused.stderr


@pytest.mark.parametrize("engine", ["eager", "tensorflow"])
def test_an_engine_of_another_framework_is_named_on_jax(engine, tmp_path):
    done = run("jax", tmp_path, f"--engine={engine}")
    assert done.returncode == 2
    assert f"engine={engine} is not for Keras on JAX" in done.stderr
