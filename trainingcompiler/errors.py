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


class GradientLostError(TrainingCompilerError, RuntimeError):
    """Code in C++ has been given a result that needs a gradient, without torch's Python interface seeing the call."""


class NotEnoughMemoryError(TrainingCompilerError, MemoryError):
    """A step would need more memory than there is; nothing of it has run.

    Attributes:
        program: Its name.
        needed_bytes: What it needs besides the training state and the batch, which exist.
        available_bytes: What there is.
        buffers: The largest arrays that it makes, with the lines they come from.
        cures: What would need less, with numbers of programs that were compiled.
    """

    def __init__(
        self, program: str, needed_bytes: int, available_bytes: int, buffers: Sequence[str], cures: Sequence[str] = ()
    ) -> None:
        super().__init__(program, needed_bytes, available_bytes, tuple(buffers), tuple(cures))
        self.program = program
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.buffers = tuple(buffers)
        self.cures = tuple(cures)

    def __str__(self) -> str:
        lines = [
            f"{self.program} needs {self.needed_bytes / 2**30:.2f} GiB besides its state and its batch, and "
            f"{self.available_bytes / 2**30:.2f} GiB are available; nothing of it has run. Its largest arrays:",
            *(f"  {buffer}" for buffer in self.buffers),
            "What helps:",
            *(f"  {cure}" for cure in self.cures),
            "  a smaller batch, and accumulation to make up for it: python -m trainingcompiler.plan says which fits",
        ]
        return "\n".join(lines)
