"""The options, where each may come from, and which source wins.

A flag of the launcher wins over an environment variable, which wins over the default.
"""

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from trainingcompiler.errors import ConfigError, UsageError
from trainingcompiler.strategy import CHOICES, Strategy

PREFIX = "TRAININGCOMPILER"
RECIPE = f"{PREFIX}_RECIPE"  # no option: what the launcher has decided for its worker; see `planning.recommendation`
COORDINATOR, FAILURE = f"{PREFIX}_COORDINATOR", f"{PREFIX}_FAILURE"  # nor these; see `processes`
_INTERNAL = (RECIPE, COORDINATOR, FAILURE)

_CHOICES = {
    "engine": ("auto", "xla", "eager", "tensorflow"),
    "fallback": ("eager", "error"),
    "verify": ("first", "always", "off"),
}
_SWITCHES = ("enabled", "debug", "keep_gradients", "small_pages", "quiet")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True)
class TrainingCompilerConfig:
    """What the compiler may do; every mistake is reported at once.

    Attributes:
        enabled: False leaves the script exactly as it is.
        debug: Show the full traceback of whatever keeps a loop from being compiled.
        engine: Who runs a step: "xla" always compiled, "eager" (PyTorch) and "tensorflow" (TensorFlow and Keras) as
            the framework itself runs it, "auto" whichever is measured to be fastest.
        fallback: What happens to a step that cannot be compiled: "eager" leaves it to the framework and says so,
            "error" raises `FallbackError`.
        verify: When a program's results are compared with PyTorch's: "first", the first time it is used on a machine,
            "always", at every run of it, which is for finding faults, or "off". One whose results are not PyTorch's up
            to rounding is left to PyTorch.
        keep_gradients: Keep every parameter's `.grad` readable after `optimizer.step()`, at the cost of its memory.
        cache_dir: Folder of compiled executables; None is `default_cache_dir()`. Whoever can write to it can run
            code as you: keep it private.
        cache_size_gb: Bound, in 10^9 bytes, on the executables kept for the installed JAX version; the least recently
            used go first, and those of other JAX versions are removed before they make the total larger than it.
            0 keeps none.
        small_pages: Do not have the launcher ask for huge pages, which make steps with large temporaries faster on a
            CPU (see `huge_pages`). Only the launcher can: it is decided when the process starts.
        dump: Folder to write the stages of every program to, as text: the tape, the graph after each pass, its cache
            key, StableHLO and XLA's optimized program; None writes none.
        record: File to write at the end what the run was, as JSON; None writes none.
        devices: How many devices of this process run each step together; "all" of them. The batch of the script stays
            the global one.
        strategy: How they share the training: "dp", "fsdp", "tp=K", "fsdp+tp=K"; see `Strategy`.
        quiet: Say only what changes the run: fallbacks, recompiles, damaged cache entries, errors.

    Raises:
        ConfigError: A value is of the wrong type or not one of the choices.
    """

    enabled: bool = True
    debug: bool = False
    engine: Literal["auto", "xla", "eager", "tensorflow"] = "auto"
    fallback: Literal["eager", "error"] = "eager"
    verify: Literal["first", "always", "off"] = "first"
    keep_gradients: bool = False
    cache_dir: str | None = None
    cache_size_gb: float = 10.0
    small_pages: bool = False
    dump: str | None = None
    record: str | None = None
    devices: int | Literal["all"] = 1
    strategy: str = "dp"
    quiet: bool = False

    def __post_init__(self) -> None:
        complaints = {name: _complaint(name, getattr(self, name)) for name in FIELDS}
        mistakes = [f"{name}={getattr(self, name)!r}: {text}" for name, text in complaints.items() if text]
        if mistakes:
            raise ConfigError(mistakes)


FIELDS = tuple(field.name for field in fields(TrainingCompilerConfig))
VARIABLES = {name: PREFIX if name == "enabled" else f"{PREFIX}_{name.upper()}" for name in FIELDS}
"""Field name -> the environment variable that sets it."""


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A configuration and where each of its values came from ("--engine", "TRAININGCOMPILER_ENGINE", "default")."""

    config: TrainingCompilerConfig
    sources: Mapping[str, str]

    def describe(self) -> str:
        """Returns one line per value: name, value, source."""
        rows = [(name, _shown(name, getattr(self.config, name)), self.sources[name]) for name in FIELDS]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def resolve(flags: Mapping[str, object], environ: Mapping[str, str]) -> ResolvedConfig:
    """Builds the configuration from the launcher's flags and the environment.

    Args:
        flags: Field name -> value; text is parsed as it would be from the environment.
        environ: The environment. A variable that is set to nothing counts as not set.

    Raises:
        ConfigError: A value is wrong, or a variable begins with TRAININGCOMPILER_ and is not known.
    """
    ours = [name for name in environ if name.startswith(f"{PREFIX}_") and name not in _INTERNAL]
    mistakes = [_unknown_variable(name) for name in ours if name not in VARIABLES.values()]
    values: dict[str, Any] = {}
    sources = dict.fromkeys(FIELDS, "default")
    for name in FIELDS:
        if name in flags:
            source, given = flag_of(name), flags[name]
        elif environ.get(VARIABLES[name]):
            source, given = VARIABLES[name], environ[VARIABLES[name]]
        else:
            continue
        value = _parsed(name, given) if isinstance(given, str) else given
        complaint = _complaint(name, value)
        if complaint:
            mistakes.append(f"{source}={given}: {complaint}")
        values[name], sources[name] = value, source
    if mistakes:
        raise ConfigError(mistakes)
    return ResolvedConfig(config=TrainingCompilerConfig(**values), sources=sources)


def flag_of(name: str) -> str:
    """Returns the launcher's option that sets the field `name`."""
    return "--no-compile" if name == "enabled" else "--" + name.replace("_", "-")


def to_environment(flags: Mapping[str, object]) -> dict[str, str]:
    """Returns the environment variables that say to another process what `flags` say here."""
    return {VARIABLES[name]: str(int(value) if isinstance(value, bool) else value) for name, value in flags.items()}


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Returns this platform's folder for a user's caches, with our name appended."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return os.path.join(base, "trainingcompiler")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the known name closest to `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _unknown_variable(name: str) -> str:
    hint = did_you_mean(name, VARIABLES.values()) or f"; the variables are {', '.join(VARIABLES.values())}"
    return f"environment variable {name} is not known{hint}"


def _parsed(name: str, text: str) -> object:
    """Returns `text` as the type of the field, or unchanged, for `_complaint` to complain about."""
    if name in _SWITCHES:
        lowered = text.lower()
        return True if lowered in _TRUE else False if lowered in _FALSE else text
    if name == "cache_size_gb":
        try:
            return float(text)
        except ValueError:
            return text
    if name == "devices" and text.isdecimal():
        return int(text)
    return text


def _complaint(name: str, value: object) -> str | None:
    """Returns what is wrong with `value` for the field `name`, or None."""
    if name in _SWITCHES:
        return None if isinstance(value, bool) else "must be true or false (in text also 1, 0, yes, no, on, off)"
    if name in _CHOICES:
        choices = _CHOICES[name]
        return None if value in choices else f"must be one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    if name == "cache_size_gb":
        sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        return None if sound else "must be a number of gigabytes, 0 or more (0 keeps nothing)"
    if name == "devices":
        sound = value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
        return None if sound else 'must be a number of devices, 1 or more, or "all"'
    if name == "strategy":
        return _complaint_of_strategy(value)
    kind = "file" if name == "record" else "folder"
    return None if value is None or (isinstance(value, str) and value) else f"must be the path of a {kind}, as text"


def _complaint_of_strategy(value: object) -> str | None:
    try:
        Strategy.parse(str(value))
    except UsageError:
        return f"must be {CHOICES}, K being 2 or more"
    return None


def _shown(name: str, value: object) -> str:
    if name == "cache_dir" and value is None:
        return default_cache_dir()
    return str(value).lower() if isinstance(value, bool) else str(value)
