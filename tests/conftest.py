"""Which tests run when: the quick ones first, and the slow ones where they are asked for (`--all`)."""

import os
import sys
from pathlib import Path

import pytest

# The folders in the order of what a test of each takes; those of whole processes, several a test, are last.
ORDER = (
    "core", "conformance", "tensorflow", "gpu", "pytorch", "rules", "keras", "fuzz", "launchers", "huggingface",
    "devices", "workers",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="slow tests too, and float32 beside float64")


def pytest_configure(config):
    if config.getoption("--all"):
        os.environ["TEST_ALL"] = "1"  # tests/pytorch/parity.py asks


def pytest_collection_modifyitems(config, items):
    items.sort(key=_place)
    if config.getoption("--all"):
        return
    slow = [item for item in items if _is_slow(item)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


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


def _is_slow(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("slow")
    if marker is None:
        return False
    parameters = getattr(item, "callspec", None)
    return parameters is None or parameters.id not in marker.kwargs.get("but", ())
