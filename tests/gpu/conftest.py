"""Tests marked `gpu_plan` compile for described GPUs: they need XLA's CUDA wheels, and neither a GPU nor a driver.

Those marked `gpu` train on a GPU that is there.
"""

import sys
from pathlib import Path

import jax
import pytest
import torch

from trainingcompiler.targets.target import compiles_for_gpus

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="XLA's compiler for GPUs is not installed: make gpu-plan")
    absent = pytest.mark.skip(reason="no GPU that both torch and JAX can use")
    for item in items:
        if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
            item.add_marker(absent)
        if item.get_closest_marker("gpu_plan") and not compiles_for_gpus():
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
