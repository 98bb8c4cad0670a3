"""Keras and TensorFlow where several processes were started: each would train a model of its own."""

import os
import subprocess
import sys

import pytest

KERAS = """
import keras
model = keras.Sequential([keras.layers.Dense(1)])
model.compile("sgd", "mse")
"""
TENSORFLOW = """
import tensorflow as tf
import trainingcompiler as tc
tc.compile(tf.function(lambda x: x))
"""


@pytest.mark.parametrize(
    ("source", "what"), [(KERAS, "Keras on tensorflow"), (TENSORFLOW, "A step of TensorFlow")], ids=["keras", "tf"]
)
def test_several_workers_are_refused_with_what_to_do(tmp_path, source, what):
    (tmp_path / "train.py").write_text(source)
    ran = subprocess.run(
        [sys.executable, "-m", "trainingcompiler.launch", "--nproc-per-node=2", "train.py"],
        cwd=tmp_path, env={**os.environ, "KERAS_BACKEND": "tensorflow"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 2
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"trainingcompiler: {what} is compiled for one process, and this is rank ")
    assert last.endswith(
        " of 2: each would train a model of its own. To train on several devices, leave --nproc-per-node out and give "
        "--devices=all; to run a script that knows of several processes as it is, give --no-compile"
    )
