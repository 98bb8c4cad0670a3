"""What we replace in a library is listed, and goes while it is still ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainingcompiler.adapters import patches
from trainingcompiler.adapters.patches import Patches

PAGE = Path(__file__).parents[2] / "docs" / "patches.md"


class Library:
    def call(self):
        return "the library"


class Derived(Library):
    pass


def ours(library):
    return "ours"


@pytest.fixture
def made():
    made = Patches()
    yield made
    made.restore()
    assert Library().call() == Derived().call() == "the library"


def of(owner) -> list[patches.Patch]:
    return [patch for patch in patches.in_force() if patch.owner is owner]


def test_a_patch_is_listed_and_goes(made):
    made.replace(Library, "call", ours, "we listen", "library issue 7")
    assert Library().call() == "ours"
    (patch,) = of(Library)
    assert str(patch) == f"{__name__}.Library.call: we listen (library issue 7)"
    made.restore()
    assert Library().call() == "the library" and not of(Library) and not made


def test_what_was_inherited_is_inherited_again(made):
    made.replace(Derived, "call", ours, "we listen")
    made.restore()
    assert "call" not in vars(Derived)


def test_a_closure_cell(made):
    def inner():
        return "the library"

    def outer():
        return inner()

    (cell,) = outer.__closure__
    made.replace(cell, "cell_contents", lambda: "ours", "it was imported by name")
    assert outer() == "ours" and "inner: it was imported by name" in str(of(cell)[0])
    made.restore()
    assert outer() == "the library"


def test_what_somebody_has_put_over_ours_stays(made):
    calls = []
    original = Library.call
    made.replace(Library, "call", ours, "we listen")
    below = Library.call

    def traced(library):
        calls.append(1)
        return below(library)

    Library.call = traced
    made.restore()
    assert Library().call() == "ours" and calls == [1] and not of(Library)
    Library.call = original


def test_two_patches_of_one_attribute_go_in_turn(made):
    made.replace(Library, "call", ours, "one")
    made.replace(Library, "call", lambda library: "again", "two")
    assert Library().call() == "again"
    made.restore()


def test_another_librarys_patch_survives_the_end():
    script = """
import torch
from torch import nn
import trainingcompiler as tc
tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True))
inner, calls = nn.Module.__call__, []
def traced(self, *args, **kwargs):
    calls.append(type(self).__name__)
    return inner(self, *args, **kwargs)
nn.Module.__call__ = traced
nn.Linear(2, 2)(torch.zeros(1, 2))
tc.disable()
nn.Linear(2, 2)(torch.zeros(1, 2))
print(calls)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "['Linear', 'Linear']\n"


def test_the_page_has_what_the_launcher_lists():
    command = [sys.executable, "-m", "trainingcompiler.launch", "--list-patches"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    written = [line.removeprefix("* ") for line in PAGE.read_text().splitlines() if line.startswith("* ")]
    # Which classes of optimizers there are depends on what is installed.
    assert [line for line in listed if ".step: " not in line] == [line for line in written if ".step: " not in line]
    assert "torch.nn.modules.module.Module.__call__: a call of a module is where recording begins" in listed
