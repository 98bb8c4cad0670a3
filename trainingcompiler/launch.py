"""`python -m trainingcompiler.launch [options] script.py [script args]`: the script, unmodified, compiled.

The command line is read by hand and not by argparse: which words are ours ends at the script, a mistake is answered
with the closest option, and the script's own words are passed on untouched.
"""

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from trainingcompiler import pages
from trainingcompiler.config import did_you_mean, resolve, to_environment
from trainingcompiler.errors import ConfigError, UsageError
from trainingcompiler.launchers import local

PROGRAM = "python -m trainingcompiler.launch"

Launcher = Callable[[Sequence[str], Mapping[str, str]], NoReturn]

_LAUNCHERS: dict[str, Launcher] = {"local": local.launch}


@dataclass(frozen=True)
class Option:
    """One option: the name of its value ("" for a switch), its help, and the configuration's field it sets, if any."""

    value: str
    help: str
    field: str | None = None


OPTIONS = {
    "--no-compile": Option("", "run the script as it is (as does TRAININGCOMPILER=0)", "enabled"),
    "--engine": Option("auto|xla|eager|tensorflow", "who runs a step; auto measures and keeps the fastest", "engine"),
    "--fallback": Option("eager|error", "what happens to a step that cannot be compiled", "fallback"),
    "--keep-gradients": Option("", "keep every .grad readable after optimizer.step()", "keep_gradients"),
    "--cache-dir": Option("FOLDER", "where compiled executables are kept between runs", "cache_dir"),
    "--cache-size-gb": Option("GB", "how much of them, in 10^9 bytes; 0 keeps none", "cache_size_gb"),
    "--small-pages": Option("", "do not ask for huge pages of memory, which speed large CPU steps up", "small_pages"),
    "--quiet": Option("", "say only what changes the run: fallbacks, recompiles, errors", "quiet"),
    "--debug": Option("", "show the full traceback of a fallback", "debug"),
    "--launcher": Option("|".join(_LAUNCHERS), "who starts the worker"),
    "--module": Option("NAME", "run a module instead of a file, as python -m does; also -m"),
    "--print-config": Option("", "print each option's value and where it came from, and exit"),
    "--help": Option("", "show this, and exit"),
}
_SHORT = {"-m": "--module", "-h": "--help"}
_SCRIPTS_OWN = ("--help",)  # after the script it asks the script for help


@dataclass
class CommandLine:
    """What the words on the command line ask for.

    Attributes:
        given: Option -> its value; "" for a switch.
        target: The script's path or, with `is_module`, the module's name; None where there is none.
        arguments: The script's own arguments, untouched.
    """

    given: dict[str, str] = field(default_factory=dict)
    target: str | None = None
    is_module: bool = False
    arguments: list[str] = field(default_factory=list)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Reads the command line, checks everything that can be checked, and hands over to a launcher.

    Exits with code 2, and nothing done, where something is wrong.
    """
    try:
        line = parse(sys.argv[1:] if words is None else words)
        if "--help" in line.given:
            sys.stdout.write(usage() + "\n")
            sys.exit(0)
        flags = flags_of(line)
        resolved = resolve(flags, os.environ)
        if "--print-config" in line.given:
            sys.stdout.write(resolved.describe() + "\n")
            sys.exit(0)
        target = target_of(line)
        start = launcher_of(line)
    except (ConfigError, UsageError) as error:
        sys.stderr.write(f"{PROGRAM.removeprefix('python -m ')}: {error}\n")
        sys.exit(2)
    kind = "module" if line.is_module else "script"
    variables = to_environment(flags)
    if resolved.config.enabled and not resolved.config.small_pages:
        variables |= pages.variables(os.environ)
    start([kind, target, *line.arguments], variables)


def parse(words: Sequence[str]) -> CommandLine:
    """Splits the command line into our options, the script, and the script's arguments.

    Raises:
        UsageError: An option is not known, given twice, without its value, or after the script.
    """
    line = CommandLine()
    rest = list(words)
    while rest and rest[0].startswith("-") and not line.is_module and rest[0] != "--":
        name, value = _option_of(rest.pop(0))
        if name in line.given:
            raise UsageError(f"{name} is given twice; give it once")
        if value is None:
            if not rest or rest[0].startswith("-"):
                raise UsageError(f"{name} needs a value: {name} {OPTIONS[name].value}")
            value = rest.pop(0)
        line.given[name] = value
        line.is_module = name == "--module"
    separated = rest[:1] == ["--"] and not line.is_module
    if separated:
        rest.pop(0)
        if rest[:1] == ["-m"]:
            line.is_module = True
            rest.pop(0)
    if "--module" in line.given:
        line.target = line.given["--module"]
    elif rest:
        line.target = rest.pop(0)
    line.arguments = rest
    if not separated:
        _refuse_ours(line)
    return line


def flags_of(line: CommandLine) -> dict[str, object]:
    """Returns the configuration's fields that the command line sets."""
    flags: dict[str, object] = {}
    for name, value in line.given.items():
        option = OPTIONS[name]
        if option.field is not None:
            flags[option.field] = value if option.value else option.field != "enabled"
    return flags


def target_of(line: CommandLine) -> str:
    """Returns the script's path or the module's name; the worker, which imports it, looks for a module.

    Raises:
        UsageError: There is none, or it is not a file that can be read.
    """
    target = line.target
    if target is None:
        raise UsageError(
            f"no script is given: {PROGRAM} [options] script.py [script args]   (--help lists the options)"
        )
    if line.is_module or (os.path.isfile(target) and os.access(target, os.R_OK)):
        return target
    if os.path.isdir(target):
        raise UsageError(f"{target} is a folder, not a script; name a file in it, or use -m for a package")
    if os.path.exists(target):
        raise UsageError(f"{target} cannot be read; check its permissions")
    folder, name = os.path.split(target)
    siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    close = [os.path.join(folder, match) for match in difflib.get_close_matches(name, siblings, n=1)]
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"there is no script {target} (looked for from {os.getcwd()}){hint}")


def launcher_of(line: CommandLine) -> Launcher:
    """Returns the function that starts the worker."""
    name = line.given.get("--launcher", "local")
    if name not in _LAUNCHERS:
        raise UsageError(f"--launcher={name}: must be one of {', '.join(_LAUNCHERS)}{did_you_mean(name, _LAUNCHERS)}")
    return _LAUNCHERS[name]


def usage() -> str:
    """Returns the help text."""
    rows = [(f"{name} {option.value}".rstrip(), option.help) for name, option in OPTIONS.items()]
    width = max(len(left) for left, _ in rows)
    options = "\n".join(f"  {left:<{width}}  {text}" for left, text in rows)
    return (
        f"usage: {PROGRAM} [options] script.py [script args]\n"
        f"       {PROGRAM} [options] -m module [module args]\n\n"
        "Runs an ordinary training script, each of its steps as one compiled program.\n\n"
        f"options, before the script:\n{options}\n\n"
        "Put -- before the script to pass it arguments that are named like these options:\n"
        f"  {PROGRAM} --engine xla -- script.py --debug\n"
        "Each option that configures the compiler can also be set in the environment: TRAININGCOMPILER_ENGINE=xla."
    )


def _option_of(word: str) -> tuple[str, str | None]:
    """Returns the option a word names, and its value: "" for a switch, None where the next word holds it."""
    name, equals, value = word.partition("=")
    name = _SHORT.get(name, name.replace("_", "-"))
    if name not in OPTIONS:
        hint = did_you_mean(name, OPTIONS) or f"; {PROGRAM} --help lists them"
        raise UsageError(f"{word} is not an option{hint}")
    if equals and not OPTIONS[name].value:
        raise UsageError(f"{word}: {name} takes no value")
    return name, value if equals or not OPTIONS[name].value else None


def _refuse_ours(line: CommandLine) -> None:
    """An option of ours after the script is either misplaced or the script's: only the person knows which."""
    for word in line.arguments:
        if word == "--":
            return
        name = word.partition("=")[0].replace("_", "-")
        if name in OPTIONS and name not in _SCRIPTS_OWN:
            target = f"-m {line.target}" if line.is_module else line.target
            raise UsageError(
                f"{word} stands after the script, and may be meant for either\n"
                f"  for trainingcompiler:  {PROGRAM} {word} ... {target}\n"
                f"  for the script:        {PROGRAM} -- {target} {word} ..."
            )


if __name__ == "__main__":
    main()
