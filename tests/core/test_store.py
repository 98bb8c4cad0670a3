"""Executables kept by the digests of their programs: a second start neither lowers nor compiles."""

import dataclasses
import os
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from trainingcompiler.cache import executables, jax_cache
from trainingcompiler.cache.prefetch import LIST
from trainingcompiler.compiling import compiler
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.reporting import events
from trainingcompiler.targets.gpus import gpu
from trainingcompiler.targets.target import Target

pytestmark = pytest.mark.usefixtures("jax_options")
LIMIT_BYTES = 10**8


def program(digest: str | None = "one", factor: float = 2.0, rows: int = 3, name: str = "kept_program") -> StepProgram:
    """Doubles its state and returns its input plus one."""

    def spec(label, role):
        return TensorSpec(name=label, shape=(rows,), dtype=np.dtype(np.float32), role=role)

    return StepProgram(
        name=name,
        function=lambda state, inputs: ((state[0] * factor,), (inputs[0] + 1.0,)),
        state=(spec("weight", "parameter"),),
        inputs=(spec("batch", "batch"),),
        outputs=(),
        digest=digest,
    )


def run(executable) -> list[float]:
    rows = executable.program.state[0].shape
    (new,), (output,) = executable((jax.numpy.ones(rows, np.float32),), (np.zeros(rows, np.float32),))
    return [float(new[0]), float(output[0])]


def entries(folder) -> list:
    return sorted(folder.glob("executables-jax-*/*-program"))


def phases(seen) -> list[str]:
    return [event.name for event in seen if isinstance(event, events.PhaseEnded)]


def details(seen) -> list[str]:
    return [event.detail for event in seen if isinstance(event, events.PhaseEnded)]


def test_a_second_compile_only_loads(tmp_path, seen):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    first = compiler.compile(program())
    assert phases(seen) == ["lower", "compile"] and len(entries(tmp_path)) == 1
    assert details(seen)[-1] == "kept_program, not in the cache"
    seen.clear()
    second = compiler.compile(program())
    assert phases(seen) == ["load"] and details(seen)[-1].startswith("kept_program, cache hit, saved ")
    assert run(first) == run(second) == [2.0, 1.0]
    assert second.memory == first.memory
    assert not list(tmp_path.glob("executables-jax-*/jit_kept_program-*-cache"))  # nor does JAX


@pytest.mark.parametrize("other", [{"digest": "another"}, {"rows": 4}])
def test_another_program_is_compiled(tmp_path, seen, other):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    compiler.compile(program())
    seen.clear()
    assert run(compiler.compile(program(**{"factor": 3.0, **other}))) == [3.0, 1.0]
    assert phases(seen) == ["lower", "compile"] and len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "value"), [("jax_default_matmul_precision", "highest"), ("jax_default_prng_impl", "rbg")]
)
def test_an_option_that_decides_is_part_of_the_key(tmp_path, name, value):
    before = getattr(jax.config, name)
    mine = executables.key_of(program(), Target.local())
    jax.config.update(name, value)
    try:
        assert executables.key_of(program(), Target.local()) != mine
    finally:
        jax.config.update(name, before)
    assert executables.key_of(program(), Target.local()) == mine


def test_flags_of_xla_are_part_of_the_key(monkeypatch):
    mine = executables.key_of(program(), Target.local())
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert executables.key_of(program(), Target.local()) != mine


def test_a_program_without_a_digest_is_left_to_jax(tmp_path, seen):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    compiler.compile(program(digest=None))
    assert not entries(tmp_path) and list(tmp_path.glob("executables-jax-*/jit_kept_program-*-cache"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped", "another pickle"])
def test_a_damaged_entry_is_said_and_replaced(tmp_path, seen, damage):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    compiler.compile(program())
    (entry,) = entries(tmp_path)
    sound = entry.read_bytes()
    middle = len(sound) // 2
    flipped = sound[:middle] + bytes([sound[middle] ^ 0xFF]) + sound[middle + 1 :]
    damaged = {"truncated": sound[:middle], "empty": b"", "garbage": b"garbage" * 9, "flipped": flipped}
    entry.write_bytes(damaged.get(damage, executables.zlib.compress(executables.pickle.dumps(("a", "b")))))
    seen.clear()
    assert run(compiler.compile(program())) == [2.0, 1.0]
    assert [event.path for event in seen if isinstance(event, events.CacheDamaged)] == [str(entry)]
    assert phases(seen) == ["load", "lower", "compile"]
    seen.clear()
    compiler.compile(program())
    assert phases(seen) == ["load"]


def test_the_least_recently_used_go_first(tmp_path):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    for name in ("a", "b"):
        compiler.compile(program(name=name))
    a, b = entries(tmp_path)
    os.utime(a, (time.time() - 100,) * 2)
    os.utime(b, (time.time() - 200,) * 2)
    compiler.compile(program(name="b"))  # used again
    jax_cache.enable_persistent_cache(str(tmp_path), int(2.5 * a.stat().st_size / 0.9))  # a tenth is for JAX's own
    compiler.compile(program(name="c"))
    assert [entry.name[0] for entry in entries(tmp_path)] == ["b", "c"]


def test_a_disk_that_takes_nothing_is_said(tmp_path, seen, monkeypatch):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executables.os, "replace", full)
    for digest in ("one", "two", "three"):
        assert run(compiler.compile(program(digest))) == [2.0, 1.0]
    (note,) = (event.text for event in seen if isinstance(event, events.Note))  # once, and not for each program
    folder = tmp_path / f"executables-jax-{jax.__version__}"
    assert note == (
        f"kept_program is not kept for the next run, and others may not be: writing to {folder} failed: [Errno 28] No "
        "space left on device; make room, or name another folder with --cache-dir"
    )
    assert not list(tmp_path.glob("executables-jax-*/*.part"))


def test_what_was_not_finished_is_removed_when_nobody_can_be_writing_it(tmp_path):
    folder = jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    old, young = (tmp_path / folder / f"{name}{executables.UNFINISHED}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    assert not old.exists() and young.exists()


def test_code_is_part_of_its_digest(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = executables.digest_of_code(tmp_path)
    executables.digest_of_code.cache_clear()
    (tmp_path / "a.py").write_text("x = 2\n")
    assert executables.digest_of_code(tmp_path) != first


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(tmp_path / "train.py")))


def start(tmp_path):
    """As a process does, when it has found its framework."""
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    jax_cache.store().begin(Target.local())


@pytest.mark.usefixtures("script")
def test_a_second_start_finds_its_programs_loaded(tmp_path, seen):
    start(tmp_path)
    for digest in ("one", "two"):
        compiler.compile(program(digest))
    seen.clear()
    start(tmp_path)
    for future in jax_cache.store().ahead._loading.values():
        future.result(60)
    loaded = [compiler.compile(program(digest)) for digest in ("one", "two")]
    assert [run(executable) for executable in loaded] == [[2.0, 1.0]] * 2
    said = [event.detail.rpartition(", saved ")[0] for event in seen if isinstance(event, events.PhaseEnded)]
    assert said == ["kept_program, cache hit, loaded ahead"] * 2
    seen.clear()
    assert run(compiler.compile(program())) == [2.0, 1.0]  # a second time: it was taken
    assert "loaded ahead" not in details(seen)[-1]


@pytest.mark.usefixtures("script")
def test_a_damaged_entry_is_said_by_who_asks_for_it(tmp_path, seen):
    start(tmp_path)
    compiler.compile(program())
    (entry,) = entries(tmp_path)
    entry.write_bytes(b"garbage")
    seen.clear()
    start(tmp_path)
    assert run(compiler.compile(program())) == [2.0, 1.0]
    assert [event.path for event in seen if isinstance(event, events.CacheDamaged)] == [str(entry)]


@pytest.mark.usefixtures("script")
def test_an_entry_removed_after_it_was_loaded_still_runs(tmp_path):
    start(tmp_path)
    compiler.compile(program())
    start(tmp_path)
    (entry,) = entries(tmp_path)
    jax_cache.store().ahead._loading[entry.name].result()
    jax_cache.store().ahead.end()
    executable = jax_cache.store().load(program(), Target.local())
    entry.unlink()
    assert executable.was_ready


@pytest.mark.usefixtures("script")
def test_nothing_is_loaded_ahead_for_what_cannot_run_here(tmp_path):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    others = {"workers": 2}, {"described": gpu("h100")}
    for target in (dataclasses.replace(Target.local(), **other) for other in others):
        jax_cache.store().begin(target)
        assert jax_cache.store().ahead is None


def test_what_no_script_has_begun_with_for_a_month_is_forgotten(tmp_path):
    folder = jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    old, young = (tmp_path / folder / f"{name}{LIST}" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("entry\n")
    os.utime(old, (time.time() - 31 * 24 * 3600,) * 2)
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    assert not old.exists() and young.exists()


def test_an_entry_whose_time_cannot_be_changed_is_loaded(tmp_path, seen, monkeypatch):
    """In a folder that belongs to somebody else."""
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    compiler.compile(program())
    seen.clear()

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(executables.os, "utime", refused)
    assert run(compiler.compile(program())) == [2.0, 1.0] and phases(seen) == ["load"]
