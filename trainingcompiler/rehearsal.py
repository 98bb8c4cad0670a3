"""`python -m trainingcompiler.rehearsal --json FILE -- script.py [args]`: a run as it will be, up to its first step.

The launcher starts it with what the run itself will be started with. No step is taken and nothing is compiled; what
the step would have trained with is written down.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainingcompiler.cli import run_until, script_options
from trainingcompiler.cli.parser import CONFIGURING, GENERAL, Command, Option, flags_of, parse
from trainingcompiler.config import to_environment
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.files import write_json
from trainingcompiler.planning import first_step, planner

BAD_INPUT = 2

REHEARSAL = Command(
    "trainingcompiler.rehearsal",
    "Runs the script up to its first training step, takes none, and writes down what it would have trained with.",
    {"--json": Option("FILE", "where to"), **CONFIGURING, **GENERAL},
)


def main(words: Sequence[str] | None = None) -> None:
    """Rehearses the script named on the command line."""
    try:
        line = parse(sys.argv[1:] if words is None else words, REHEARSAL)
        os.environ.update(to_environment({**flags_of(line), "enabled": True, "engine": "xla", "quiet": True}))
        waiting = planner.current = planner.Planner(rehearses=True)
        with waiting.surroundings, script_options.watched():
            failure = run_until.run(line, waiting.Enough)
        planner.current = None
        if failure is not None:
            raise UsageError(f"the script failed before its first training step ({type(failure).__name__}: {failure})")
        batch_size, accumulated, seen = waiting.rehearsed()
        content = {"batch_size": batch_size, "accumulation_steps": accumulated}
        write_json(Path(line.given["--json"]), {**content, "first_step": first_step.as_json(seen)})
    except (TrainingCompilerError, ValueError) as error:
        sys.stderr.write(f"{REHEARSAL.name}: {error}\n")
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
