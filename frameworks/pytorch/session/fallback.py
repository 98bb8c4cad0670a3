"""Remembers what was left to torch, and says it in one line: why and where. Who decides is in docs/design.md."""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, FallbackError, PassingCaptureError
from trainingcompiler.reporting.events import FellBack, Note, emit
from trainingcompiler.reporting.statistics import current as statistics

ANOMALY = "anomaly detection is on, which looks into torch's own backward"
_PASSES = 16  # as often may a passing reason come back (engines take turns) before its loop is left to torch


class FallbackPolicy:
    """What has been left to torch, and what has been said about it.

    Args:
        config: Whether the user wants any.
        told: Is told of each before torch runs it, as `leave` is.

    Attributes:
        count: How many tapes or steps torch has run because they could not be compiled.
    """

    def __init__(self, config: TrainingCompilerConfig, told: Callable[[CaptureError, list[Any]], None] | None = None):
        self.count = 0
        self._told = told
        self._config = config
        self._left: dict[int, Any] = {}
        self._passed: Counter[str] = Counter()
        self._said: set[tuple] = set()

    @property
    def has_left(self) -> bool:
        """Whether anything has been left to torch for good."""
        return bool(self._left)

    @property
    def has_spoken(self) -> bool:
        """Whether anything has been said of what torch runs."""
        return bool(self._said)

    def covers(self, item: Any) -> bool:
        """Whether a module or an optimizer has been left to torch for good."""
        return id(item) in self._left

    def leave(self, error: CaptureError, items: list[Any]) -> None:
        """Leaves modules and optimizers to torch, unless the reason is a passing one, and says so.

        Args:
            error: Why.
            items: The modules and optimizers; kept alive, because they are known by identity.

        Raises:
            FallbackError: The reason is no passing one, and the user wants no fallback.
        """
        self.count += 1
        if self._told is not None:
            self._told(error, items)
        self._passed[error.reason] += isinstance(error, PassingCaptureError)
        if 0 < self._passed[error.reason] <= _PASSES:
            if self._is_news(error):
                emit(Note(text=f"a step ran eagerly at {error.where}: {error.reason} (others like it will, too)"))
            return
        self.say(error)
        if error.leaves:
            self._left.update((id(item), item) for item in items)

    def leave_part(self, error: CaptureError) -> None:
        """Tells, once, that torch runs one call of a step on values, behind which the step is compiled."""
        if self._is_news(error):
            emit(Note(text=f"torch runs one call of the step at {error.where}: {error.reason}"))

    def say(self, error: CaptureError) -> None:
        """Tells that torch runs the step, once for each reason and place.

        Raises:
            FallbackError: The user wants no fallback.
        """
        if self._config.fallback == "error":
            raise FallbackError(error.reason, error.where, error.operator) from None
        statistics().fallbacks += 1
        if self._is_news(error, "for good"):  # it may have been said of one step
            emit(FellBack(reason=error.reason, where=error.where, permanent=True, operator=error.operator))
            if self._config.debug:
                emit(Note(text="".join(traceback.format_exception(error))))

    def _is_news(self, error: CaptureError, kind: str = "") -> bool:
        news = (error.reason, error.where, kind)
        known = news in self._said
        self._said.add(news)
        return not known
