"""Every compiled tape of a process, found by signature."""

import time

from torch import nn

from trainingcompiler import workers
from trainingcompiler.errors import CaptureError
from trainingcompiler.events import Recompiled, emit, phase
from trainingcompiler.frameworks.pytorch.capture import CapturedStep, capture
from trainingcompiler.frameworks.pytorch.compiled_tape import CompiledTape, Held, Purpose
from trainingcompiler.frameworks.pytorch.division import Division
from trainingcompiler.frameworks.pytorch.layers import Layers
from trainingcompiler.frameworks.pytorch.loops import OptimizerBook
from trainingcompiler.frameworks.pytorch.moving import Mover
from trainingcompiler.frameworks.pytorch.naming import leaf_name
from trainingcompiler.frameworks.pytorch.numbers import NumberUsed
from trainingcompiler.frameworks.pytorch.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.pace import Pace
from trainingcompiler.frameworks.pytorch.placed import PlacedCell
from trainingcompiler.frameworks.pytorch.state import Cell, CellRegistry
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot
from trainingcompiler.garbage import collector_at_rest
from trainingcompiler.statistics import current as statistics
from trainingcompiler.targets import Target

_MOST_PROGRAMS = 32  # for one loop; beyond, new shapes or constants come too often for compiling them to pay


class ProgramCache:
    """Every tape that has been compiled in this process.

    Attributes:
        target: What for.
        pace: How far the loop is ahead of a GPU.
        added_bytes: The most that one of them needs besides its arguments.
    """

    def __init__(self, book: OptimizerBook, target: Target):
        self.book = book
        self.target = target
        # Several workers, where they divide their state.
        self.division = Division() if target.workers > 1 and target.strategy.divides_state else None
        if self.division is not None:
            self.cells = CellRegistry(PlacedCell, self.division.cell)
        else:
            self.cells = CellRegistry(Cell if target.device_count == 1 and target.platform == "cpu" else PlacedCell)
        self.layers = Layers()
        self.pace = Pace()
        self.added_bytes = 0
        self.agreement = workers.Agreement()
        self._programs: dict[tuple, list[CompiledTape]] = {}
        self._loops: dict[tuple, list[tuple]] = {}

    def signature(self, entries: list[Entry]) -> tuple[tuple, dict[Slot, int]]:
        """What decides which program entries are.

        Returns:
            A hashable key, and the number that each slot has in it.
        """
        numbering: dict[Slot, int] = {}
        parts = []
        for entry in entries:
            reads = tuple(numbering.get(slot, (tuple(slot.meta.shape), slot.meta.dtype)) for slot in entry.slots())
            extra = (*map(self.book.pattern, entry.optimizers), entry.seed is not None)
            parts.append((entry.key, reads, extra))
            for slot in entry.outputs or ():
                numbering[slot] = len(numbering)
        return tuple(parts), numbering

    def run(self, entries: list[Entry], exports: list[Slot], purpose: Purpose) -> "Held | None":
        """Runs entries as one program, compiled if they are new.

        Args:
            entries: In order.
            exports: The slots to give values to.
            purpose: What becomes of the state and gradients that the entries write.

        Returns:
            What is to be applied later, for `Purpose.HOLD`.

        Raises:
            CaptureError, NumberUsed: The entries cannot be compiled, or torch would raise an error; nothing has
                changed.
        """
        key, numbering = self.signature(entries)
        wanted = {numbering[slot] for slot in exports}
        variants = self._programs.setdefault((purpose, key), [])
        for compiled in variants:
            if wanted <= compiled.exported and (tensors := compiled.bound()) is not None:
                break
        else:
            # A set of live results only grows, or two loops that differ in what they hold would compile in turn.
            for older in variants:
                wanted |= older.exported
            compiled = self._compile(entries, [slot for slot in numbering if numbering[slot] in wanted], purpose)
            variants.append(compiled)
            tensors = compiled.bound()
        assert tensors is not None
        return compiled.run(entries, tensors)

    def _compile(self, entries: list[Entry], exports: list[Slot], purpose: Purpose) -> "CompiledTape":
        where = next((entry.where for entry in entries if entry.where), None)
        if len(self._loops.get(_loop(entries), ())) >= _MOST_PROGRAMS:
            reason = f"this loop has been compiled {_MOST_PROGRAMS} times; other shapes or constants are not compiled"
            error = CaptureError(reason, where)
            error.leaves = False
            raise error
        name = "train_step" if any(entry.optimizers for entry in entries) else "forward_backward"
        if all(isinstance(entry.function, nn.Module) for entry in entries) and not any(
            entry.ambient.grad for entry in entries
        ):
            name = "evaluation"
        start_s = time.perf_counter()
        target = self.target
        shares = target.device_count == target.workers == 1 and target.platform == "cpu"
        with Mover(self.cells if shares else None) as mover:
            if purpose is Purpose.COMMIT:
                stepped = [optimizer for entry in entries for optimizer in entry.optimizers]
                mover.copy(p for o in stepped for p in parameters_of(o) if p.requires_grad)
            unknown = entries[-1].outputs is None
            captured = self._captured(entries, name, where)
            if unknown:
                exports = entries[-1].outputs or []
            compiled = CompiledTape(self, name, entries, captured, exports, purpose)
            compiled.compile(mover)
            self.added_bytes = max(self.added_bytes, compiled.added_bytes)
        self._explain(entries, where, time.perf_counter() - start_s)
        statistics().compiles += not compiled.is_empty
        statistics().compile_time_s += time.perf_counter() - start_s
        return compiled

    def _captured(self, entries: list[Entry], name: str, where: str | None) -> CapturedStep:
        with phase("capture", f"{name} at {where}" if where else name) as running, collector_at_rest():
            try:
                captured = capture(entries, lambda optimizer: self.book.habits(optimizer).constants)
            except (CaptureError, NumberUsed):
                raise
            except Exception as error:  # an error of the script's, most likely: torch will say which
                raise CaptureError(f"{type(error).__name__}: {error}".split("\n")[0], where) from error
            running.detail += f"  {len(captured.graph.nodes):,} ops"
        return captured

    def _explain(self, entries: list[Entry], where: str | None, compile_time_s: float) -> None:
        shapes = tuple(
            (index, place, leaf.shape, leaf.dtype)
            for index, entry in enumerate(entries)
            for place, leaf in enumerate(entry.leaves)
            if isinstance(leaf, Input)
        )
        seen = self._loops.setdefault(_loop(entries), [])
        seen.append(shapes)
        if len(seen) == 1 or len(seen[-2]) != len(shapes):
            return
        for old, new in zip(seen[-2], shapes, strict=True):
            if old[2:] != new[2:]:
                emit(
                    Recompiled(
                        changed=f"{leaf_name(entries[new[0]], new[1])}  {_described(old)} -> {_described(new)}",
                        where=where,
                        count=len(seen),
                        compile_time_s=compile_time_s,
                        cure="DataLoader(..., drop_last=True), if it is the last, smaller batch of an epoch; "
                        "pad to few lengths otherwise",
                    )
                )
                return


def _loop(entries: list[Entry]) -> tuple:
    """What is called, whatever the shapes."""
    return tuple(entry.key[0][0] if isinstance(entry.function, nn.Module) else entry.key[0] for entry in entries)


def _described(shape: tuple) -> str:
    return f"{str(shape[3]).removeprefix('torch.')}{list(shape[2])}"
