"""Compiled executables kept between runs, bounded, and healed where an entry is damaged.

Programs with a digest are kept in a store of our own, which needs no lowering to find them (`store`); JAX's own
persistent cache keeps whatever else it compiles.

A cached executable is machine code. Whoever can write to the cache's folder can run code in every process that reads
it, so the folder is made private to the user, and sharing it is for people who trust each other.
"""

import builtins
import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from trainingcompiler.cache.executables import ENTRY, UNFINISHED, ExecutableStore, remove
from trainingcompiler.cache.prefetch import LIST
from trainingcompiler.config import default_cache_dir
from trainingcompiler.errors import ConfigError
from trainingcompiler.reporting.events import CacheDamaged, Note, emit

_ENTRY, _USED = "-cache", "-atime"  # the suffixes of JAX's files: an executable, and when it was last used
_FOLDER = "executables-jax-"
_JAXS_SHARE = 10  # one part in ten is for what is compiled without a digest: helpers of a few KB each
_UNUSED_S = 30 * 24 * 3600.0  # what a script begins with is forgotten after a month without a run
_COMPLAINT = re.compile(
    r"Error (?P<verb>reading|writing) persistent compilation cache entry for '(?P<program>.*?)': "
    r"(?P<error>(?P<kind>\w+):.*)",
    re.DOTALL,
)


@dataclass
class CacheCounts:
    """Programs asked of the cache in this process, those it had, and the compile time they saved in seconds."""

    hits: int = 0
    misses: int = 0
    saved_s: float = 0.0


@dataclass
class CompileOutcome:
    """How one compile went; filled in when the `watching` block ends. `detail` is "" where no cache is in use."""

    hit: bool = False
    detail: str = ""


def enable_persistent_cache(directory: str | None = None, size_limit_bytes: int = 10**10) -> str | None:
    """Keeps compiled executables on disk, for the next run to find.

    A cache that the person set up with JAX's own options is left as it is, unless `directory` is given. Only the first
    process of several writes; that is JAX's own rule.

    Args:
        directory: The folder, made if need be; None is `default_cache_dir()`. Executables go into a subfolder named
            after the JAX version. See the module's note on trust.
        size_limit_bytes: Bound on that subfolder's executables, the least recently used going first; a tenth of it is
            for JAX's own cache. Those of other JAX versions are removed where they would make the total larger. 0
            keeps nothing.

    Returns:
        The folder in use, or None where executables are not kept; where nobody asked for that, a `Note` says why.

    Raises:
        ConfigError: `directory` was given and cannot be made or written.
    """
    global _store, _switched_off
    if _switched_off:  # by us, for an earlier configuration of this process that wanted none
        jax.config.update("jax_enable_compilation_cache", True)
        _switched_off = False
    _counts()
    _store = None
    already = _option("jax_compilation_cache_dir")
    if not _option("jax_enable_compilation_cache"):
        emit(Note(text="compiled executables are not kept: JAX_ENABLE_COMPILATION_CACHE is off"))
        return None
    if size_limit_bytes == 0:
        jax.config.update("jax_enable_compilation_cache", False)
        _switched_off = True
        return None
    if already and directory is None and not _is_made_here(already):
        emit(Note(text=f"compiled executables are kept in {already}, as JAX's own option says"))
        return already
    base = Path(directory or default_cache_dir()).expanduser().absolute()
    folder = base / f"{_FOLDER}{jax.__version__}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
        _repair(folder)
        _remove_other_versions(base, folder, size_limit_bytes)
    except OSError as error:
        if directory is not None:
            raise ConfigError([f"cache_dir={directory}: {error}; name a folder that can be written"]) from None
        emit(Note(text=f"compiled executables are not kept: {error}; --cache-dir names another folder"))
        return None
    if folder.stat().st_mode & 0o002:
        emit(Note(text=f"anyone on this machine can write to {folder}, and so run code as you: chmod o-w {folder}"))
    _point_jax_at(folder, size_limit_bytes // _JAXS_SHARE)
    _store = ExecutableStore(folder=folder, size_limit_bytes=size_limit_bytes - size_limit_bytes // _JAXS_SHARE)
    return str(folder)


@contextlib.contextmanager
def watching() -> Iterator[CompileOutcome]:
    """Wraps one compile: says whether the cache had it, and removes the entry if it was damaged.

    JAX reports a damaged entry as a warning between reading and compiling, and does not overwrite it. Removing it at
    that moment lets the fresh executable take its place.

    Example:
        >>> with watching() as outcome:
        ...     executable = lowered.compile()
        >>> outcome.detail
        'cache hit, saved 3.1 s'
    """
    outcome = CompileOutcome()
    before = hits_and_misses()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache entry")
        shown_before = warnings.showwarning

        def show(message: Warning | str, *arguments: Any, **keywords: Any) -> None:
            complaint = _COMPLAINT.match(str(message))
            if complaint is None:
                shown_before(message, *arguments, **keywords)
            else:
                _answer(complaint)

        warnings.showwarning = show
        yield outcome
    after = hits_and_misses()
    outcome.hit = after.hits > before.hits
    if outcome.hit:
        outcome.detail = f"cache hit, saved {max(0.0, after.saved_s - before.saved_s):.1f} s"
    elif after.misses > before.misses:
        outcome.detail = "not in the cache"


def hits_and_misses() -> CacheCounts:
    """Returns a copy of the counts since the cache was first enabled in this process."""
    counts = _counts()
    return CacheCounts(counts.hits, counts.misses, counts.saved_s)


_told: set[str] = set()
_store: ExecutableStore | None = None
_switched_off = False


def store() -> ExecutableStore | None:
    """Where executables are kept by their programs' digests; None where nothing is kept, or JAX's own option rules."""
    return _store


_listening: CacheCounts | None = None


def _counts() -> CacheCounts:
    global _listening
    if _listening is None:
        _listening = CacheCounts()
        monitoring.register_event_listener(_on_event)
        monitoring.register_event_duration_secs_listener(_on_duration)
    return _listening


def _on_event(event: str, **_: str | int) -> None:
    # A request is counted as a miss until its hit is reported: JAX's own event of a miss means that it wrote an entry.
    if event == "/jax/compilation_cache/compile_requests_use_cache":
        _counts().misses += 1
    elif event == "/jax/compilation_cache/cache_hits":
        _counts().misses -= 1
        _counts().hits += 1


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/compilation_cache/compile_time_saved_sec":
        _counts().saved_s += duration_secs


def _option(name: str) -> Any:
    return getattr(jax.config, name)  # its type does not declare the options


def _point_jax_at(folder: Path, size_limit_bytes: int) -> None:
    if _option("jax_compilation_cache_dir") not in (None, str(folder)):
        compilation_cache.reset_cache()  # JAX opens its cache once and keeps it
    jax.config.update("jax_compilation_cache_max_size", size_limit_bytes)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _answer(complaint: re.Match[str]) -> None:
    """Turns JAX's warning into an event, and removes the entry that could be read and not understood."""
    error = complaint["error"].strip()
    folder = Path(_option("jax_compilation_cache_dir"))
    entry = _last_used(folder, complaint["program"])
    if complaint["verb"] == "reading" and entry is not None and not _is_about_access(complaint["kind"]):
        with contextlib.suppress(OSError):  # another process may have removed it, or may own it
            _remove(entry)
        emit(CacheDamaged(path=str(entry), error=error))
    else:
        text = f"{complaint['verb']} the compile cache in {folder} failed: {error}"
        if text not in _told:  # a full disk is full for every program
            _told.add(text)
            emit(Note(text=text))


def _is_about_access(kind: str) -> bool:
    """Whether an error of this name says that the entry was out of reach, and so nothing about its content."""
    return kind in ("Timeout", "RuntimeError") or issubclass(getattr(builtins, kind, Exception), OSError)


def _last_used(folder: Path, program: str) -> Path | None:
    # The warning names the program only; the entry just read is the one of that name whose time stamp is newest.
    stamps = list(folder.glob(f"{program}-*{_USED}"))
    newest = max(stamps, key=lambda stamp: stamp.stat().st_mtime_ns, default=None)
    return None if newest is None else newest.with_name(newest.name.removesuffix(_USED) + _ENTRY)


def _remove(entry: Path) -> None:
    remove(entry)
    entry.with_name(entry.name.removesuffix(_ENTRY) + _USED).unlink(missing_ok=True)


def _repair(folder: Path) -> None:
    """Removes what a process that was killed while it wrote left behind: JAX refuses every later write over it.

    What belongs to a file of our own that was not finished is removed without a word: nobody would have read it.
    """
    young_s = 60.0  # another process may be between writing an entry and writing its time stamp
    writing_s = 3600.0  # nobody writes one file for so long
    for entry in folder.glob(f"*{_ENTRY}"):
        stamped = entry.with_name(entry.name.removesuffix(_ENTRY) + _USED).exists()
        if not stamped and time.time() - entry.stat().st_mtime > young_s:
            _remove(entry)
            emit(CacheDamaged(path=str(entry), error="it was not written to its end"))
    for suffix, age_s in ((UNFINISHED, writing_s), (LIST, _UNUSED_S)):
        for file in folder.glob(f"*{suffix}"):
            with contextlib.suppress(FileNotFoundError):  # another process has just finished or removed it
                if time.time() - file.stat().st_mtime > age_s:
                    file.unlink()


def _is_made_here(folder: str) -> bool:
    return Path(folder).name.startswith(_FOLDER)


def _remove_other_versions(base: Path, current: Path, size_limit_bytes: int) -> None:
    """Removes executables of other JAX versions, oldest folder first, until all together are within the limit."""
    others = [folder for folder in base.glob(f"{_FOLDER}*") if folder != current]
    total = sum(_size_bytes(folder) for folder in [current, *others])
    for folder in sorted(others, key=lambda other: other.stat().st_mtime):
        if total <= size_limit_bytes:
            return
        total -= _size_bytes(folder)
        for entry in _entries(folder):
            _remove(entry)


def _size_bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in _entries(folder))


def _entries(folder: Path) -> list[Path]:
    return [*folder.glob(f"*{_ENTRY}"), *folder.glob(f"*{ENTRY}")]
