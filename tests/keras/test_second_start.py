"""A second start of a Keras script finds its step's executable, and trains as the first."""

import os
import subprocess
import sys

SCRIPT = """
import keras
keras.utils.set_random_seed(0)
import numpy as np
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(4)])
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
rows = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
history = model.fit(rows, rows[:, :4].argmax(1), batch_size=16, epochs=2, verbose=0, shuffle=False)
print(history.history["loss"])
"""


def test_a_second_start_loads(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "trainingcompiler.launch", "--engine=xla", f"--cache-dir={tmp_path / 'cache'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    first, second = (
        subprocess.run([*command, script], capture_output=True, text=True, check=True, env=environment)
        for _ in range(2)
    )
    assert first.stdout == second.stdout and first.stdout.startswith("[")
    assert "[compile]" in first.stderr and "not in the cache" in first.stderr
    assert "[load]" in second.stderr and "[compile]" not in second.stderr
