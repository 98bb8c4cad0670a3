"""The errors a person can meet: each says what happened, why, and what to do next."""

from collections.abc import Sequence


class TrainingCompilerError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TrainingCompilerError, ValueError):
    """The configuration is wrong.

    Attributes:
        mistakes: One message per mistake, all of them, in the order they were found.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__(tuple(mistakes))
        self.mistakes = tuple(mistakes)

    def __str__(self) -> str:
        if len(self.mistakes) == 1:
            return self.mistakes[0]
        return "\n  - ".join([f"{len(self.mistakes)} mistakes in the configuration:", *self.mistakes])


class _StepError(TrainingCompilerError):
    """An error about one step of the script's loop.

    Attributes:
        reason: Why, as a clause without a full stop.
        where: The line of the script, as "train.py:88", where it is known.
        operator: The operator at fault, as "aten.cumsum.default", where there is one.
    """

    def __init__(self, reason: str, where: str | None = None, operator: str | None = None) -> None:
        super().__init__(reason, where, operator)
        self.reason = reason
        self.where = where
        self.operator = operator

    def _what(self) -> str:
        place = f"{self.where}: " if self.where else ""
        unnamed = self.operator is not None and self.operator not in self.reason
        return place + self.reason + (f" (operator {self.operator})" if unnamed else "")

    def __str__(self) -> str:
        return self._what()


class CaptureError(_StepError):
    """A step could not be turned into a program.

    Attributes:
        culprit: The object at fault, such as an optimizer, if the rest of the step could be compiled without it.
        leaves: Whether the step's modules and optimizers run eagerly from now on, whatever they are called with.
    """

    culprit: object = None
    leaves: bool = True


class PassingCaptureError(CaptureError):
    """This one step could not be turned into a program, or the program refused it; the next ones may do."""


class FallbackError(_StepError):
    """A step would have run eagerly, and `fallback="error"` forbids it."""

    def __str__(self) -> str:
        return (
            f'{self._what()}\n  This step cannot be compiled, and fallback="error" forbids running it eagerly.\n'
            "  To let it run eagerly, correct but not faster: --fallback=eager, or "
            'TrainingCompilerConfig(fallback="eager").'
        )


class UsageError(TrainingCompilerError):
    """A function of this package was called with something it cannot work on."""


class GradientNotKeptError(TrainingCompilerError, RuntimeError):
    """A gradient was read after a compiled step that did not keep it."""
