"""`trainingcompiler launch|plan|check ...`, and `python -m trainingcompiler ...`: the commands under one name."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from trainingcompiler.config import did_you_mean

COMMANDS = {
    "launch": "run a training script, each of its steps as one compiled program",
    "plan": "say which batch of a script fits a GPU, and which is fastest",
    "check": "compare a compiled step of a script with the framework's",
}


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Hands the words after a command to it; exits with code 2 where there is no such command."""
    name, *others = (sys.argv[1:] if words is None else words) or [""]
    if name in COMMANDS:
        importlib.import_module(f"trainingcompiler.{name}").main(others)
        sys.exit(0)
    if name in ("", "--help", "-h"):
        listed = "".join(f"\n  {command:<8} {what}" for command, what in COMMANDS.items())
        text = f"usage: trainingcompiler COMMAND ...\n{listed}\n\ntrainingcompiler COMMAND --help tells more.\n"
        (sys.stdout if name else sys.stderr).write(text)
        sys.exit(0 if name else 2)
    sys.stderr.write(f"trainingcompiler: {name} is no command of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
