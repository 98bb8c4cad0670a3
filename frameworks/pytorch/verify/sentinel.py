"""The numeric sentinel: a program's first run on a machine is replayed in torch, and compared, before it counts.

XLA has miscompiled on every backend, without a word. What has been found is kept with the executable, so that it is
paid for once. A program whose results are not torch's up to rounding is refused from then on, which leaves it to torch.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jaxlib
import numpy as np
import torch

from trainingcompiler.cache import jax_cache
from trainingcompiler.cache.executables import key_of
from trainingcompiler.compiling import compiler
from trainingcompiler.compiling.memory import host_bytes, size_of
from trainingcompiler.errors import CaptureError
from trainingcompiler.files import write_whole
from trainingcompiler.frameworks.pytorch.capture.inspection import Inspection
from trainingcompiler.frameworks.pytorch.graph.ir import Graph
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view, tensor_of
from trainingcompiler.frameworks.pytorch.state.shared_tensors import SharedTensor
from trainingcompiler.frameworks.pytorch.verify.compare import Judge, Verdict, flushes_denormals, gradients_in
from trainingcompiler.frameworks.pytorch.verify.torch_replay import bytes_of_replay
from trainingcompiler.program import StepProgram
from trainingcompiler.reporting.events import Note, emit, phase
from trainingcompiler.targets.target import Target
from trainingcompiler.targets.xla_options import options

if TYPE_CHECKING:
    from trainingcompiler.compiling.compiler import Executable

_SMALL_BYTES = 2**28  # of values that a CPU replays for a GPU's program
_ISSUES = "https://github.com/openxla/xla/issues"
_said: set[str] = set()


class Sentinel:
    """What verifies one compiled program.

    Args:
        name: The program's name.
        where: The script's line.
        graph: The captured graph.
        given: The numbers of the values that the program is given: state, inputs, numbers.
        returned: Those of the values that it returns: new state, outputs.
        names: What a person calls the values that it returns.
        replaced: The numbers of the new state, and those of the state whose places they take.
    """

    def __init__(
        self,
        name: str,
        where: str | None,
        graph: Graph,
        given: Sequence[int],
        returned: Sequence[int],
        names: dict[int, str],
        replaced: dict[int, int],
    ):
        self._name, self._where = name, where
        self._graph: Graph | None = graph
        self._given, self._returned, self._names, self._replaced = list(given), list(returned), names, replaced
        self._always = False
        self._found: dict[str, Any] | None = None
        self._early: EarlyReplay | None = None

    def begin(self, program: StepProgram, target: Target, when: str) -> None:
        """Looks for what is known of the program.

        Args:
            program: What is to be verified.
            target: What it is compiled for.
            when: `"first"`, `"always"` or `"off"`.
        """
        self._always = when == "always"
        if when == "off":
            self._graph = None
        elif target.device_count > 1 or target.workers > 1:
            self._skip("what several devices or workers compute is not compared with PyTorch's results", once=True)
        elif not self._always:
            self._found = _kept(program, target)
            self._graph = None if self._found else self._graph

    def replay_meanwhile(self, state_bytes: int, values: Callable[[], tuple[Sequence[Any], Sequence[Any]]]) -> None:
        """Begins to replay the first run, while the program is compiled: a core has nothing else to do.

        Args:
            state_bytes: Of what `values` copies.
            values: Gives the state, which is nobody else's, and the inputs, as `watching` is given them.
        """
        if self._graph is None or self._always:
            return
        there_is = host_bytes()
        if there_is is None or 2 * (self._replay_bytes() + state_bytes) < there_is:
            self._early = EarlyReplay(lambda: self._inspection(*values(), copies=False), self._returned)

    def end_replay(self) -> None:
        """Waits for a replay that nobody will use: it gives torch's generator back as it found it."""
        early, self._early = self._early, None
        if early is not None:
            early.wait()

    def _replay_bytes(self) -> int:
        assert self._graph is not None
        kept = [*self._returned, *gradients_in(self._graph.nodes)]
        return bytes_of_replay(self._graph.live_nodes(self._returned), kept)

    @contextlib.contextmanager
    def watching(self, executable: "Executable", state: Sequence[Any], inputs: Sequence[Any]) -> Iterator["Watch"]:
        """Wraps one run of the program, from before it is given its state until its results count.

        Args:
            executable: What is run.
            state: What it is given, and will overwrite.
            inputs: What it reads, the last two being its seeds and its numbers.

        Raises:
            CaptureError: The program does not compute what torch does; the state is as it was before the run.
        """
        if self._found is not None and not self._found["equal"]:
            raise _refusal(self._found)
        watch = Watch()
        early, self._early = self._early, None
        if self._graph is None or (early is None and not self._has_room(executable)):
            yield watch
            return
        before = early.inspection() if early is not None else self._inspection(state, inputs)
        try:
            yield watch
        except BaseException:
            if early is not None:
                early.wait()
            raise
        try:
            self._settle(executable, before, watch, early)
        except BaseException:
            watch.undo([before.inputs[number] for number in self._given[: len(state)]])
            raise
        finally:
            watch.results = ()

    def _has_room(self, executable: "Executable") -> bool:
        needed = self._replay_bytes() + executable.memory.argument_bytes
        there_is = host_bytes()
        if executable.target.platform != "cpu" and needed > _SMALL_BYTES:
            self._skip(
                f"{self._title} is not compared with PyTorch's results: it is a GPU's, and replaying its "
                f"{size_of(needed)} of values is too much for the CPU"
            )
        elif there_is is not None and needed + executable.memory.added_bytes > there_is:
            self._skip(
                f"{self._title} is not compared with PyTorch's results: that needs {size_of(needed)}, and "
                f"{size_of(max(0, there_is - executable.memory.added_bytes))} are available"
            )
        return self._graph is not None

    def _inspection(self, state: Sequence[Any], inputs: Sequence[Any], copies: bool = True) -> Inspection:
        assert self._graph is not None
        *arrays, seeds, numbers = inputs
        values = [_seen(array).clone() if copies else array for array in state] + [_seen(array) for array in arrays]
        values += [torch.tensor(int(seed)) for seed in np.asarray(seeds)]
        values += [torch.tensor(float(number), dtype=torch.float64) for number in np.asarray(numbers)]
        return Inspection(
            name=self._name,
            where=self._where,
            steps=False,
            graph=self._graph,
            inputs=dict(zip(self._given, values, strict=True)),
            results={},
            names=self._names,
            replaced=self._replaced,
        )

    def _settle(
        self, executable: "Executable", before: Inspection, watch: "Watch", early: "EarlyReplay | None"
    ) -> None:
        with phase("verify", self._title) as running:
            try:
                judge = early.judge() if early is not None else _replayed(before, self._returned)
                verdict = judge.judge(dict(zip(self._returned, map(_seen, watch.results), strict=True)))
            except Exception as error:  # an operator that torch does not run by its name and these arguments alone
                text = f"{type(error).__name__}: {error}".split("\n")[0]
                running.detail += ", not compared"
                return self._skip(f"{self._title} is not compared with PyTorch's results: replaying it failed ({text})")
            running.detail += f", {verdict.compared:,} results {_summary(verdict)}"
        found = self._described(executable, verdict)
        _keep(executable, found)
        if not self._always or verdict.differs:
            self._graph = None
            self._found = found
        if verdict.differs:
            raise _refusal(found)
        return None

    def _described(self, executable: "Executable", verdict: Verdict) -> dict[str, Any]:
        if not verdict.differs:
            return {"equal": True}
        whole = {"equal": False, "where": self._where, "operator": None}
        if verdict.first is not None:
            reason = f"XLA computes {self._name} wrongly: {verdict.first}"
            whole |= {"where": verdict.first.where or self._where, "operator": verdict.first.operator}
        else:
            assert verdict.worst is not None
            _, torchs, compiled, name = verdict.worst
            values = f"{name} is {compiled:.9g} where PyTorch has {torchs:.9g}"
            if verdict.is_flushed:
                reason = f"XLA on a CPU takes numbers below 1.2e-38 (denormal ones) for 0, and so {values}"
            else:
                reason = (
                    f"XLA computes {self._name} wrongly: {values}. Each of its operators alone is right, only the "
                    f"whole program differs: please report {_dump(executable)} at {_ISSUES}"
                )
        # One that only looks is left alone; what trains is torch's with all its modules and optimizers.
        return {**whole, "reason": reason, "leaves": self._name != "evaluation"}

    @property
    def _title(self) -> str:
        return f"{self._name} at {self._where}" if self._where else self._name

    def _skip(self, text: str, once: bool = False) -> None:
        self._graph = None
        if not once or text not in _said:
            _said.add(text)
            emit(Note(text=text))


class EarlyReplay:
    """A replay in a thread of its own, which begins before the run that it is compared with.

    Args:
        inspect: Copies what the run will be given; the replay begins when that has been done.
        wanted: The numbers of the results to compare.
    """

    def __init__(self, inspect: Callable[[], Inspection], wanted: Sequence[int]):
        flushes = flushes_denormals()

        def begin() -> Inspection:
            torch.set_flush_denormal(flushes)  # each thread has a wish of its own
            return inspect()

        pool = ThreadPoolExecutor(1, "trainingcompiler verify")
        self._inspection = pool.submit(begin)
        self._judge = pool.submit(lambda: _replayed(self._inspection.result(), wanted))
        pool.shutdown(wait=False)

    def inspection(self) -> Inspection:
        """What the run is given, once it has been copied."""
        return self._inspection.result()

    def wait(self) -> None:
        """Returns when it has ended, however that was."""
        wait([self._judge])

    def judge(self) -> Judge:
        """Who compares, once everything has been replayed.

        Raises:
            Exception: What has ended the replay.
        """
        return self._judge.result()


class Watch:
    """A run that may be verified.

    Attributes:
        results: What it has computed: its new state and its outputs.
    """

    def __init__(self):
        self.results: Sequence[Any] = ()
        self._shared: list[Any] = []

    def ran(self, shared: list[Any], new_state: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Notes the results of a run, the state being stored already."""
        self._shared, self.results = shared, [*new_state, *outputs]

    def undo(self, state: Sequence[torch.Tensor]) -> None:
        """Gives the state the values again that it had."""
        for shared, array, old in zip(self._shared, self.results, state, strict=False):
            if isinstance(shared, SharedTensor):
                shared.tensor().data.copy_(old)  # which torch is not to take for a write to the tensor
            else:
                shared.update(jax.device_put(numpy_view(old), array.sharding))


def _summary(verdict: Verdict) -> str:
    relative, name = verdict.largest
    if verdict.differs:
        return f"differ from PyTorch's by {relative:.1e} ({name})"
    noisy = f", {verdict.noisy:,} to its own noise" if verdict.noisy else ""
    return f"as PyTorch's to {relative:.0e}{noisy}"


def _seen(array: Any) -> torch.Tensor:
    """An array's values; the tensor is not to be kept, or XLA would copy memory that it could update."""
    if isinstance(array, torch.Tensor):
        return array
    with jax.enable_x64(True):
        return tensor_of(jax.numpy.asarray(array))


def _replayed(before: Inspection, wanted: Sequence[int]) -> Judge:
    judge = Judge(before, wanted)
    with torch.random.fork_rng(devices=[]):  # the script's numbers do not depend on who is compared
        judge.replay()
    return judge


def _kept(program: StepProgram, target: Target) -> dict[str, Any] | None:
    store = jax_cache.store()
    return None if store is None or program.digest is None else store.verdict(program, target)


def _keep(executable: "Executable", verdict: dict[str, Any]) -> None:
    store = jax_cache.store()
    if store is not None and executable.program.digest is not None:
        store.keep_verdict(executable.program, executable.target, verdict)


def _refusal(found: dict[str, Any]) -> CaptureError:
    error = CaptureError(found["reason"], found["where"], found["operator"])
    error.leaves = found["leaves"]
    return error


def _dump(executable: "Executable") -> Path:
    """Writes what a report needs: versions, options, the program before and after XLA's work on it."""
    program, target = executable.program, executable.target
    store = jax_cache.store()
    folder = store.folder if store is not None else Path(tempfile.mkdtemp(prefix="trainingcompiler-"))
    path = folder / f"{program.name}-{key_of(program, target) if program.digest else 'difference'}-difference.txt"
    parts = [
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {target.description}, {options(program, target)}",
        "StableHLO:",
        compiler.lowered(program).as_text(),
        "Optimized:",
        executable.as_text(),
    ]
    write_whole(path, "\n\n".join(parts).encode())
    return path
