"""`python -m trainingcompiler.check [--steps K] script.py [script args]`: is a compiled step what torch computes?

Runs K real steps of the script, compiled, and stops it there. The last one is replayed operator by operator by the
framework itself, on the same values.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from trainingcompiler import watched
from trainingcompiler.config import to_environment
from trainingcompiler.errors import UsageError
from trainingcompiler.launch import CommandLine, flags_of, parse, target_of

PROGRAM = "trainingcompiler.check"
STEPS = 3
DIFFERENT, BAD_INPUT = 1, 2
_USAGE = f"""usage: python -m {PROGRAM} [--steps K] [launcher options] script.py [script args]

Runs K compiled steps ({STEPS}), then replays the last one in PyTorch on the same values and compares every result.
Lists every operator of the step that has no lowering to XLA, what else runs eagerly, and how many values the script
reads in a step.
Exit code 0: equal up to rounding. 1: different. 2: there was nothing to check, or the script failed."""


def main(words: Sequence[str] | None = None) -> None:
    """Checks the script named on the command line, and exits with the verdict."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE + "\n")
        sys.exit(0)
    try:
        steps, line = _parse(words)
        target_of(line)
        flags = flags_of(line)
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        sys.exit(BAD_INPUT)
    os.environ.update(to_environment({"engine": "xla", "quiet": True, **flags}))
    checker = importlib.import_module("trainingcompiler.frameworks.pytorch.check_run").CheckRun(steps)
    checker.start()
    failure = watched.run(line, checker.Enough)
    lines, code = checker.report(failure)
    sys.stderr.write("".join(f"[check]      {text}\n" for text in lines))
    sys.exit(code)


def _parse(words: list[str]) -> tuple[int, CommandLine]:
    steps = STEPS
    if words and words[0].split("=")[0] == "--steps":
        name, _, text = words.pop(0).partition("=")
        text = text or (words.pop(0) if words else "")
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"{name} needs a number of steps above 0, and was given {text or 'nothing'}")
        steps = int(text)
    return steps, parse(words)


if __name__ == "__main__":
    main()
