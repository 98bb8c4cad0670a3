"""TensorFlow speaks to standard error while it starts, and says there what the machine has and has not."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

import trainingcompiler as tc


def pytest_configure(config):
    """Keras and TensorFlow turn their variables into arrays in a way that NumPy 2.4 warns of."""
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    )


@pytest.fixture(autouse=True)
def enabled(tmp_path_factory):
    """Hooks Keras around every test; options are those of each model."""
    tc.enable(tc.TrainingCompilerConfig(quiet=True, cache_dir=str(tmp_path_factory.getbasetemp() / "executables")))
    yield
    tc.disable()
