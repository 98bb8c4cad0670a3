"""Hooks that run after an import."""

import importlib
import importlib.util
import pickle
import sys

import pytest

import trainingcompiler
from trainingcompiler import config
from trainingcompiler.adapters import dispatch, import_hooks
from trainingcompiler.adapters.import_hooks import after_import

NAME, ADAPTER = "awaited_package", "awaited_adapter"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be imported under `NAME`, and a list of what happened."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text("from . import part\ncomplete = True\n")
    (folder / "part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in (NAME, f"{NAME}.part"):
        sys.modules.pop(name, None)
    import_hooks._waiting.clear()
    import_hooks._remove_idle_finder()


def waiting_list() -> list[bool]:
    """A list that gets, at each call back, whether the package was complete."""
    calls: list[bool] = []
    after_import(NAME, lambda: calls.append(importlib.import_module(NAME).complete))
    return calls


def test_the_callback_comes_after_the_import_and_once(package):
    calls = waiting_list()
    assert calls == []
    module = importlib.import_module(NAME)
    assert calls == [True]
    importlib.reload(module)
    assert calls == [True]
    assert import_hooks._Finder not in sys.meta_path


def test_a_module_that_is_there_already_calls_back_at_once(package):
    importlib.import_module(NAME)
    assert waiting_list() == [True]


def test_looking_for_the_module_is_not_importing_it(package):
    calls = waiting_list()
    spec = importlib.util.find_spec(NAME)
    assert spec.origin == str(package / "__init__.py")
    assert type(spec.loader) is importlib.machinery.SourceFileLoader
    assert pickle.loads(pickle.dumps(spec)).origin == spec.origin
    assert importlib.util.find_spec(f"{NAME}.part") is None or calls == [True]
    sys.modules.pop(NAME, None)
    importlib.import_module(NAME)
    assert calls == [True]


def test_a_lazy_loader_calls_back_when_it_loads(package):
    calls = waiting_list()
    spec = importlib.util.find_spec(NAME)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    assert calls == []
    assert module.complete
    assert calls == [True]


def test_a_failed_import_leaves_the_request_standing(package):
    source = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    calls = waiting_list()
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(NAME)
    assert calls == []
    (package / "__init__.py").write_text(source)
    importlib.import_module(NAME)
    assert calls == [True]


def test_a_request_can_be_withdrawn(package):
    calls: list[bool] = []
    withdraw = after_import(NAME, lambda: calls.append(True))
    withdraw()
    importlib.import_module(NAME)
    withdraw()
    assert calls == []
    assert import_hooks._Finder not in sys.meta_path


@pytest.fixture
def adapter(package, monkeypatch):
    """A stand-in for a framework and its adapter; the list of configurations it was enabled and disabled with."""
    calls: list[object] = []
    source = f"import {NAME}\ncalls = []\ndef enable(config): calls.append(config)\ndef disable(): calls.append(None)\n"
    (package.parent / f"{ADAPTER}.py").write_text(source)
    monkeypatch.setattr(dispatch, "HOOKED", {NAME: ADAPTER})
    monkeypatch.setattr("trainingcompiler.reporting.events.end_at_exit", lambda: None)
    for variable in config.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    yield lambda: sys.modules[ADAPTER].calls if ADAPTER in sys.modules else calls
    trainingcompiler.disable()
    sys.modules.pop(ADAPTER, None)


@pytest.mark.parametrize("imported_first", [True, False])
def test_enable_works_before_and_after_the_framework_is_imported(adapter, imported_first):
    chosen = trainingcompiler.TrainingCompilerConfig(engine="xla")
    if imported_first:
        importlib.import_module(NAME)
        trainingcompiler.enable(chosen)
        assert adapter()[-1] == chosen
    else:
        trainingcompiler.enable(chosen)
        assert adapter() == []
        importlib.import_module(NAME)
        assert adapter() == [chosen]
    trainingcompiler.disable()
    assert adapter()[-1] is None


def test_an_adapter_that_the_script_imports_itself(adapter):
    """It imports its framework, whose callback finds it half imported."""
    chosen = trainingcompiler.TrainingCompilerConfig(engine="xla")
    trainingcompiler.enable(chosen)
    importlib.import_module(ADAPTER)
    assert adapter() == [chosen]


def test_disable_before_the_import_leaves_the_framework_alone(adapter):
    trainingcompiler.enable()
    trainingcompiler.disable()
    importlib.import_module(NAME)
    assert adapter() == []


def test_the_environment_turns_everything_off(adapter, monkeypatch, capsys):
    monkeypatch.setattr("trainingcompiler.reporting.console._attached", None)
    monkeypatch.setattr("trainingcompiler.reporting.events._subscribers", [])
    monkeypatch.setenv("TRAININGCOMPILER", "0")
    trainingcompiler.enable(trainingcompiler.TrainingCompilerConfig(enabled=True))
    importlib.import_module(NAME)
    assert adapter() == []

    def train_step():
        pass

    assert trainingcompiler.compile(train_step) is train_step
    assert "compiled: no because --no-compile or TRAININGCOMPILER=0 says so" in capsys.readouterr().err


def test_compile_asks_the_adapter(adapter, package, monkeypatch):
    with (package.parent / f"{ADAPTER}.py").open("a") as source:
        source.write("def compile(step, config): return step, config.engine\n")
    monkeypatch.setattr(dispatch, "_STEPS", {"torch": ADAPTER})
    chosen = trainingcompiler.TrainingCompilerConfig(engine="xla")
    assert trainingcompiler.compile(len, chosen) == (len, "xla")
