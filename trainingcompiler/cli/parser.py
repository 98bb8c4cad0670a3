"""The words after `python -m trainingcompiler.launch`, `.plan` and `.check`: our options, a script, its own arguments.

They are read by hand and not by argparse: which words are ours ends at the script, a mistake is answered with the
closest option, and the script's own words are passed on untouched.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainingcompiler.config import did_you_mean
from trainingcompiler.errors import UsageError

_SHORT = {"-m": "--module", "-h": "--help"}
# After the script they are the script's: many have one of these.
_SCRIPTS_OWN = ("--help", "--batch-size", "--dry-run", "--log-dir", "--image")


@dataclass(frozen=True)
class Option:
    """One option: the name of its value, its help, and the configuration's field it sets, if any.

    The value is "" for a switch, and begins with "--" where it is an option of the script's.
    """

    value: str
    help: str
    field: str | None = None


@dataclass(frozen=True)
class Command:
    """One of our programs, as its command line knows it.

    Attributes:
        name: Of the module, `"trainingcompiler.launch"`.
        summary: What it does, for its help.
        options: Name -> option.
        notes: More for its help.
    """

    name: str
    summary: str
    options: Mapping[str, Option]
    notes: str = ""

    def usage(self) -> str:
        """Returns the help text."""
        rows = [(f"{name} {option.value}".rstrip(), option.help) for name, option in self.options.items()]
        width = max(len(left) for left, _ in rows)
        options = "\n".join(f"  {left:<{width}}  {text}" for left, text in rows)
        return (
            f"usage: python -m {self.name} [options] script.py [script args]\n"
            f"       python -m {self.name} [options] -m module [module args]\n\n"
            f"{self.summary}\n\n"
            f"options, before the script:\n{options}\n\n"
            "Put -- before the script to pass it arguments that are named like these options:\n"
            f"  python -m {self.name} --engine xla -- script.py --debug\n{self.notes}"
        ).rstrip()


GENERAL = {
    "--module": Option("NAME", "run a module instead of a file, as python -m does; also -m"),
    "--help": Option("", "show this, and exit"),
}
"""What every program understands."""

CONFIGURING = {
    "--fallback": Option("eager|error", "what happens to a step that cannot be compiled", "fallback"),
    "--verify": Option("first|always|off", "when a program's results are compared with PyTorch's", "verify"),
    "--keep-gradients": Option("", "keep every .grad readable after optimizer.step()", "keep_gradients"),
    "--cache-dir": Option("FOLDER", "where compiled executables are kept between runs", "cache_dir"),
    "--cache-size-gb": Option("GB", "how much of them, in 10^9 bytes; 0 keeps none", "cache_size_gb"),
    "--quiet": Option("", "say only what changes the run: fallbacks, recompiles, errors", "quiet"),
    "--debug": Option("", "show the full traceback of a fallback", "debug"),
}
"""Options of the configuration that every program understands."""


@dataclass
class CommandLine:
    """What the words on the command line ask for.

    Attributes:
        program: Whose it is.
        given: Option -> its value; "" for a switch.
        target: The script's path or, with `is_module`, the module's name; None where there is none.
        arguments: The script's own arguments, untouched.
    """

    program: Command
    given: dict[str, str] = field(default_factory=dict)
    target: str | None = None
    is_module: bool = False
    arguments: list[str] = field(default_factory=list)


def parse(words: Sequence[str], program: Command) -> CommandLine:
    """Splits the command line into our options, the script, and the script's arguments.

    Raises:
        UsageError: An option is not known, given twice, without its value, or after the script.
    """
    line = CommandLine(program=program)
    rest = list(words)
    while rest and rest[0].startswith("-") and not line.is_module and rest[0] != "--":
        name, value = _option_of(rest.pop(0), program)
        if name in line.given:
            raise UsageError(f"{name} is given twice; give it once")
        if value is None:
            takes_option = program.options[name].value.startswith("--")
            if not rest or (rest[0].startswith("-") and not takes_option):
                raise UsageError(f"{name} needs a value: {name} {program.options[name].value}")
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
        _refuse_ours(line, program)
    return line


def flags_of(line: CommandLine) -> dict[str, object]:
    """Returns the configuration's fields that the command line sets."""
    flags: dict[str, object] = {}
    for name, value in line.given.items():
        option = line.program.options[name]
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
            f"no script is given: python -m {line.program.name} [options] script.py [script args]   "
            "(--help lists the options)"
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


def option_in(arguments: Sequence[str], name: str) -> str | None:
    """The value that an option has among a script's arguments, where it is mentioned last; None where it is not."""
    place = _place_of(arguments, name)
    if place is None:
        return None
    _, equals, value = arguments[place].partition("=")
    return value if equals else arguments[place + 1] if place + 1 < len(arguments) else None


def with_option(arguments: Sequence[str], name: str, value: str) -> list[str]:
    """A script's arguments with the last mention of an option replaced, or the option added."""
    place = _place_of(arguments, name)
    if place is None:
        return [*arguments, name, value]
    if "=" in arguments[place]:
        return [*arguments[:place], f"{name}={value}", *arguments[place + 1 :]]
    return [*arguments[: place + 1], value, *arguments[place + 2 :]]


def _place_of(arguments: Sequence[str], name: str) -> int | None:
    places = [place for place, word in enumerate(arguments) if word == name or word.startswith(f"{name}=")]
    return places[-1] if places else None


def _option_of(word: str, program: Command) -> tuple[str, str | None]:
    """Returns the option a word names, and its value: "" for a switch, None where the next word holds it."""
    name, equals, value = word.partition("=")
    name = _SHORT.get(name, name.replace("_", "-"))
    if name not in program.options:
        hint = did_you_mean(name, program.options) or f"; python -m {program.name} --help lists them"
        raise UsageError(f"{word} is not an option{hint}")
    if equals and not program.options[name].value:
        raise UsageError(f"{word}: {name} takes no value")
    return name, value if equals or not program.options[name].value else None


def _refuse_ours(line: CommandLine, program: Command) -> None:
    """An option of ours after the script is either misplaced or the script's: only the person knows which."""
    for word in line.arguments:
        if word == "--":
            return
        name = word.partition("=")[0].replace("_", "-")
        if name in program.options and name not in _SCRIPTS_OWN:
            target = f"-m {line.target}" if line.is_module else line.target
            raise UsageError(
                f"{word} stands after the script, and may be meant for either\n"
                f"  for trainingcompiler:  python -m {program.name} {word} ... {target}\n"
                f"  for the script:        python -m {program.name} -- {target} {word} ..."
            )
