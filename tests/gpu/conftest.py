"""Tests marked `gpu_plan` compile for described GPUs: they need XLA's CUDA wheels, and neither a GPU nor a driver."""

import pytest

from trainingcompiler.targets import compiles_for_gpus


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="XLA's compiler for GPUs is not installed: make gpu-plan")
    for item in items:
        if item.get_closest_marker("gpu_plan") and not compiles_for_gpus():
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
