"""TensorFlow and PyTorch: neither comes with the other, and both work in one process."""

import subprocess
import sys
import textwrap

import pytest


def run(source: str, folder, *options: str) -> subprocess.CompletedProcess:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "trainingcompiler.launch", f"--cache-dir={folder / 'cache'}", *options, str(path)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


KERAS = """
    import keras, numpy as np, sys
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    model.fit(np.ones((32, 4)), np.ones((32, 2)), batch_size=8, epochs=2, verbose=0)
    print("torch" in sys.modules, "tensorflow" in sys.modules)
"""
TORCH = """
    import torch, sys
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.ones(8, 4)).sum().backward()
        optimizer.step()
    print("torch" in sys.modules, "tensorflow" in sys.modules or "keras" in sys.modules)
"""


def test_a_keras_run_is_compiled_and_imports_no_torch(tmp_path):
    done = run(KERAS, tmp_path, "--engine=xla", "--fallback=error", "--verify=always")
    assert "[note]       --verify=always compares programs of PyTorch; those of TensorFlow and" in done.stderr
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr
    assert "tensorflow 2.21.0  keras 3.15.1" in done.stderr and "compiled: yes" in done.stderr
    assert "[done]       8 steps, " in done.stderr


def test_a_torch_run_imports_no_tensorflow(tmp_path):
    done = run(TORCH, tmp_path, "--engine=xla")
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


def test_engine_tensorflow_in_a_torch_run_is_named(tmp_path):
    done = run(TORCH, tmp_path, "--engine=tensorflow")
    assert done.returncode == 2
    assert "engine=tensorflow is for TensorFlow and Keras" in done.stderr
    assert "--engine=eager" in done.stderr


def test_engine_eager_in_a_keras_run_is_named(tmp_path):
    done = run(KERAS, tmp_path, "--engine=eager")
    assert done.returncode == 2
    assert "engine=eager is for PyTorch" in done.stderr and "--engine=tensorflow" in done.stderr


@pytest.mark.parametrize("option", ["--no-compile", "--engine=tensorflow"])
def test_not_compiling_is_keras_as_it_is(option, tmp_path):
    source = KERAS.replace('"mse")', '"mse", training_compiler=True)')
    done = run(source, tmp_path, option)
    assert done.returncode == 0, done.stderr
    assert "compiled: no because" in done.stderr and "[compile]" not in done.stderr


def test_both_in_one_process(tmp_path):
    source = f"""
    import torch, tensorflow as tf, trainingcompiler as tc
    {TORCH.strip().replace("    print", "    # print")}
    {KERAS.strip().replace("    print", "    # print")}

    w = tf.Variable(1.0)

    def step(x):
        w.assign_sub(x)
        return w.read_value()

    layer = torch.nn.Linear(4, 2)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)

    def torch_step(x):
        sgd.zero_grad()
        layer(x).sum().backward()
        sgd.step()

    def mixed(x):
        return w, layer

    def nothing(x):
        return x

    class Trainer:
        def __init__(self):
            self.variable = tf.Variable(1.0)

        def step(self, x):
            self.variable.assign_sub(x)

    for function in (step, torch_step, tf.function(nothing), Trainer().step, mixed, nothing):
        try:
            print(type(tc.compile(function)).__module__)
        except tc.UsageError as error:
            print(error)
    print(float(tc.compile(step)(0.25)))
    """
    done = run(source, tmp_path, "--engine=xla", "--fallback=error")
    assert done.returncode == 0, done.stderr
    tensorflow, pytorch = (
        f"trainingcompiler.frameworks.{name}.compiled_function" for name in ("tensorflow", "pytorch")
    )
    lines = done.stdout.splitlines()
    assert lines[:4] == [tensorflow, pytorch, tensorflow, tensorflow]
    assert "uses both" in lines[4] and "names neither of them" in lines[5] and lines[6] == "0.75"
    assert "16 steps" in done.stderr or "17 steps" in done.stderr


def test_a_run_whose_models_all_opt_out_has_trained(tmp_path):
    done = run(KERAS.replace('"mse")', '"mse", training_compiler=False)'), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[done]       8 steps (0 compiled, 8 by TensorFlow)" in done.stderr
