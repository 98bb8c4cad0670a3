"""Runs the script in this process as `python` would: `python -m trainingcompiler.worker script|module NAME [args]`.

Started by a launcher, which has checked its arguments and put the options into the environment.
"""

import sys

from trainingcompiler.cli import run_script


def main() -> None:
    """Runs the script that is named on the command line, and leaves with its exit code."""
    run_script.run(*sys.argv[1:])


if __name__ == "__main__":
    main()
