"""Loops by chance train the model that eager trains: 50 in CI, 2,000 by `make fuzz`, and every failure so far."""

import os
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))

from loops import LOOPS, STEPS, TURNS, Loop, script
from parity import FLOAT64_TOLERANCE, Run, assert_same, train

COUNT = int(os.environ.get("FUZZ_LOOPS", "50"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PART = 250  # loops in a test, so that processes can share them
FOLDER = Path(__file__).parents[2] / "build" / "fuzz"
# Of all steps: the first of every loop is torch's, and so is one whose optimizer's state was cleared.
COMPILED_SHARE = 0.8


def loop(**changes) -> Loop:
    """The plain loop, with changes."""
    plain = dict(
        layers=(), loss="cross entropy", optimizers=("sgd",), schedule=None, accumulate=1, clip=None, zero="first",
        reads=frozenset(), weight=None, events=(),
    )  # fmt: skip
    return Loop(**{**plain, **changes})


FOUND = {
    "nothing special": loop(),
    "clipping outlived its gradients": loop(clip="value", events=((8, "two calls"), (9, "skip the step"))),
    "one twin was too quiet": loop(layers=("batch norm",), loss="margin", optimizers=("adagrad",)),
    "nothing has a gradient to clip": loop(clip="value", accumulate=2, events=((7, "give up"),)),
    "fake kernels make a gradient that nobody asked for": loop(layers=("batch norm",), events=((3, "freeze"),)),
}


def run(source: str, *, compiled: bool, engine: str = "xla") -> Run:
    """Runs a loop's script; `loop.py` is what it is called on the console."""
    names: dict[str, Any] = {"__name__": "__main__", "print": lambda *_: None}

    def train_it(*_) -> list[float]:
        exec(compile(source, "loop.py", "exec"), names)
        return names["seen"]

    default = torch.get_default_dtype()
    try:
        ran = train(dict, train_it, [], compiled=compiled, **({"engine": engine} if compiled else {}))
    finally:
        torch.set_default_dtype(default)
    ran.objects = {"model": names["model"], **{f"optimizer{i}": o for i, o in enumerate(names["optimizers"])}}
    return ran


def compare(loop: Loop) -> Run | None:
    """Asserts that a loop trains what eager trains, and returns the compiled run, if there is one.

    In float64; where the difference is above 1e-7, against the noise of eager itself: a twin whose rows are summed in
    another order. One twin is one sample of it; where a gradient is nothing but rounding, and Adagrad divides it by its
    own size, three more are taken.
    A loop that eager refuses (`clip_grad_value_` where nothing has a gradient) is refused with the same words.
    """
    try:
        eager = run(script(loop), compiled=False)
    except Exception as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            run(script(loop), compiled=True, engine=loop.engine)
        return None
    compiled = run(script(loop), compiled=True, engine=loop.engine)
    twins: list[Run] = []
    for turn in (None, *TURNS):
        if turn is not None:
            twins.append(run(script(loop, turn), compiled=False))
        try:
            assert_same(eager, compiled, twins, floor=FLOAT64_TOLERANCE)
            break
        except AssertionError:
            if turn == TURNS[-1]:
                raise
    return compiled


@dataclass
class Tally:
    """What many loops have come to.

    Attributes:
        part: Which of several runs.
        loops: How many have run.
        steps: Their optimizer steps, of those that are not left to the faster engine.
        compiled_steps: Those that ran as a program.
        reasons: Why others ran eagerly, and in how many loops.
        failures: Scripts that train something else than eager does, each with what was seen.
    """

    part: int
    loops: int = 0
    steps: int = 0
    compiled_steps: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, loop: Loop) -> None:
        """Runs a loop, and notes how it went."""
        self.loops += 1
        try:
            ran = compare(loop)
        except Exception as error:
            self._failed(loop, "".join(traceback.format_exception_only(error)))
            return
        if ran is None:
            return
        if loop.engine == "xla":
            self.steps += ran.statistics.steps
            self.compiled_steps += ran.statistics.compiled_steps
        for reason in {event.reason for event in ran.fallbacks()}:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def _failed(self, loop: Loop, what: str) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"loop_{SEED}_{self.part}_{self.loops}.py"
        path.write_text(f"# {loop}\n# {what.strip().splitlines()[0]}\n{script(loop)}")
        self.failures.append(f"{what}as a script, {path.relative_to(FOLDER.parents[1])}:\n\n{script(loop)}")
        print(self.failures[-1], flush=True)

    def __str__(self) -> str:
        share = self.compiled_steps / max(self.steps, 1)
        said = "".join(f"\n  in {count} loops: {reason}" for reason, count in self.reasons.items())
        return (
            f"{self.loops:,} loops, {len(self.failures)} failures, {share:.1%} of {self.steps:,} steps compiled{said}"
        )


@pytest.mark.parametrize("part", range(-(-COUNT // PART)))
def test_loops_by_chance(part):
    tally = Tally(part)
    count = min(PART, COUNT - part * PART)

    @seed(1000 * SEED + part)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # an example takes a second: shrinking one takes minutes
    )
    @given(LOOPS)
    def judge(loop: Loop) -> None:
        tally.add(loop)

    judge()
    print(tally)
    jax.clear_caches()  # with the executables of 1,950 loops, XLA's serialize() ended the process (jaxlib 0.10.2)
    assert not tally.failures, "\n".join([str(tally), *tally.failures[:3]])
    assert tally.loops >= count * 0.9, tally  # Hypothesis may find fewer different ones, not many fewer
    assert tally.compiled_steps >= COMPILED_SHARE * tally.steps, tally


@pytest.mark.parametrize("loop", FOUND.values(), ids=FOUND)
def test_a_loop_that_once_failed(loop):
    compare(loop)


def test_a_loop_is_a_script_that_a_person_can_run(tmp_path, capfd):
    import subprocess

    source = script(loop(layers=("bilinear",), reads=frozenset(["loss at end"]), events=((3, "copy the model"),)))
    path = tmp_path / "loop.py"
    path.write_text(source)
    said = subprocess.run([sys.executable, path], check=True, capture_output=True, text=True).stdout
    assert len(eval(said.splitlines()[0])) == STEPS + 1 and "0.weight" in said
