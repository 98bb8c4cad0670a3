"""Executables kept between runs, found by what they were made of: a second start neither lowers nor compiles.

JAX's own cache is asked with the lowered program, so that every start has to trace and lower it first; this one is
asked with the program's digest. An entry is machine code in a pickle: the note on trust in `jax_cache` holds here too.
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import platform
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jaxlib import lapack

from trainingcompiler.cache.prefetch import ExecutablePrefetcher
from trainingcompiler.files import write_whole
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.reporting.events import CacheDamaged, Note, emit
from trainingcompiler.targets.target import Target
from trainingcompiler.targets.xla_options import options

try:
    import fcntl
except ImportError:  # Windows, which trains with one worker
    fcntl = None  # type: ignore[assignment]

ENTRY, UNFINISHED = "-program", ".part"  # the suffixes of an entry's file, and of one that is being written
VERDICT = "-verdict"  # of what was found when the entry's program was compared with its framework, as JSON
_LAPACK = b"lapack_"  # how the names of its functions begin in an executable
_INDIFFERENT = ("cache", "log", "debug", "dump", "traceback", "pprint", "leak", "thread_guard", "x64", "transfer_guard")


@dataclass(frozen=True, slots=True)
class KeptExecutable:
    """What a store has of a program.

    Attributes:
        compiled: The loaded executable.
        making_time_s: The seconds it once took to lower and compile.
        was_ready: Whether it was loaded, or being loaded, before anybody asked for it.
    """

    compiled: Any
    making_time_s: float
    was_ready: bool = False


@dataclass(kw_only=True, slots=True)
class ExecutableStore:
    """A folder of executables.

    Attributes:
        folder: It exists, and belongs to the user alone.
        size_limit_bytes: Bound on all entries together; the least recently used go first.
        ahead: What the script begins with, as far as `begin` has been called.
    """

    folder: Path
    size_limit_bytes: int
    ahead: ExecutablePrefetcher | None = None

    def begin(self, target: Target) -> None:
        """Begins to load, in a thread of its own, what the last run of this script began with.

        Args:
            target: What this run compiles for. Nothing is loaded ahead for described GPUs, or for one of several
                workers: which of these loads, and when, they settle among themselves.
        """
        if target.described is None and target.workers == 1:
            surroundings = [_of_target(target), *_surroundings(), *_options()]
            self.ahead = ExecutablePrefetcher(self.folder, surroundings, lambda path: self._read(path, target))
            self.ahead.begin()

    def has(self, program: StepProgram, target: Target) -> bool:
        """Whether there is an entry for the program, sound or not."""
        return self._path(program, target).exists()

    def load(self, program: StepProgram, target: Target) -> KeptExecutable | None:
        """The executable of a program for devices of this process, if it was kept.

        An entry that cannot be understood is removed, and said.
        """
        path = self._path(program, target)
        ready = self.ahead.take(path) if self.ahead else None
        try:
            kept = replace(ready, was_ready=True) if ready else self._read(path, target)
        except OSError:
            return None
        except Exception as error:  # whatever damage looks like
            remove(path)
            emit(CacheDamaged(path=str(path), error=f"{type(error).__name__}: {error}".split("\n")[0]))
            return None
        with contextlib.suppress(OSError):  # of somebody else's, or removed by another process meanwhile
            os.utime(path)
        if self.ahead:
            self.ahead.used(path)
        return kept

    def save(self, program: StepProgram, target: Target, compiled: Any, making_time_s: float) -> None:
        """Keeps an executable. A failure is said, once for all programs, and is no error: the run can go on."""
        path = self._path(program, target)
        executable, *structures = serialize_executable.serialize(compiled)
        data = zlib.compress(pickle.dumps((executable, structures, making_time_s)), level=1)
        try:
            self._write(path, data)
            self._forget_beyond_limit()
            if self.ahead:
                self.ahead.used(path)
        except OSError as error:
            reason = str(self.folder), error.errno
            if reason not in _told:
                _told.add(reason)
                emit(
                    Note(
                        text=f"{program.name} is not kept for the next run, and others may not be: writing to "
                        f"{self.folder} failed: {error}; make room, or name another folder with --cache-dir"
                    )
                )

    def verdict(self, program: StepProgram, target: Target) -> dict[str, Any] | None:
        """What was kept with the program's executable by `keep_verdict`, on this machine or one like it."""
        try:
            found = json.loads(_verdict_of(self._path(program, target)).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or one that was not written to its end: it is found again
            return None
        return found if isinstance(found, dict) else None

    def keep_verdict(self, program: StepProgram, target: Target, verdict: Mapping[str, Any]) -> None:
        """Keeps what was found of a program beside its executable. A failure costs the next run finding it again."""
        with contextlib.suppress(OSError):
            write_whole(_verdict_of(self._path(program, target)), json.dumps(verdict).encode())

    @contextlib.contextmanager
    def alone(self, program: StepProgram, target: Target) -> Iterator[None]:
        """Waits as long as another process holds the same program's entry; the system ends a dead process's hold."""
        path = self._path(program, target).with_suffix(".lock")
        try:
            file = path.open("w")
        except OSError:  # a folder that cannot be written to: `save` says so
            yield
            return
        with file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
            path.unlink(missing_ok=True)  # whoever waits for it holds the file that is gone, and finds the entry

    def _read(self, path: Path, target: Target) -> KeptExecutable:
        executable, (inputs, outputs), making_time_s = pickle.loads(zlib.decompress(path.read_bytes()))
        if _LAPACK in executable:
            # Its addresses are looked up when a program is lowered, which this one is not: without them it ends the
            # process. https://github.com/jax-ml/jax/issues/28908; can go when that is closed.
            lapack.prepare_lapack_call("potrf", np.float32)
        devices = jax.devices() if target.workers > 1 else target.devices() or jax.local_devices()[:1]
        loaded = serialize_executable.deserialize_and_load(executable, inputs, outputs, execution_devices=devices)
        return KeptExecutable(loaded, making_time_s)

    def _path(self, program: StepProgram, target: Target) -> Path:
        return self.folder / f"{program.name}-{key_of(program, target)}{ENTRY}"

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _forget_beyond_limit(self) -> None:
        entries = sorted(self.folder.glob(f"*{ENTRY}"), key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
        total = 0
        for entry in entries:
            total += entry.stat().st_size
            if total > self.size_limit_bytes:
                remove(entry)


def _verdict_of(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix(ENTRY) + VERDICT)


def remove(entry: Path) -> None:
    """Removes an entry, and what has been found of its program."""
    entry.unlink(missing_ok=True)
    _verdict_of(entry).unlink(missing_ok=True)


_told: set[tuple[str, int | None]] = set()


@functools.cache
def digest_of_code(folder: Path) -> str:
    """A digest of all Python code in a folder: another version of it may make another program of the same step."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def key_of(program: StepProgram, target: Target) -> str:
    """What an executable of a program is found by; it must have a digest."""
    return hashlib.sha256(key_text(program, target).encode()).hexdigest()[:40]


def key_text(program: StepProgram, target: Target) -> str:
    """The entries of the key, each on a line with its name: two of them side by side show why a program is another."""
    entries = {
        "graph": program.digest,
        "target": _of_target(target),
        "is_deterministic": program.is_deterministic,
        "recomputes": program.recomputes,
        "saves_memory": program.saves_memory,
        "state": _described(program.state),
        "inputs": _described(program.inputs),
        "outputs": _described(program.outputs),
        "options": sorted(options(program, target).items()),
        **_surroundings(),
        **_options(),
    }
    return "\n".join(f"{name}: {value}" for name, value in entries.items())


def _of_target(target: Target) -> str:
    return f"{target.device_count} devices, {target.strategy}, {target.workers} workers"


def _described(specs: Iterable[TensorSpec]) -> list[tuple]:
    return [(spec.shape, str(spec.dtype), spec.batch_dim, spec.tensor_dim) for spec in specs]


@functools.cache
def _surroundings() -> dict[str, Any]:
    """What does not change in a process: versions, the device, the processor that machine code is made for."""
    device: Any = jax.local_devices()[0]
    return {
        "trainingcompiler": digest_of_code(Path(__file__).parents[1]),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.client.platform_version,
        "device": device.device_kind,
        "device_count": device.client.device_count(),
        "machine": platform.machine(),
        "processor": _processor(),
    }


def _processor() -> list[str]:
    """The instruction sets of the processor, where the system tells: a home folder may be shared by unlike machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return [platform.processor()]


def _options() -> dict[str, Any]:
    """Whatever options decide what is compiled: XLA's by its variable, JAX's but for those known to be indifferent."""
    values = jax.config.values
    of_jax = {k: v for k, v in sorted(values.items()) if not any(word in k for word in _INDIFFERENT)}
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), **of_jax}
