"""What a run has done so far, counted cheaply enough to be updated at every step."""

import statistics
import time
from collections import deque
from dataclasses import dataclass, field

_KEPT_STEPS = 1001


@dataclass
class RunStatistics:
    """The counts of one run. Times are seconds; moments are readings of `time.monotonic()`.

    Attributes:
        steps: Finished optimizer steps, whoever ran them.
        compiled_steps: Those of them that ran as a compiled program.
        eager_steps: Those that ran eagerly.
        tensorflow_steps: Those that TensorFlow ran itself.
        compiles: Programs compiled or loaded from the cache.
        compile_time_s: What capturing, lowering and compiling them took.
        cache_hits: Those of them that came from the cache.
        launches: Times that a compiled program has run.
        waited_s: Of PyTorch's steps, the seconds that the loop has waited for programs: on a CPU, while they ran.
        host_reads: Times the script has looked at a value that a compiled step computes.
        fallbacks: Times a step had to run eagerly because it could not be compiled.
        started_s: The moment from which the time to the first step counts.
        time_to_first_step_s: From `started_s` to the end of the first step; None before it.
        time_to_compiled_step_s: From `started_s` to the end of the first compiled step; None before it.
    """

    steps: int = 0
    compiled_steps: int = 0
    eager_steps: int = 0
    tensorflow_steps: int = 0
    compiles: int = 0
    compile_time_s: float = 0.0
    cache_hits: int = 0
    launches: int = 0
    waited_s: float = 0.0
    host_reads: int = 0
    fallbacks: int = 0
    started_s: float = field(default_factory=time.monotonic)
    time_to_first_step_s: float | None = None
    time_to_compiled_step_s: float | None = None
    _last_end_s: float | None = field(default=None, repr=False)
    _durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS), repr=False)

    def step_finished(self, engine: str, now_s: float) -> None:
        """Counts one step that `engine` ("xla", "eager", "tensorflow") finished at the moment `now_s`."""
        self.steps += 1
        if engine == "eager":
            self.eager_steps += 1
        elif engine == "tensorflow":
            self.tensorflow_steps += 1
        else:
            self.compiled_steps += 1
            if self.compiled_steps == 1:
                self.time_to_compiled_step_s = now_s - self.started_s
        if self._last_end_s is None:
            self.time_to_first_step_s = now_s - self.started_s
        else:
            self._durations_s.append(now_s - self._last_end_s)
        self._last_end_s = now_s

    @property
    def step_time_s(self) -> float | None:
        """The median time from the end of one step to the end of the next, over the last 1,000; None before two."""
        return statistics.median(self._durations_s) if self._durations_s else None

    def summary(self) -> str:
        """Returns the run in one line."""
        others = {"eager": self.eager_steps, "by TensorFlow": self.tensorflow_steps}
        counts = [f"{count:,} {name}" for name, count in others.items() if count]
        engines = f" ({', '.join([f'{self.compiled_steps:,} compiled', *counts])})" if counts else ""
        parts = [_count(self.steps, "step") + engines]
        if self.step_time_s is not None:
            parts.append(f"{milliseconds(self.step_time_s * 1000)}/step (median)")
        cached = f" ({self.cache_hits} from the cache)" if self.cache_hits else ""
        parts.append(f"{_count(self.compiles, 'compile')}{cached} in {self.compile_time_s:,.1f} s")
        if self.fallbacks:
            parts.append(_count(self.fallbacks, "fallback"))
        if self.time_to_first_step_s is not None:
            parts.append(f"first step after {self.time_to_first_step_s:,.1f} s")
        if self.time_to_compiled_step_s not in (None, self.time_to_first_step_s):
            parts.append(f"first compiled step after {self.time_to_compiled_step_s:,.1f} s")
        return ", ".join(parts)


def milliseconds(duration_ms: float) -> str:
    """Returns a duration in milliseconds as text, with three figures or a tenth, whichever is more."""
    return f"{duration_ms:,.1f} ms" if duration_ms >= 10 else f"{duration_ms:.3g} ms"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_current: RunStatistics | None = None


def current() -> RunStatistics:
    """Returns this process's statistics; the first call makes them, and starts the clock."""
    global _current
    if _current is None:
        _current = RunStatistics()
    return _current
