"""Who runs the next step: our program or TensorFlow, by the user's word or by measurement."""

from collections.abc import Sequence

from trainingcompiler.reporting.events import EngineChosen, emit

XLA, TF_XLA, TF_GRAPH = "xla", "tensorflow (its XLA)", "tensorflow (its graph)"

_SHORT_STEP_S = 0.05
_FEW, _MANY = 3, 9  # steps of each engine that are timed; more where they are short or close to each other
_CLEAR = 1.3  # the fastest is so many times as fast as the next one
_HOPELESS = 2.0  # an engine that is so many times slower than the fastest gets no further turn
_NOISE = 1.05  # two engines within 5% are equal: repeated runs of the same step differ by that much


class EngineSelector:
    """Decides before every step who runs it.

    With several candidates, they take turns on the script's own first steps, a few each, so that drift of the machine
    hits all alike and no batch is skipped or used twice; then the fastest keeps the run. The first step of every turn,
    in which the state moves over and a program may be compiled, is not timed.

    Attributes:
        chosen: The engine that has won, or None while it is open.
    """

    def __init__(self, candidates: Sequence[str]):
        self.chosen = candidates[0] if len(candidates) == 1 else None
        self._times_s: dict[str, list[float]] = {engine: [] for engine in candidates}
        self._waiting = list(candidates)
        self._left = _FEW + 1

    @property
    def next(self) -> str:
        """Who is to run the next step."""
        return self.chosen or self._waiting[0]

    def ran(self, engine: str, duration_s: float, is_typical: bool = True) -> None:
        """Notes a finished step; one that compiled something, or is of another shape than most, is not typical."""
        if self.chosen is not None or engine != self._waiting[0]:
            return
        if self._left <= _FEW:
            if not is_typical:
                return
            self._times_s[engine].append(duration_s)
        self._left -= 1
        if self._left == 0:
            self._left = _FEW + 1
            self._waiting.pop(0)
            if not self._waiting:
                self._round_over()
            elif self.next == TF_XLA and self._is_pointless():
                self._waiting.pop(0)
                self._round_over()

    def drop(self, engine: str) -> None:
        """Takes out an engine that cannot run this step; without effect where it is no candidate, or one has won."""
        if self.chosen is not None or engine not in self._times_s:
            return
        self._times_s.pop(engine, None)
        if self._waiting[:1] == [engine]:
            self._left = _FEW + 1
        self._waiting = [one for one in self._waiting if one != engine]
        if len(self._times_s) == 1:
            (self.chosen,) = self._times_s
        elif not self._waiting:
            self._round_over()

    def _is_pointless(self) -> bool:
        """Whether TensorFlow's XLA, whose compiling takes as long as ours, has no prospect.

        Wherever our program was clearly faster than the plain graph, it was faster than TensorFlow's XLA too
        (benchmarks/results); that one wins only where XLA gains little over the graph.
        """
        ours_s, graph_s = (min(self._times_s.get(engine) or [0.0]) for engine in (XLA, TF_GRAPH))
        return 0 < ours_s * _CLEAR < graph_s

    def _round_over(self) -> None:
        # The fastest of each: what else runs on the machine only ever adds time.
        best = {engine: min(times) for engine, times in self._times_s.items() if times}
        fastest = min(best, key=lambda engine: best[engine])
        others = [duration_s for engine, duration_s in best.items() if engine != fastest]
        is_clear = best[fastest] > _SHORT_STEP_S and all(other > best[fastest] * _CLEAR for other in others)
        running = [engine for engine, duration_s in best.items() if duration_s < best[fastest] * _HOPELESS]
        if len(running) > 1 and not is_clear and len(self._times_s[fastest]) < _MANY:
            self._waiting = running
            return
        if best.get(XLA, float("inf")) <= best[fastest] * _NOISE:
            fastest = XLA
        self.chosen = fastest
        emit(EngineChosen(engine=fastest, times_ms={engine: duration * 1000 for engine, duration in best.items()}))
