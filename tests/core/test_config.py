"""The configuration: precedence, sources, mistakes."""

import subprocess
import sys

import pytest

import trainingcompiler
from trainingcompiler import config
from trainingcompiler.config import TrainingCompilerConfig, resolve, to_environment
from trainingcompiler.errors import ConfigError


def test_flag_wins_over_environment_wins_over_default():
    environ = {"TRAININGCOMPILER_ENGINE": "eager", "TRAININGCOMPILER_FALLBACK": "error"}
    resolved = resolve({"engine": "xla"}, environ)
    assert (resolved.config.engine, resolved.sources["engine"]) == ("xla", "--engine")
    assert (resolved.config.fallback, resolved.sources["fallback"]) == ("error", "TRAININGCOMPILER_FALLBACK")
    assert (resolved.config.debug, resolved.sources["debug"]) == (False, "default")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("0", False), ("Yes", True), ("off", False)])
def test_switches_are_read_from_text(text, value):
    assert resolve({}, {"TRAININGCOMPILER": text}).config.enabled is value


def test_every_field_can_be_set_from_the_environment():
    values = {
        "enabled": False,
        "debug": True,
        "engine": "xla",
        "fallback": "error",
        "verify": "always",
        "keep_gradients": True,
        "small_pages": True,
        "cache_dir": "kept",
        "dump": "stages",
        "record": "run.json",
        "cache_size_gb": 2.5,
        "devices": 4,
        "strategy": "fsdp+tp=2",
        "quiet": True,
    }
    assert set(values) == set(config.FIELDS)
    assert resolve({}, to_environment(values)).config == TrainingCompilerConfig(**values)


def test_a_variable_set_to_nothing_is_not_set():
    assert resolve({}, {"TRAININGCOMPILER_ENGINE": "", "TRAININGCOMPILER": ""}).sources["engine"] == "default"


def test_all_mistakes_are_reported_together_with_their_sources():
    environ = {
        "TRAININGCOMPILER_ENGNE": "xla",
        "TRAININGCOMPILER_CACHE_SIZE_GB": "lots",
        "TRAININGCOMPILER_DEBUG": "maybe",
        "ANOTHER": "x",
    }
    with pytest.raises(ConfigError) as caught:
        resolve({"fallback": "eagre"}, environ)
    assert caught.value.mistakes == (
        "environment variable TRAININGCOMPILER_ENGNE is not known; did you mean TRAININGCOMPILER_ENGINE?",
        "TRAININGCOMPILER_DEBUG=maybe: must be true or false (in text also 1, 0, yes, no, on, off)",
        "--fallback=eagre: must be one of eager, error; did you mean eager?",
        "TRAININGCOMPILER_CACHE_SIZE_GB=lots: must be a number of gigabytes, 0 or more (0 keeps nothing)",
    )


def test_an_unknown_variable_like_no_other_gets_the_list():
    with pytest.raises(ConfigError, match="the variables are TRAININGCOMPILER, TRAININGCOMPILER_DEBUG"):
        resolve({}, {"TRAININGCOMPILER_ZZZZZZZZZZZZZZZZZZZZZZZZZZZZ": "1"})


def test_the_dataclass_checks_itself():
    with pytest.raises(ConfigError) as caught:
        TrainingCompilerConfig(engine="tpu", quiet=1, cache_size_gb=-1, cache_dir="")  # type: ignore[arg-type]
    assert [text.partition("=")[0] for text in caught.value.mistakes] == [
        "engine",
        "cache_dir",
        "cache_size_gb",
        "quiet",
    ]


def test_the_table_shows_each_value_and_its_source():
    table = resolve({"engine": "xla", "enabled": False}, {"TRAININGCOMPILER_QUIET": "1"}).describe()
    rows = [line.split() for line in table.splitlines()]
    assert ["engine", "xla", "--engine"] in rows
    assert ["enabled", "false", "--no-compile"] in rows
    assert ["quiet", "true", "TRAININGCOMPILER_QUIET"] in rows
    assert ["cache_size_gb", "10.0", "default"] in rows
    assert ["cache_dir", config.default_cache_dir(), "default"] in rows


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG's variable is for other platforms")
def test_the_default_cache_folder_follows_xdg():
    assert config.default_cache_dir({"XDG_CACHE_HOME": "/caches"}) == "/caches/trainingcompiler"
    assert config.default_cache_dir({}).endswith("/.cache/trainingcompiler")


def test_importing_the_package_loads_neither_a_framework_nor_jax():
    program = (
        "import sys, trainingcompiler as tc; tc.TrainingCompilerConfig, tc.ConfigError, tc.enable, tc.compile;"
        "print([name for name in ('jax', 'torch', 'tensorflow', 'keras', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_exists():
    for name in trainingcompiler.__all__:
        assert getattr(trainingcompiler, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'enabel'"):
        _ = trainingcompiler.enabel
