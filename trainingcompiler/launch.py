"""`python -m trainingcompiler.launch [options] script.py [script args]`: the script, unmodified, compiled."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from trainingcompiler import applying, pages
from trainingcompiler.command_line import CONFIGURING, GENERAL, CommandLine, Option, Program, flags_of, parse, target_of
from trainingcompiler.config import RECIPE, default_cache_dir, did_you_mean, resolve, to_environment
from trainingcompiler.errors import ConfigError, UsageError
from trainingcompiler.launchers import local

Launcher = Callable[[Sequence[str], Mapping[str, str]], NoReturn]

_LAUNCHERS: dict[str, Launcher] = {"local": local.launch}

LAUNCH = Program(
    "trainingcompiler.launch",
    "Runs an ordinary training script, each of its steps as one compiled program.",
    {
        "--no-compile": Option("", "run the script as it is (as does TRAININGCOMPILER=0)", "enabled"),
        "--engine": Option(
            "auto|xla|eager|tensorflow", "who runs a step; auto measures and keeps the fastest", "engine"
        ),
        "--devices": Option("N|all", "run each step on N devices together; the batch stays the global one", "devices"),
        "--strategy": Option("dp|fsdp|tp=K|fsdp+tp=K", "how they share the training state", "strategy"),
        **CONFIGURING,
        **applying.OPTIONS,
        "--record": Option("FILE", "write there what the run was: options, times, changes, as JSON", "record"),
        "--small-pages": Option("", "do not ask for huge pages, which speed large CPU steps up", "small_pages"),
        "--launcher": Option("|".join(_LAUNCHERS), "who starts the worker"),
        "--print-config": Option("", "print each option's value and where it came from, and exit"),
        **GENERAL,
    },
    "Each option that configures the compiler can also be set in the environment: TRAININGCOMPILER_ENGINE=xla.",
)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Reads the command line, checks everything that can be checked, and hands over to a launcher.

    Exits with code 2, and nothing done, where something is wrong.
    """
    try:
        line = parse(sys.argv[1:] if words is None else words, LAUNCH)
        if "--help" in line.given:
            sys.stdout.write(LAUNCH.usage() + "\n")
            sys.exit(0)
        flags = flags_of(line)
        resolved = resolve(flags, os.environ)
        if "--print-config" in line.given:
            sys.stdout.write(resolved.describe() + "\n")
            sys.exit(0)
        target = target_of(line)
        start = launcher_of(line)
        os.environ.pop(RECIPE, None)  # that of a launcher around this one is not for this script
        arguments, variables = line.arguments, to_environment(flags)
        if applying.is_asked_for(line):
            applied = applying.apply(line, resolved.config.cache_dir or default_cache_dir())
            sys.stderr.write("".join(f"[batch]      {text}\n" for text in applied.lines))
            arguments, variables = list(applied.arguments), {**variables, **applied.variables}
    except (ConfigError, UsageError) as error:
        sys.stderr.write(f"{LAUNCH.name}: {error}\n")
        sys.exit(2)
    kind = "module" if line.is_module else "script"
    if resolved.config.enabled and not resolved.config.small_pages:
        variables |= pages.variables(os.environ)
    start([kind, target, *arguments], variables)


def launcher_of(line: CommandLine) -> Launcher:
    """Returns the function that starts the worker."""
    name = line.given.get("--launcher", "local")
    if name not in _LAUNCHERS:
        raise UsageError(f"--launcher={name}: must be one of {', '.join(_LAUNCHERS)}{did_you_mean(name, _LAUNCHERS)}")
    return _LAUNCHERS[name]


if __name__ == "__main__":
    main()
