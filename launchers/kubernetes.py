"""Not yet."""

from typing import NoReturn

from trainingcompiler.errors import UsageError
from trainingcompiler.job import Job


def launch(job: Job) -> NoReturn:
    """Not yet."""
    raise UsageError("not yet")
