"""Runs a script until somebody who watches it has seen enough: what `check` and `plan` have in common."""

import sys

from trainingcompiler.cli import run_script
from trainingcompiler.cli.parser import CommandLine, target_of
from trainingcompiler.errors import UsageError


def run(line: CommandLine, enough: type[BaseException]) -> BaseException | None:
    """Runs the script that a command line names, in this process.

    Args:
        line: The script and its arguments; they have been checked.
        enough: What the one who watches raises to end the script.

    Returns:
        What ended the script before that, if it failed; its traceback has been shown.
    """
    failure: BaseException | None = None
    try:
        run_script.run("module" if line.is_module else "script", target_of(line), *line.arguments)
    except enough:
        pass
    except SystemExit as leaving:
        if isinstance(leaving.__context__, UsageError) and leaving.code == run_script.BAD_INPUT:
            raise  # the worker has said what is wrong
        failure = leaving if leaving.code not in (None, 0, run_script.BAD_INPUT) else None
    except BaseException as error:
        failure = error
    sys.stdout.flush()
    if isinstance(failure, Exception):
        sys.excepthook(type(failure), failure, failure.__traceback__)
    return failure
