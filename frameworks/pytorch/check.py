"""The PyTorch half of `trainingcompiler.check`: watches a script until its K-th compiled step, and judges that step."""

import os
import sys
from types import TracebackType

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks import pytorch
from trainingcompiler.frameworks.pytorch.capture import inspection
from trainingcompiler.frameworks.pytorch.capture.inspection import Inspection
from trainingcompiler.frameworks.pytorch.verify.compare import Verdict, check
from trainingcompiler.reporting.events import Event, FellBack, subscribe
from trainingcompiler.reporting.statistics import current as statistics

EQUAL, DIFFERENT, NOTHING = 0, 1, 2


class CheckRun:
    """One check of one script: of its K-th compiled step, and of the first evaluation at each line.

    Args:
        steps: How many compiled steps to run, K; as many more are run while no evaluation has been seen.
    """

    class Enough(BaseException):
        """Stops the script after its last step; no `except Exception` of the script's catches it."""

    def __init__(self, steps: int):
        self._steps = steps
        self._seen = 0
        self._of_step: list[Inspection] = []
        self._last: list[Inspection] = []
        self._evaluations: dict[str | None, Inspection] = {}  # the first at each line
        self._reads_before = 0
        self._reads = 0
        self._fallbacks: list[FellBack] = []
        self._eager_steps = 0  # since the last compiled one, if something fell back

    def start(self) -> None:
        """Begins to watch."""
        inspection.inspector = self._ran
        inspection.missing = []
        subscribe(self._note)

    def report(self, failure: BaseException | None) -> tuple[list[str], int]:
        """What has been found.

        Args:
            failure: What ended the script, if it did not end well.

        Returns:
            The lines to print and the exit code.
        """
        missing, inspection.inspector, inspection.missing = inspection.missing, None, None
        lines = [f"runs eagerly at {event.where}: {event.reason}" for event in self._fallbacks]
        lines += _unsupported(missing or [], self._fallbacks)
        if not self._last:
            reads = statistics().host_reads  # of the one step that was recorded; torch ran the others
            if self._fallbacks:
                lines.append(f"the step is no program: it runs eagerly; values read by the script: {reads}")
            return [*lines, f"nothing to check: {self._why_nothing(failure)}"], NOTHING
        where = next((inspected.where for inspected in self._last if inspected.where), None)
        programs = "one program" if len(self._last) == 1 else f"{len(self._last)} programs"
        lines.append(
            f"step {min(self._seen, self._steps)} at {where}: {programs}, values read by the script: {self._reads}"
        )
        code = EQUAL
        for inspected in [*self._last, *self._evaluations.values()]:
            verdict = check(inspected)
            lines += _described(inspected, verdict)
            if verdict.differs:
                code = DIFFERENT
        lines.append("different" if code else "equal up to rounding")
        if failure is not None:
            lines.append(f"after {self._seen} compiled steps {_failed(failure)}")
        return lines, code or (EQUAL if failure is None else NOTHING)

    def _ran(self, inspected: Inspection) -> None:
        if inspected.name == "evaluation":
            self._evaluations.setdefault(inspected.where, inspected)
            if self._seen >= self._steps:
                raise self.Enough
            return
        if self._seen >= self._steps:  # the steps are done, and an evaluation is waited for
            self._seen += inspected.steps
            if self._seen >= 2 * self._steps:
                raise self.Enough
            return
        self._of_step.append(inspected)
        if not inspected.steps:
            return
        self._seen += 1
        self._eager_steps = 0
        self._last, self._of_step = self._of_step, []
        reads = statistics().host_reads
        self._reads, self._reads_before = reads - self._reads_before, reads
        if self._seen == self._steps and self._evaluations:
            raise self.Enough

    def _note(self, event: Event) -> None:
        if not isinstance(event, FellBack):
            return
        session = pytorch.current_session()
        if session is not None and not self._fallbacks:
            count = session.registry.on_step

            def on_step(optimizer, engine: str) -> None:
                count(optimizer, engine)
                self._stepped(engine)

            session.registry.on_step = on_step
        self._fallbacks.append(event)

    def _stepped(self, engine: str) -> None:
        """Ends a script whose steps torch runs: as many more as were to be compiled change nothing."""
        self._eager_steps += engine == "eager"
        if self._eager_steps == self._steps:
            raise self.Enough

    def _why_nothing(self, failure: BaseException | None) -> str:
        script = os.path.basename(sys.argv[0])
        if failure is not None:
            return f"before its first compiled step {_failed(failure)}"
        if self._fallbacks:
            return f"the step could not be captured ({self._fallbacks[0].where})"
        if statistics().steps:
            return f"{script} ended before its first compiled step; it takes at least two steps"
        return f"{script} reached no optimizer.step()"


def _unsupported(missing: list[CaptureError], fallbacks: list[FellBack]) -> list[str]:
    """Every operator without a lowering, each with the first line that uses it."""
    places: dict[str, str | None] = {}
    pairs = [(error.operator, error.where) for error in missing] + [
        (event.operator, event.where) for event in fallbacks
    ]
    for operator, where in pairs:
        if operator:
            places.setdefault(operator, where)
    found = [f"  {operator} at {where}" for operator, where in places.items()]
    return [f"operators without a lowering: {len(found) or 'none'}", *found]


def _failed(failure: BaseException) -> str:
    if isinstance(failure, SystemExit):
        return f"the script left with exit code {failure.code}"
    where = _place(failure.__traceback__)
    if isinstance(failure, SyntaxError):
        where = f"{os.path.basename(failure.filename or '')}:{failure.lineno}"
    return f"the script failed at {where} ({type(failure).__name__}: {failure})".split("\n")[0]


def _place(trace: TracebackType | None) -> str:
    """The innermost line of the script's own folder, or the innermost of all."""
    folder = os.path.dirname(os.path.realpath(sys.argv[0])) + os.sep
    places = []
    while trace is not None:
        path = os.path.realpath(trace.tb_frame.f_code.co_filename)
        places.append((path.startswith(folder), f"{os.path.basename(path)}:{trace.tb_lineno}"))
        trace = trace.tb_next
    own = [place for is_own, place in places if is_own]
    return (own or [place for _, place in places] or ["an unknown line"])[-1]


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
    elif verdict.worst is not None:
        _, torchs, compiled, worst = verdict.worst
        lines.append(
            f"{len(verdict.over)} results differ by more than rounding ({', '.join(verdict.over[:3])}): {worst} is "
            f"{compiled:.9g} where torch has {torchs:.9g}. No operator does on equal inputs: only the whole program "
            "differs, which is a fault of XLA's to report at https://github.com/openxla/xla/issues"
        )
    return lines
