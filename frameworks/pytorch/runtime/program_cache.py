"""Every compiled step of a process, kept at the last call of its path."""

import time
import weakref
from dataclasses import dataclass, field

import torch

from trainingcompiler.cache.executables import key_of
from trainingcompiler.compiling import compiler
from trainingcompiler.compiling.gc_pause import gc_paused
from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.capture import CapturedStep, capture
from trainingcompiler.frameworks.pytorch.capture.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop.passthrough import outside_transforms
from trainingcompiler.frameworks.pytorch.runtime.compile_policy import CompilePolicy
from trainingcompiler.frameworks.pytorch.runtime.compiled_step import CompiledStep, Held
from trainingcompiler.frameworks.pytorch.runtime.dispatch_queue import DispatchQueue
from trainingcompiler.frameworks.pytorch.runtime.optimizer_registry import OptimizerRegistry
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose, plan_step
from trainingcompiler.frameworks.pytorch.runtime.tensor_names import leaf_name
from trainingcompiler.frameworks.pytorch.runtime.tensor_parallel_dims import TensorParallelDims
from trainingcompiler.frameworks.pytorch.state.gradient_memory import GradientMemory
from trainingcompiler.frameworks.pytorch.state.offloaded import OffloadedTensor
from trainingcompiler.frameworks.pytorch.state.prefetch import StatePrefetcher
from trainingcompiler.frameworks.pytorch.state.sharded import ShardedState
from trainingcompiler.frameworks.pytorch.state.shared_tensors import SharedTensor, StateRegistry
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot
from trainingcompiler.parallel import spmd
from trainingcompiler.program import StepProgram
from trainingcompiler.reporting.events import Recompiled, emit, phase
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target

GradFlags = dict[int, tuple[torch.Tensor, bool]]
_MOST_PROGRAMS = 32  # for one loop; beyond, new shapes or constants come too often for compiling them to pay
_RUNS_PER_CAPTURE = 10  # that pay for one, once a loop has been captured so often


@dataclass
class _Loop:
    """What has been compiled of one loop: the same calls, whatever the tensors, shapes and constants.

    A search or a cross-validation trains one model after another: each is captured, and all run one executable.

    Attributes:
        captures: How often it was captured.
        runs: How often one of its programs has run.
        digests: Of its programs.
        shapes: Of the inputs of the newest.
    """

    captures: int = 0
    runs: int = 0
    digests: set[str] = field(default_factory=set)
    shapes: tuple | None = None

    @property
    def is_worth_more(self) -> bool:
        """Whether another capture is likely to pay."""
        few = self.captures < _MOST_PROGRAMS + self.runs // _RUNS_PER_CAPTURE
        return few and len(self.digests) < _MOST_PROGRAMS


class ProgramCache:
    """Every tape that has been compiled in this process.

    Attributes:
        target: What for.
        pace: How far the loop is ahead of a GPU.
        gradients: The memory of gradients that programs write; None where they return new ones.
        verify: When results are compared with torch's: "first", "always" or "off".
        policy: Which programs are worth compiling.
        added_bytes: The most that one of them needs besides its arguments.
    """

    def __init__(
        self,
        registry: OptimizerRegistry,
        target: Target,
        verify: str = "off",
        policy: CompilePolicy | None = None,
    ):
        self.registry = registry
        self.policy = policy or CompilePolicy("eager", is_alone=False)
        self.target = target
        self.verify = verify
        # Several workers, where they divide their state.
        self.sharded_state = ShardedState() if target.workers > 1 and target.strategy.divides_state else None
        if self.sharded_state is not None:
            self.state = StateRegistry(OffloadedTensor, self.sharded_state.sharded)
        else:
            self.state = StateRegistry(
                SharedTensor if target.device_count == 1 and target.platform == "cpu" else OffloadedTensor
            )
        self.gradients = GradientMemory(self.state) if target.is_one_cpu else None
        self.layers = TensorParallelDims()
        self.dispatch_queue = DispatchQueue()
        self.added_bytes = 0
        self.agreement = spmd.ProgramAgreement()
        self._loops: dict[int, _Loop] = {}
        self._executables: weakref.WeakValueDictionary[str, compiler.Executable] = weakref.WeakValueDictionary()

    def run(self, entries: list[Entry], exports: list[Slot], purpose: Purpose, flags: GradFlags) -> "Held | None":
        """Runs entries as one program, compiled if they are new.

        Args:
            entries: In order.
            exports: The slots to give values to.
            purpose: What becomes of the state and gradients that the entries write.
            flags: `requires_grad` of each state tensor at the beginning, by identity.

        Returns:
            What is to be applied later, for `Purpose.HOLD`.

        Raises:
            CaptureError, ConcretizationError: The entries cannot be compiled, or torch would raise an error; nothing
                has changed.
        """
        with outside_transforms():
            return self._run(entries, exports, purpose, flags)

    def _run(self, entries: list[Entry], exports: list[Slot], purpose: Purpose, flags: GradFlags) -> "Held | None":
        numbering = {slot: number for number, slot in enumerate(slot for entry in entries for slot in entry.outputs)}
        wanted = {numbering[slot] for slot in exports}
        variants = programs_of(entries, purpose)
        for compiled in variants:
            with torch._C.DisableTorchFunction():
                tensors = compiled.bound() if wanted <= compiled.exported else None
            if tensors is not None:
                break
        else:
            # A set of live results only grows, or two loops that differ in what they hold would compile in turn.
            for older in variants:
                wanted |= older.exported
            slots = [slot for slot in numbering if numbering[slot] in wanted]
            compiled = self._compile(entries, slots, purpose, flags)
            variants.append(compiled)
            tensors = compiled.bound()
        assert tensors is not None
        compiled.runs += 1
        if compiled.runs == 2:
            self.policy.ran_again(compiled)
        self._loop(entries).runs += 1
        with torch._C.DisableTorchFunction():  # our own looks at tensors are nobody's business
            return compiled.run(entries, tensors)

    def _compile(self, entries: list[Entry], exports: list[Slot], purpose: Purpose, flags: GradFlags) -> "CompiledStep":
        where = next((entry.where for entry in entries if entry.where), None)
        loop = self._loop(entries)
        if not loop.is_worth_more:
            others = "other shapes, constants or tensors are not compiled"
            reason = f"this loop has been captured {loop.captures} times; {others}"
            error = CaptureError(reason, where)
            error.leaves = False
            raise error
        name = "train_step" if any(entry.optimizers for entry in entries) else "forward_backward"
        if not any(entry.modes.grad for entry in entries):
            name = "evaluation"
        self.policy.check(entries, name)
        start_s = time.perf_counter()
        with StatePrefetcher(self.state if self.target.is_one_cpu else None) as prefetcher:
            if purpose is Purpose.COMMIT:
                stepped = [optimizer for entry in entries for optimizer in entry.optimizers]
                prefetcher.copy(p for o in stepped for p in parameters_of(o) if p.requires_grad)
            captured = self._captured(entries, name, where, flags)
            compiled = CompiledStep(self, plan_step(self, name, entries, captured, exports, purpose), entries)
            compiled.compile(prefetcher, entries)
            self.added_bytes = max(self.added_bytes, compiled.added_bytes)
        loop.captures += 1
        program = compiled.plan.program
        if program is not None:
            known = len(loop.digests)
            loop.digests.add(program.digest or f"without a digest {loop.captures}")
            statistics().compiles += len(loop.digests) > known
        compile_time_s = time.perf_counter() - start_s
        self._explain(loop, entries, where, compile_time_s)
        self.policy.compiled(entries, name, compiled, compile_time_s)
        statistics().compile_time_s += compile_time_s
        return compiled

    def executable(self, program: StepProgram) -> compiler.Executable:
        """A program's executable: the one that another step runs already, where theirs are the same.

        Raises:
            NotEnoughMemoryError, TrainingCompilerError: See `compiler.compile`.
        """
        if program.digest is None or self.target.workers > 1:
            return compiler.compile(program, self.target)
        key = key_of(program, self.target)
        found = self._executables.get(key)
        if found is None:
            found = self._executables[key] = compiler.compile(program, self.target)
        return found

    def _loop(self, entries: list[Entry]) -> _Loop:
        assert entries[-1].call is not None
        return self._loops.setdefault(entries[-1].call.loop, _Loop())

    def _captured(self, entries: list[Entry], name: str, where: str | None, flags: GradFlags) -> CapturedStep:
        with phase("capture", f"{name} at {where}" if where else name) as running, gc_paused():
            try:
                captured = capture(entries, lambda optimizer: self.registry.habits(optimizer).constants, flags)
            except (CaptureError, ConcretizationError):
                raise
            except Exception as error:  # an error of the script's, most likely: torch will say which
                raise CaptureError(f"{type(error).__name__}: {error}".split("\n")[0], where) from error
            running.detail += f"  {len(captured.graph.nodes):,} ops"
        return captured

    def _explain(self, loop: _Loop, entries: list[Entry], where: str | None, compile_time_s: float) -> None:
        shapes = tuple(
            (index, place, leaf.shape, leaf.dtype)
            for index, entry in enumerate(entries)
            for place, leaf in enumerate(entry.leaves)
            if isinstance(leaf, Input)
        )
        before, loop.shapes = loop.shapes, shapes
        if before is None or len(before) != len(shapes):
            return
        for old, new in zip(before, shapes, strict=True):
            if old[2:] != new[2:]:
                emit(
                    Recompiled(
                        changed=f"{leaf_name(entries[new[0]], new[1])}  {_described(old)} -> {_described(new)}",
                        where=where,
                        count=loop.captures,
                        compile_time_s=compile_time_s,
                        cure=_cure(entries[new[0]].leaves[new[1]]),
                    )
                )
                return


def _cure(changed: Input) -> str:
    last = "DataLoader(..., drop_last=True), if it is the last, smaller batch of an epoch"
    selects = "torch.where or a mask, which keep the shape, if the script selects values"
    return f"{last}; {'' if changed.origin is not None else selects + '; '}pad to few lengths otherwise"


def programs_of(entries: list[Entry], purpose: Purpose) -> list[CompiledStep]:
    """The programs of entries, which are kept at the end of their path, and go with it."""
    last = entries[-1].call
    assert last is not None and entries[0].call is not None
    is_path = entries[0].call.depth == 1 and last.depth == len(entries)
    key = (purpose, None if is_path else tuple(entry.call.depth for entry in entries if entry.call is not None))
    return last.programs.setdefault(key, [])


def _described(shape: tuple) -> str:
    return f"{str(shape[3]).removeprefix('torch.')}{list(shape[2])}"
