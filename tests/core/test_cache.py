"""The compilation cache: where it lies, how large it gets, what happens to damage."""

import os
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from trainingcompiler.cache import jax_cache
from trainingcompiler.compiling import compiler
from trainingcompiler.errors import ConfigError
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.reporting import events

pytestmark = pytest.mark.usefixtures("jax_options")
LIMIT_BYTES = 10**8


def compile_program() -> jax_cache.CompileOutcome:
    def cached_program(x):
        return x * 2.0 + 1.0

    jax.clear_caches()
    lowered = jax.jit(cached_program).lower(jax.ShapeDtypeStruct((3,), np.float32))
    with jax_cache.watching() as outcome:
        executable = lowered.compile()
    np.testing.assert_array_equal(executable(np.ones(3, np.float32)), np.full(3, 3.0, np.float32))
    return outcome


def entries(folder) -> list:
    return list(folder.glob("executables-jax-*/jit_cached_program-*-cache"))


def test_a_second_compile_is_a_hit(tmp_path):
    folder = jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    assert folder == str(tmp_path / f"executables-jax-{jax.__version__}")
    before = jax_cache.hits_and_misses()
    first, second = compile_program(), compile_program()
    after = jax_cache.hits_and_misses()
    assert (first.hit, first.detail) == (False, "not in the cache")
    assert second.hit and second.detail.startswith("cache hit, saved ")
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
    assert len(entries(tmp_path)) == 1


def test_the_line_of_a_compile_says_whether_it_was_kept(tmp_path, seen):
    jax_cache.enable_persistent_cache(str(tmp_path))
    number = np.dtype(np.float32)
    spec = TensorSpec(name="x", shape=(3,), dtype=number, role="parameter")
    program = StepProgram(
        name="line", function=lambda state, inputs: ((state[0] * 2.5,), ()), state=(spec,), inputs=(), outputs=()
    )
    for said in ("line, not in the cache", "line, cache hit, saved "):
        jax.clear_caches()
        compiler.compile(program)
        ended = [event for event in seen if isinstance(event, events.PhaseEnded) and event.name == "compile"]
        assert ended[-1].detail.startswith(said)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_entry_is_said_recompiled_and_replaced(tmp_path, seen, damage, strict):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    compile_program()
    (entry,) = entries(tmp_path)
    sound = entry.read_bytes()
    middle = len(sound) // 2
    flipped = sound[:middle] + bytes([sound[middle] ^ 0xFF]) + sound[middle + 1 :]
    entry.write_bytes(
        {"truncated": sound[:middle], "empty": b"", "garbage": b"garbage" * 9, "flipped": flipped}[damage]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        assert not compile_program().hit
    assert [(type(event), event.path) for event in seen] == [(events.CacheDamaged, str(entry))]
    assert compile_program().hit


def test_other_warnings_pass_by(tmp_path):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    with pytest.warns(UserWarning, match="something else"), jax_cache.watching():
        warnings.warn("something else", stacklevel=1)


def test_an_entry_out_of_reach_is_not_taken_for_damaged(tmp_path, seen, monkeypatch):
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    compile_program()
    (entry,) = entries(tmp_path)
    entry.unlink()
    entry.mkdir()  # reading it raises IsADirectoryError
    assert not compile_program().hit
    assert all(isinstance(event, events.Note) for event in seen) and seen
    assert entry.is_dir()


def test_what_a_killed_process_left_is_removed(tmp_path, seen):
    folder = tmp_path / f"executables-jax-{jax.__version__}"
    folder.mkdir()
    half, fresh = folder / "jit_a-1-cache", folder / "jit_b-2-cache"
    for entry in (half, fresh):
        entry.write_bytes(b"half")
    os.utime(half, (time.time() - 3600,) * 2)
    jax_cache.enable_persistent_cache(str(tmp_path), LIMIT_BYTES)
    assert [event.path for event in seen] == [str(half)]
    assert not half.exists() and fresh.exists()


def test_other_versions_go_when_all_together_are_too_large(tmp_path):
    older, old = tmp_path / "executables-jax-0.1", tmp_path / "executables-jax-0.2"
    for folder, age_s in ((older, 2000), (old, 1000)):
        folder.mkdir()
        (folder / "jit_a-1-cache").write_bytes(b"x" * 100)
        (folder / "note.txt").write_text("not ours")
        os.utime(folder, (time.time() - age_s,) * 2)
    jax_cache.enable_persistent_cache(str(tmp_path), 150)
    assert not (older / "jit_a-1-cache").exists() and (older / "note.txt").exists()
    assert (old / "jit_a-1-cache").exists()


def test_a_size_of_nothing_keeps_nothing(tmp_path):
    assert jax_cache.enable_persistent_cache(str(tmp_path), 0) is None
    assert compile_program().detail == ""
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_was_not_wanted_before_is_kept_again(tmp_path, seen):
    assert jax_cache.enable_persistent_cache(str(tmp_path), 0) is None
    assert jax_cache.enable_persistent_cache(str(tmp_path), 10**9) is not None and seen == []


def test_jaxs_own_option_is_left_alone(tmp_path, seen):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    limit = jax.config.jax_compilation_cache_max_size
    assert jax_cache.enable_persistent_cache(size_limit_bytes=12345) == str(tmp_path)
    assert "as JAX's own option says" in seen[0].text
    assert jax.config.jax_compilation_cache_max_size == limit


def test_a_folder_that_cannot_be_made(tmp_path, seen, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name a folder that can be written"):
        jax_cache.enable_persistent_cache(str(tmp_path / "file"), LIMIT_BYTES)
    monkeypatch.setattr("trainingcompiler.cache.jax_cache.default_cache_dir", lambda: str(tmp_path / "file"))
    assert jax_cache.enable_persistent_cache(None, LIMIT_BYTES) is None
    assert "--cache-dir names another folder" in seen[0].text


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")
def test_the_folder_is_private_and_an_open_one_is_said(tmp_path, seen):
    folder = jax_cache.enable_persistent_cache(str(tmp_path / "new"), LIMIT_BYTES)
    assert os.stat(folder).st_mode & 0o077 == 0
    os.chmod(folder, 0o777)
    jax_cache.enable_persistent_cache(str(tmp_path / "new"), LIMIT_BYTES)
    assert "run code as you" in seen[0].text


def test_the_next_process_finds_the_executables(tmp_path):
    program = (
        "import jax, sys\n"
        "from trainingcompiler.cache import jax_cache\n"
        "jax_cache.enable_persistent_cache(sys.argv[1], 10**8)\n"
        "with jax_cache.watching() as outcome:\n"
        "    jax.jit(lambda x: x * 3.0).lower(1.0).compile()\n"
        "print(outcome.hit)\n"
    )
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env=environ,
        )
        for _ in range(2)
    ]
    assert [run.stdout for run in runs] == ["False\n", "True\n"]
