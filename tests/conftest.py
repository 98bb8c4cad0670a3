"""Which tests run when: `make test` the fast ones, `make test-slow` the others, `make test-all` the exhaustive too.

A test is slow if its folder or its file is listed here, or if it is marked so. Exhaustive ones (other models of the
same kind, other dtypes) run with `--all` only.
"""

import os
import sys
from pathlib import Path

import pytest

# The folders in the order of what a test of each takes; those of whole processes, several a test, are last.
ORDER = (
    "core", "conformance", "tensorflow", "gpu", "pytorch", "rules", "keras", "fuzz", "launchers", "huggingface",
    "devices", "workers",
)  # fmt: skip

# Whole processes, several a test, or models that take long to compile.
SLOW_FOLDERS = {"devices", "fuzz", "huggingface", "keras", "launchers", "rules", "workers"}
SLOW_FILES = {
    "core/test_patches.py", "core/test_rendezvous.py", "core/test_worker.py",
    *(
        f"pytorch/test_{name}.py"
        for name in (
            "applied", "check", "decided", "digests", "gradients", "many_models", "memory_plan", "models",
            "not_enough_memory", "plan", "torch_compile", "verify",
        )
    ),
    "test_examples.py", "test_notebooks.py", "test_packaging.py",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="exhaustive tests too, and float32 beside float64")


def pytest_configure(config):
    if config.getoption("--all"):
        os.environ["TEST_ALL"] = "1"  # tests/pytorch/parity.py asks


@pytest.hookimpl(tryfirst=True)  # before pytest looks at `-m slow`
def pytest_collection_modifyitems(config, items):
    items.sort(key=_place)
    for item in items:
        path = Path(item.path).relative_to(Path(__file__).parent)
        if path.parts[0] in SLOW_FOLDERS or path.as_posix() in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    if config.getoption("--all"):
        return
    left_out = {item for item in items if _is_exhaustive(item)}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was():
    yield
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "overrides"):
        modes = torch.overrides._get_current_function_mode_stack()
        assert not modes, "a session of this test still watches torch: later tests would run under it"


def _place(item: pytest.Item) -> int:
    folder = Path(item.path).relative_to(Path(__file__).parent).parts[0]
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def _is_exhaustive(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("exhaustive")
    if marker is None:
        return False
    parameters = getattr(item, "callspec", None)
    return parameters is None or parameters.id not in marker.kwargs.get("but", ())
