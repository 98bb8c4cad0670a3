"""What would need less memory than a step that does not fit: found by compiling it, not by guessing."""

import contextlib
from collections.abc import Iterator

from trainingcompiler.compiling import compiler
from trainingcompiler.compiling.memory import largest_buffers, size_of
from trainingcompiler.errors import NotEnoughMemoryError, TrainingCompilerError
from trainingcompiler.planning.planner import PlannableStep
from trainingcompiler.targets.target import Target

_MOST_HALVINGS = 4


def with_memory_advice(error: NotEnoughMemoryError, step: PlannableStep, target: Target) -> NotEnoughMemoryError:
    """The same error, which also says what would fit this process's devices.

    Args:
        error: What `compiler.compile` has raised for the step.
        step: The step.
        target: What it was compiled for.
    """
    rows = next((shape[0] for _, shape in step.given() if shape), None)
    cures: list[str] = []
    if rows is not None:
        with contextlib.suppress(TrainingCompilerError):  # a step that depends on its batch size has no smaller one
            cures += smaller_batches(step, rows, target, error.available_bytes)
        cures += variants(step, rows, rows, target, error.needed_bytes)
    return NotEnoughMemoryError(error.program, error.needed_bytes, error.available_bytes, error.buffers, cures)


def smaller_batches(step: PlannableStep, rows: int, target: Target, available_bytes: int) -> list[str]:
    """The largest half of a half of the batch that fits; nothing if four of them do not."""
    size = rows
    for _ in range(_MOST_HALVINGS):
        size //= 2
        if size == 0:
            break
        needed = _added_bytes(step, rows, size, target)
        if needed <= available_bytes:
            times = rows / size
            return [
                f"a batch of {size} in place of {rows}, accumulated {times:.3g} times: {size_of(needed)} (compiled)"
            ]
    return []


def variants(step: PlannableStep, rows: int, size: int, target: Target, needed_bytes: int) -> list[str]:
    """The step's variants that need less than it does."""
    return [
        f"{what}: {size_of(needed)} (compiled)"
        for what, needed in _compiled_variants(step, rows, size, target)
        if needed < needed_bytes
    ]


def explained(step: PlannableStep, rows: int, size: int, target: Target) -> list[str]:
    """What takes most of a batch that does not fit, and what would need less: for the end of a plan.

    Args:
        step: The step.
        rows: The script's own batch.
        size: The batch that does not fit.
        target: What it was planned for.
    """
    executable = compiler.compile(step.program_at(rows, size), target, checks_memory=False)
    buffers = largest_buffers(executable.as_text())
    less = variants(step, rows, size, target, executable.memory.added_bytes)
    return ["the largest arrays:", *(f"  {buffer}" for buffer in buffers), *(f"needs less: {cure}" for cure in less)]


def _compiled_variants(step: PlannableStep, rows: int, size: int, target: Target) -> Iterator[tuple[str, int]]:
    for what, variant in step.variants().items():
        with contextlib.suppress(TrainingCompilerError):
            yield what, _added_bytes(variant, rows, size, target)


def _added_bytes(step: PlannableStep, rows: int, size: int, target: Target) -> int:
    return compiler.compile(step.program_at(rows, size), target, checks_memory=False).memory.added_bytes
