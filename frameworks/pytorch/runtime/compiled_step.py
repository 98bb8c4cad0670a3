"""One compiled step: finds its arguments, calls the executable, and stores what comes back."""

import contextlib
import functools
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch

from trainingcompiler.compiling import compiler
from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.capture import inspection, optimizers
from trainingcompiler.frameworks.pytorch.capture.capture import FloatSource
from trainingcompiler.frameworks.pytorch.graph.passes import PASSES, run_passes
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.arrays import laid_out, tensor_of
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.gradients import store_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose, StepPlan
from trainingcompiler.frameworks.pytorch.state.ownership import overlapping
from trainingcompiler.frameworks.pytorch.state.prefetch import StatePrefetcher
from trainingcompiler.frameworks.pytorch.state.sharded import ShardedState
from trainingcompiler.frameworks.pytorch.state.shared_tensors import input_array
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input
from trainingcompiler.frameworks.pytorch.verify.sentinel import Sentinel
from trainingcompiler.reporting import dump
from trainingcompiler.reporting.statistics import current as statistics

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache

_REFUSED = "a value is out of range, such as an index: torch is to say which"


class CompiledStep:
    """One executable and how its arguments are found.

    Attributes:
        plan: What it computes.
        exported: Numbers of the slots that it computes.
        runs: How often it has been asked to run.
    """

    def __init__(self, cache: "ProgramCache", plan: StepPlan, entries: list[Entry]):
        self.cache, self.plan = cache, plan
        self.exported = set(plan.exports)
        values = plan.values
        facts = plan.graph, values.given, values.returned, plan.names, plan.replaced
        self._sentinel = Sentinel(plan.name, plan.where, *facts)
        self._inspected = facts if inspection.inspector is not None else None
        self._executable: compiler.Executable | None = None
        self._has_run = False
        self.runs = 0
        self._tell_stages(entries)

    def _tell_stages(self, entries: list[Entry]) -> None:
        """Lets whoever writes stages down know of those that lie before StableHLO."""
        name, graph, platform = self.plan.name, self.plan.graph, self.cache.target.platform

        def after(one: str) -> str:
            return str(dict(run_passes(graph, self.plan.values.returned, platform))[one])

        dump.stage(name, "tape", lambda: "\n".join(map(str, entries)))
        dump.stage(name, "graph", lambda: str(graph))
        for one in ("live", *(each.name for each in PASSES if each.platform in ("", platform))):
            dump.stage(name, f"graph after {one}", functools.partial(after, one))

    def compile(self, prefetcher: StatePrefetcher, entries: list[Entry]) -> None:
        """Compiles the program for this process's devices, while `prefetcher` moves the state, and torch replays it."""
        plan = self.plan
        if plan.program is not None:
            if plan.waits and self.cache.sharded_state is None:
                self.cache.agreement.meet(plan.name, plan.where, self._batches())
            tensors = self.bound()
            if tensors is not None:
                prefetcher.move(tensors[: len(plan.donated)])
            self._sentinel.begin(plan.program, self.cache.target, self.cache.verify)
            if tensors is not None and self.cache.target.is_one_cpu:
                size = sum(tensor.nbytes for tensor in tensors)
                self._sentinel.replay_meanwhile(size, lambda: self._values_now(entries, tensors, prefetcher))
            try:
                self._executable = self.cache.executable(plan.program)
                prefetcher.wait()
            except BaseException:
                self._sentinel.end_replay()
                raise

    def _values_now(
        self, entries: list[Entry], tensors: list[torch.Tensor], prefetcher: StatePrefetcher
    ) -> tuple[list[torch.Tensor], list[Any]]:
        """What the program will be given, copied, in another thread: as `_arguments` has it."""
        prefetcher.wait()  # or a tensor would be moved while it is copied
        donated, read = len(self.plan.donated), len(self.plan.read)
        state = [tensor.detach().clone() for tensor in tensors[:donated]]
        nothing = [torch.empty(0)] * (len(self.plan.gradients.stored) if self.plan.writes_gradients else 0)
        inputs: list[Any] = [tensor.detach().clone() for tensor in tensors[donated : donated + read]]
        return [*state, *nothing], [*inputs, *self._from_entries(entries)]

    @property
    def added_bytes(self) -> int:
        """What a run needs besides its arguments."""
        return 0 if self._executable is None else self._executable.memory.added_bytes

    def _batches(self) -> list[str]:
        assert self.plan.program is not None
        return [f"a batch of {s.dtype.name}{list(s.shape)}" for s in self.plan.program.inputs if s.role == "batch"]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.plan.program is None

    def bound(self) -> list[torch.Tensor] | None:
        """The tensors that the program reads and writes; None if it was captured for others, or for other workers."""
        if self.plan.common is not None and self.cache.sharded_state.version != self.plan.version:
            return None
        for reference in self.plan.gradients.missing:
            parameter = reference()
            if parameter is None or stored_gradient(parameter) is not None:
                return None
        return self.plan.bindings.tensors()

    @section.around
    def run(self, entries: list[Entry], tensors: list[torch.Tensor]) -> "Held | None":
        """Runs the program on what the entries hold, and gives their slots values.

        Args:
            entries: Of the signature that the program was compiled for.
            tensors: What `bound` has returned.

        Returns:
            What is to be applied later, for the purpose `HOLD`.

        Raises:
            PassingCaptureError: A value is out of range. On a GPU this is told later.
        """
        if self._executable is None:
            return None
        plan = self.plan
        donated = tensors[: len(plan.donated)]
        gradients = self._gradient_tensors()
        try:
            written, state, inputs = self._arguments(entries, tensors, gradients)
        except BaseException:
            self._sentinel.end_replay()
            raise
        if self.cache.target.platform == "cuda":
            self._get_ready(entries)
        copies = [np.array(a) for a in (*state, *inputs[:-2], *inputs[-2], *inputs[-1])] if self._inspected else []
        with self._sentinel.watching(self._executable, state, inputs) as watch:
            new_state, outputs = self._launch(state, inputs)
            # From here on the old state is gone: nothing may come between this and the end of the section.
            self.cache.state.update(written, new_state)
            outputs = self._checked(inputs, new_state, outputs)
            watch.ran(written[: len(donated)], new_state, outputs)
        if self._inspected is not None:
            self._show(copies, [*new_state, *outputs])
        torch.autograd.graph.increment_version([*donated, *gradients])  # as torch's own in-place updates do
        return self._store(entries, outputs, tensors, gradients)

    def _arguments(
        self, entries: list[Entry], tensors: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> tuple[list[Any], tuple, list[Any]]:
        """What the program is called with: the shared tensors that it writes, their arrays, and its inputs."""
        assert self._executable is not None
        plan, registry, donated_count = self.plan, self.cache.state, len(self.plan.donated)
        shared = registry.all_of(tensors[: donated_count + len(plan.read)])
        donated, read = shared[:donated_count], shared[donated_count:]
        of_state = self._executable.state_shardings or itertools.repeat(None)
        of_read = self._executable.input_shardings or itertools.repeat(None)
        if self.cache.sharded_state is not None:
            pairs = itertools.chain(zip(donated, of_state, strict=False), zip(read, of_read, strict=False))
            self._come_together(self.cache.sharded_state, list(pairs))
        memory = registry.all_of(gradients)
        state = registry.arrays(donated, of_state, written=True)
        state += registry.arrays(memory, itertools.repeat(None), written=True)
        inputs: list[Any] = list(registry.arrays(read, of_read, written=False))
        if any(one.stays for one in shared):
            self._check_apart(tensors)
        inputs += self._from_entries(entries)
        return [*donated, *memory], tuple(state), inputs

    def _from_entries(self, entries: list[Entry]) -> list[Any]:
        """Of the program's inputs, what entries hold: leaves, seeds, numbers."""
        plan, on_host = self.plan, self.cache.target.is_one_cpu
        leaves = [entries[entry].leaves[place] for entry, place in plan.leaves]
        return [
            *(leaf.array if isinstance(leaf, Input) else input_array(leaf.value, on_host) for leaf in leaves),
            np.array([entries[entry].seed for entry in plan.seeds], np.int64),
            np.array([number_of(entries, source) for source in plan.numbers], np.float64),
        ]

    def _launch(self, state: tuple, inputs: list[Any]) -> tuple[tuple, tuple]:
        """Calls the executable. On a CPU its results are there afterwards; else they may be computing still."""
        assert self._executable is not None
        plan = self.plan
        watched = self.cache.agreement.running(plan.name, plan.where) if plan.waits else contextlib.nullcontext()
        with watched, jax.enable_x64(True):
            started_s = time.perf_counter()
            new_state, outputs = self._executable(state, tuple(inputs))
            if self.cache.target.platform == "cpu":  # where a call may run the program itself
                jax.block_until_ready((new_state, outputs))
                statistics().waited_s += time.perf_counter() - started_s
        statistics().launches += 1
        return new_state, outputs

    def _checked(self, inputs: list[Any], new_state: tuple, outputs: tuple) -> tuple:
        """The outputs without the last one, if that says whether all values were in range."""
        holds = None
        if len(outputs) > self.plan.output_count:
            outputs, holds = outputs[:-1], outputs[-1]
        if self.cache.target.platform != "cpu":
            self.cache.dispatch_queue.launched(inputs, (new_state, outputs), holds, self.plan.where)
        elif holds is not None and not holds:
            raise PassingCaptureError(reason=_REFUSED, where=self.plan.where)
        return outputs

    def _store(
        self, entries: list[Entry], outputs: tuple, tensors: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> "Held | None":
        """Gives slots and gradients their values."""
        plan = self.plan
        slots = [slot for entry in entries for slot in entry.outputs]
        for index, array in zip(plan.exports, outputs, strict=False):
            slot = slots[index]
            value = tensor_of(array, slot.device)
            slot.value = value if slot.meta.is_contiguous() else laid_out(value, slot.geometry.strides)
        held = Held(self, outputs[len(plan.exports) :], tensors[len(plan.donated) + len(plan.read) :])
        for (parameter, _), gradient in zip(plan.gradients.stored, gradients, strict=False):
            store_gradient(parameter(), gradient)
        if plan.purpose is Purpose.COMMIT:
            held.apply()
        return held if plan.purpose is Purpose.HOLD else None

    def _gradient_tensors(self) -> list[torch.Tensor]:
        """Where the program is to write gradients."""
        memory = self.cache.gradients
        stored = self.plan.gradients.stored if self.plan.writes_gradients else ()
        return [memory.tensor_for(parameter()) for parameter, _ in stored]

    def _check_apart(self, tensors: list[torch.Tensor]) -> None:
        """Refuses tensors over one memory: what the program writes to one of them, it would not read from the other."""
        donated, read = len(self.plan.donated), len(self.plan.read)
        found = overlapping(tensors[:donated], tensors[donated : donated + read])
        if found is not None:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in found)
            raise CaptureError(
                f"two tensors of the step, of shapes {shapes}, lie in the same memory (`b.data = a.data`), to which it "
                "writes; `b = a`, one parameter in two places, is compiled",
                self.plan.where,
            )

    def _get_ready(self, entries: list[Entry]) -> None:
        """What has to be before a program runs on a GPU, where torch may be computing still."""
        device = entries[0].device
        if device.type == "cuda":
            if not self._has_run:
                torch.cuda.empty_cache()  # what torch keeps of the memory of moved tensors, XLA cannot use
            # A tensor that is handed over brings an event, for which XLA's queue waits. Without one the host waits: XLA
            # may be about to use the memory of results again that torch still reads.
            if not any(entries[entry].leaves[place].device.type == "cuda" for entry, place in self.plan.leaves):
                devices.finish(device)
        self._has_run = True

    def _come_together(self, sharded_state: ShardedState, placed: list[tuple]) -> None:
        """Makes whole what has to be, and sees that all workers are at the same program, if it is run by all."""
        assert self.plan.program is not None
        name = f"{self.plan.name} at {self.plan.where}" if self.plan.where else self.plan.name
        sharded_state.fetch([one for one, where in placed if where.is_fully_replicated and one.is_divided], name)
        if self.plan.common is not None:
            sharded_state.meet(f"{name}, {', '.join(self._batches())}")

    def _show(self, given: list[np.ndarray], results: list[jax.Array]) -> None:
        if inspection.inspector is None:
            return
        assert self._inspected is not None
        graph, given_values, result_values, names, replaced = self._inspected
        inspection.inspector(
            inspection.Inspection(
                name=self.plan.name,
                where=self.plan.where,
                steps=self.plan.steps,
                graph=graph,
                inputs=dict(zip(given_values, given, strict=True)),
                results=dict(zip(result_values, map(np.array, results), strict=True)),
                names=names,
                replaced=replaced,
            )
        )

    def apply(self, arrays: tuple, tensors: list[torch.Tensor]) -> None:
        """Stores gradients, and the state that was computed beside the old one, into `tensors`."""
        returned = [] if self.plan.writes_gradients else self.plan.gradients.stored
        gradients, held = arrays[: len(returned)], arrays[len(returned) :]
        for (parameter, _), array in zip(returned, gradients, strict=True):
            tensor = parameter()
            # On top of a gradient that was not kept (a GAN's generator reaches the discriminator after its step), the
            # sum stays unknown: reading it, or stepping by it, is an error until it is cleared.
            if not self.cache.registry.is_consumed(tensor):
                store_gradient(tensor, self.cache.state.tensor_for(array, tensor.dtype, tensor.device))
        for tensor, array in zip(tensors, held, strict=True):
            tensor.copy_(tensor_of(array, tensor.device))
        for parameter in self.plan.gradients.cleared + self.plan.gradients.consumed:
            store_gradient(parameter(), None)
        self.cache.registry.consume(self.plan.gradients.consumed)


@dataclass(frozen=True, slots=True)
class Held:
    """What a program has computed and nobody has asked for yet."""

    step: CompiledStep
    arrays: tuple
    tensors: list[torch.Tensor]

    def apply(self) -> None:
        """Stores it."""
        self.step.apply(self.arrays, self.tensors)


def number_of(entries: list[Entry], source: FloatSource) -> float:
    """The value of a number that entries read."""
    if source.optimizer is not None:
        entry = entries[source.entry]
        groups = next(g for o, g in zip(entry.optimizers, entry.groups, strict=True) if o is source.optimizer())
        return optimizers.number_at(groups, source.position)
    return entries[source.entry].leaves[source.position]
