"""`python -m trainingcompiler.check [--steps K] script.py [script args]`: is a compiled step what torch computes?

Runs K real steps of the script, compiled, and as many more until it evaluates, and stops it there. The K-th step and
the evaluations are replayed operator by operator by the framework itself, on the same values.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from trainingcompiler.cli import run_until
from trainingcompiler.cli.parser import CONFIGURING, GENERAL, Command, CommandLine, Option, flags_of, parse, target_of
from trainingcompiler.config import resolve, to_environment
from trainingcompiler.errors import UsageError

STEPS = 3
DIFFERENT, BAD_INPUT = 1, 2
CHECK = Command(
    "trainingcompiler.check",
    "Runs some compiled steps, and as many more until the script evaluates; replays the last of the former, and the\n"
    "evaluations, in PyTorch on the same values and compares every result.\n"
    "Lists every operator of the step that has no lowering to XLA, what else runs eagerly, and how many values the\n"
    "script reads in a step.",
    {"--steps": Option("K", f"how many ({STEPS})"), **CONFIGURING, **GENERAL},
    "Exit code 0: equal up to rounding. 1: different. 2: there was nothing to check, or the script failed.",
)


def main(words: Sequence[str] | None = None) -> None:
    """Checks the script named on the command line, and exits with the verdict."""
    try:
        line = parse(sys.argv[1:] if words is None else words, CHECK)
        if "--help" in line.given:
            sys.stdout.write(CHECK.usage() + "\n")
            sys.exit(0)
        steps = _steps(line)
        target_of(line)
        flags = {"quiet": True, **flags_of(line), "engine": "xla", "verify": "off"}  # it compares itself
        resolve(flags, os.environ)
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"{CHECK.name}: {error}\n")
        sys.exit(BAD_INPUT)
    os.environ.update(to_environment(flags))
    checker = importlib.import_module("trainingcompiler.frameworks.pytorch.check").CheckRun(steps)
    checker.start()
    failure = run_until.run(line, checker.Enough)
    lines, code = checker.report(failure)
    sys.stderr.write("".join(f"[check]      {text}\n" for text in lines))
    sys.exit(code)


def _steps(line: CommandLine) -> int:
    text = line.given.get("--steps", str(STEPS))
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--steps needs a number of steps above 0, and was given {text or 'nothing'}")
    return int(text)


if __name__ == "__main__":
    main()
