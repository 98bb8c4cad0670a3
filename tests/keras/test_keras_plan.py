"""`python -m trainingcompiler.plan` on Keras scripts."""

import json
import os
import subprocess
import sys

import pytest

FIT = """
import keras
import numpy as np

model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)])
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True){options})
print("weights", model.count_params())
model.fit(np.zeros((64, 16), "float32"), np.zeros(64, "int32"), batch_size=8, verbose=0)
print("trained")
"""


@pytest.fixture
def plan(tmp_path):
    """Plans a Keras script; returns the finished process."""

    def run(source: str, *options: str) -> subprocess.CompletedProcess:
        script = tmp_path / "train.py"
        script.write_text(source)
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-m", "trainingcompiler.plan", *options, str(script)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_step_of_fit_is_planned_and_not_taken(plan, tmp_path):
    path = tmp_path / "plan.json"
    done = plan(FIT.format(options=""), "--batch-sizes", "8,32", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "weights" in done.stdout and "trained" not in done.stdout
    small, large = json.loads(path.read_text())["batches"]
    parameters = 4 * (16 * 32 + 32 + 32 * 4 + 4)
    assert (small["batch_size"], small["parameter_bytes"]) == (8, parameters)
    assert small["optimizer_bytes"] > 2 * parameters  # Adam's averages, and the metrics
    assert large["memory"]["argument_bytes"] - small["memory"]["argument_bytes"] == 24 * (16 * 4 + 4)
    assert large["flops"] > 2 * small["flops"] > 0


def test_a_model_that_keras_runs_itself_is_refused(plan):
    done = plan(FIT.format(options=", run_eagerly=True"))
    assert done.returncode == 2
    assert "the step of train.py is no program that could be planned" in done.stderr
