"""setup.py installs `frameworks/` and `launchers/` inside the package, from a wheel and from the source folder."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"torch", "huggingface", "tensorflow", "cuda12", "cuda13", "ray", "checkpoints", "dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without touching the source folder."""
    folder = tmp_path_factory.mktemp("wheel")
    commands = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"]
    commands += ["bdist_wheel", "--bdist-dir", folder / "layout", "--dist-dir", folder]
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *map(str, commands)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_every_module_under_its_installed_name(wheel):
    rooms = {"trainingcompiler": "trainingcompiler"}
    rooms |= {room: f"trainingcompiler/{room}" for room in ("frameworks", "launchers")}
    expected = {
        f"{installed}/{path.relative_to(ROOT / room).as_posix()}"
        for room, installed in rooms.items()
        for path in (ROOT / room).rglob("*.py")
    }
    assert expected == {name for name in wheel.namelist() if name.endswith(".py")}


def test_wheel_has_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"trainingcompiler"}


def test_wheel_describes_itself(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    unconditional = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split("<")[0].split(">")[0] for line in unconditional) == ["jax", "numpy"]


def test_version_is_stated_once_more_and_agrees(wheel):
    import trainingcompiler

    assert f"trainingcompiler-{trainingcompiler.__version__}.dist-info/METADATA" in wheel.namelist()


@pytest.mark.parametrize("room", ["frameworks", "launchers"])
def test_source_install_and_checkout_have_the_room(room, tmp_path):
    script = f"import trainingcompiler.{room} as room; print(room.__file__)"
    for folder, options in ((tmp_path, ()), (ROOT, ("-S",))):  # -S: without what is installed
        command = [sys.executable, *options, "-c", script]
        run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        assert Path(run.stdout.strip()) == ROOT / "trainingcompiler" / room / "__init__.py"
        assert Path(run.stdout.strip()).resolve() == ROOT / room / "__init__.py"


@pytest.mark.parametrize("room", ["frameworks", "launchers"])
def test_source_install_adds_no_top_level_name(room, tmp_path):
    run = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=tmp_path, capture_output=True, text=True)
    assert f"No module named '{room}'" in run.stderr
