"""The PyTorch half of `trainingcompiler.check`: watches a script until its K-th compiled step, and judges that step."""

from collections import Counter

from trainingcompiler.events import Event, FellBack, subscribe
from trainingcompiler.frameworks.pytorch import inspection
from trainingcompiler.frameworks.pytorch.checking import Verdict, check
from trainingcompiler.frameworks.pytorch.inspection import Inspection
from trainingcompiler.statistics import current as statistics

EQUAL, DIFFERENT, NOTHING = 0, 1, 2


class CheckRun:
    """One check of one script.

    Args:
        steps: How many compiled steps to run.
    """

    class Enough(BaseException):
        """Stops the script after its last step; no `except Exception` of the script's catches it."""

    def __init__(self, steps: int):
        self._steps = steps
        self._seen = 0
        self._of_step: list[Inspection] = []
        self._last: list[Inspection] = []
        self._reads_before = 0
        self._reads = 0
        self._fallbacks: list[FellBack] = []

    def start(self) -> None:
        """Begins to watch."""
        inspection.inspector = self._ran
        subscribe(self._note)

    def report(self, failure: BaseException | None) -> tuple[list[str], int]:
        """What has been found.

        Args:
            failure: What ended the script, if it did not end well.

        Returns:
            The lines to print and the exit code.
        """
        inspection.inspector = None
        lines = [f"runs eagerly at {event.where}: {event.reason}" for event in self._fallbacks]
        operators = Counter(event.operator for event in self._fallbacks if event.operator)
        lines.append(f"operators without a lowering: {', '.join(sorted(operators)) or 'none'}")
        if not self._last:
            return [*lines, self._why_nothing(failure)], NOTHING
        where = next((inspected.where for inspected in self._last if inspected.where), None)
        programs = "one program" if len(self._last) == 1 else f"{len(self._last)} programs"
        lines.append(f"step {self._seen} at {where}: {programs}, values read by the script: {self._reads}")
        code = EQUAL
        for inspected in self._last:
            verdict = check(inspected)
            lines += _described(inspected, verdict)
            if verdict.first is not None:
                code = DIFFERENT
        lines.append("different" if code else "equal up to rounding")
        return lines, code

    def _ran(self, inspected: Inspection) -> None:
        self._of_step.append(inspected)
        if not inspected.steps:
            return
        self._seen += 1
        self._last, self._of_step = self._of_step, []
        reads = statistics().host_reads
        self._reads, self._reads_before = reads - self._reads_before, reads
        if self._seen == self._steps:
            raise self.Enough

    def _note(self, event: Event) -> None:
        if isinstance(event, FellBack):
            self._fallbacks.append(event)

    def _why_nothing(self, failure: BaseException | None) -> str:
        if isinstance(failure, SystemExit):
            return f"nothing to check: the script left with exit code {failure.code} before its first compiled step"
        if failure is not None:
            return f"nothing to check: the script failed before its first compiled step ({type(failure).__name__})"
        if self._fallbacks:
            return f"nothing to check: the step could not be captured ({self._fallbacks[0].where})"
        if statistics().steps:
            return "nothing to check: the script ended before its first compiled step; it takes at least two steps"
        return "nothing to check: the script reached no optimizer.step()"


def _described(inspected: Inspection, verdict: Verdict) -> list[str]:
    relative, name = verdict.largest
    lines = [
        f"{inspected.name}: {verdict.operators:,} operators, {verdict.compared:,} results compared; "
        f"largest relative difference {relative:.1e} ({name})"
    ]
    if verdict.first is not None:
        first = verdict.first
        lines.append(
            f"the first operator at fault is {first.operator} at {first.where}: torch gives {first.torchs:.9g}, the "
            f"executable {first.compiled:.9g} (relative difference {first.relative:.1e})"
        )
    elif verdict.over:
        lines.append(
            f"{len(verdict.over)} results differ by more than their tolerance ({', '.join(verdict.over[:3])}), but no "
            "operator does on equal inputs: rounding that adds up"
        )
    return lines
