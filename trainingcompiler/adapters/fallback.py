"""What happens when a step cannot be a program: its framework runs it, and one line says why and where."""

import traceback

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, FallbackError
from trainingcompiler.reporting.events import FellBack, Note, emit
from trainingcompiler.reporting.statistics import current as statistics


def leave(error: CaptureError, config: TrainingCompilerConfig, how: str) -> None:
    """Says that the framework runs a step from now on.

    Args:
        error: Why, and where.
        config: The options.
        how: Completes "this step runs ... from now on".

    Raises:
        FallbackError: `fallback="error"` forbids it.
    """
    if config.fallback == "error":
        raise FallbackError(error.reason, error.where, error.operator) from error
    statistics().fallbacks += 1
    emit(FellBack(reason=error.reason, where=error.where, permanent=True, operator=error.operator, how=how))
    if config.debug:
        emit(Note(text="".join(traceback.format_exception(error))))
