"""Which batch fits a device, and which is the fastest: read off compiled programs, before anything runs.

Memory is what the compiled program itself reports. Time is a bound: no device can do the program's arithmetic faster
than its peak, nor move the bytes that have to be moved faster than its memory (the roofline of Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785). It says which of two batches is the better one, not how long a step takes.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trainingcompiler import compiler
from trainingcompiler.compiler import MemoryPlan
from trainingcompiler.gpus import Gpu
from trainingcompiler.program import StepProgram
from trainingcompiler.targets import Target

MARGIN = 0.1  # of the memory: the libraries' workspaces, the driver's context, fragmentation
MOST_COMPILES = 8
GIB = 2**30

_PRODUCT = re.compile(
    r"stablehlo\.(?:dot_general|convolution)\b(?P<options>[^\n]*?): \(tensor<[^>]*?(?P<dtype>bf16|f16|f32|f64)>"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """The step at one batch size, compiled for the device.

    Attributes:
        batch_size: Rows.
        parameter_bytes: Of the model, once.
        optimizer_bytes: Of the optimizer's state and of buffers.
        memory: The compiled program's own plan.
        flops: Arithmetic of one step.
        product_dtype: What most matrix products take, as `Gpu.flops` names it.
        compile_time_s: Seconds that compiling took.
    """

    batch_size: int
    parameter_bytes: int
    optimizer_bytes: int
    memory: MemoryPlan
    flops: float
    product_dtype: str
    compile_time_s: float

    @property
    def moved_bytes(self) -> int:
        """The least that a step moves: state and batch are read, state written, every temporary written and read."""
        memory = self.memory
        return memory.argument_bytes + memory.output_bytes + 2 * memory.temporary_bytes

    def bound_s(self, gpu: Gpu | None) -> float | None:
        """Seconds that a step takes at least; None for a device without a description."""
        if gpu is None:
            return None
        peak = gpu.flops.get(self.product_dtype) or gpu.flops["float32"]
        return max(self.flops / peak, self.moved_bytes / gpu.bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What has been found.

    Attributes:
        device: Its name.
        memory_bytes: All of its memory.
        gpu: Its description, if it is a described one.
        batches: By size.
    """

    device: str
    memory_bytes: int
    gpu: Gpu | None
    batches: tuple[PlannedBatch, ...]

    @property
    def usable_bytes(self) -> int:
        """The memory without the margin."""
        return int(self.memory_bytes * (1 - MARGIN))

    def fits(self, batch: PlannedBatch) -> bool:
        """Whether a batch fits, with the margin."""
        return batch.memory.peak_bytes <= self.usable_bytes

    @property
    def largest(self) -> PlannedBatch | None:
        """The largest batch that was compiled and fits."""
        return max(filter(self.fits, self.batches), key=lambda batch: batch.batch_size, default=None)

    @property
    def fastest(self) -> PlannedBatch | None:
        """The smallest batch within 2% of the most rows a second; None where no time is predicted."""
        rates = {batch: rate for batch in filter(self.fits, self.batches) if (rate := self.rows_per_s(batch))}
        most = max(rates.values(), default=0.0)
        return min((b for b, rate in rates.items() if rate > 0.98 * most), key=lambda b: b.batch_size, default=None)

    def rows_per_s(self, batch: PlannedBatch) -> float | None:
        """Rows a second, at most."""
        bound_s = batch.bound_s(self.gpu)
        return None if bound_s is None else batch.batch_size / bound_s


def planned(program: StepProgram, batch_size: int, target: Target) -> PlannedBatch:
    """Compiles a program for a target and reads its plan."""
    lowered = compiler.lowered(program)
    costs = lowered.cost_analysis()
    executable = compiler.compile(program, target)
    parameters = sum(spec.size_bytes for spec in program.state if spec.role == "parameter")
    return PlannedBatch(
        batch_size=batch_size,
        parameter_bytes=parameters,
        optimizer_bytes=sum(spec.size_bytes for spec in program.state) - parameters,
        memory=executable.memory,
        flops=float(costs.get("flops", 0.0)),
        product_dtype=product_dtype(lowered.as_text()),
        compile_time_s=executable.compile_time_s,
    )


def product_dtype(text: str) -> str:
    """What most matrix products of a StableHLO module take, as `Gpu.flops` names it."""
    counts: dict[str, int] = {}
    for found in _PRODUCT.finditer(text):
        name = {"bf16": "bfloat16", "f16": "float16"}.get(found["dtype"], "float32")
        if name == "float32" and "HIGHEST" not in found["options"]:
            name = "tf32"
        counts[name] = counts.get(name, 0) + 1
    return max(counts, key=lambda name: counts[name], default="float32")


def search(at: Callable[[int], PlannedBatch], start: int, usable_bytes: int) -> list[PlannedBatch]:
    """Finds the largest batch that fits, and shows that the next one does not.

    Every answer comes from a compiled program: what two sizes need predicts which one to compile next, and what that
    one needs decides. Memory is no straight line (near the limit XLA computes values again instead of keeping them), so
    where a prediction leaves more than half of the range, the middle is next, and where predictions go on to fit, half
    as much again. A size above 16 is a multiple of the eighth of the power of two below it.

    Args:
        at: Compiles one size.
        start: The first size.
        usable_bytes: What there is.

    Returns:
        What was compiled, by size; at most `MOST_COMPILES`. If none fits, even one row is too much.
    """
    known: dict[int, PlannedBatch] = {}

    def fits(size: int) -> bool:
        if size not in known:
            known[size] = at(size)
        return known[size].memory.peak_bytes <= usable_bytes

    low, high = (start, None) if fits(start) else (0, start)
    is_far = False
    while len(known) < MOST_COMPILES and (high is None or high > next_size(low)):
        width = low if high is None else high - low
        size = low + width // 2 if is_far else _predicted(known, low, high, usable_bytes)
        size = max(size - size % _grain(size), next_size(low))
        if high is not None and size >= high:
            size = max(next_size(low), (high - 1) - (high - 1) % _grain(high - 1))
        if fits(size):
            low = size
        else:
            high = size
        is_far = len(known) > 3 if high is None else high - low > width / 2
    return [known[size] for size in sorted(known)]


def next_size(size: int) -> int:
    """The next larger size that is looked at."""
    return size + _grain(size)


def _grain(size: int) -> int:
    return max(1, 2 ** (size.bit_length() - 4)) if size > 0 else 1


def _predicted(known: dict[int, PlannedBatch], low: int, high: int | None, usable_bytes: int) -> int:
    """Where a straight line meets the limit: between the two ends, or on from what is known so far."""

    def needed(size: int) -> int:
        return known[size].memory.peak_bytes

    if high is not None and low == 0:
        return max(1, high * usable_bytes // needed(high) if needed(high) > 0 else high // 2)
    least = min(known)
    if high is None and low == least:
        return 2 * low
    one, other = (least, low) if high is None else (low, high)
    rise = (needed(other) - needed(one)) / (other - one)
    return one + int((usable_bytes - needed(one)) / rise) if rise > 0 else 2 * other


def evaluate(
    at: Callable[[int], PlannedBatch], start: int, target: Target, memory_bytes: int, sizes: Iterable[int] = ()
) -> Plan:
    """Compiles batch sizes and puts them side by side.

    Args:
        at: Compiles one size.
        start: The script's own size.
        target: The device.
        memory_bytes: Its memory.
        sizes: Which ones; none searches for the largest that fits.
    """
    plan = Plan(device=target.description, memory_bytes=memory_bytes, gpu=target.described, batches=())
    found = [at(size) for size in sorted(set(sizes))] or search(at, start, plan.usable_bytes)
    return dataclasses.replace(plan, batches=tuple(found))


_COLUMNS = (
    "batch", "parameters", "optimizer", "temporaries", "total", "of device", "GFLOP", "moved", "ms/step, at least",
    "rows/s, at most",
)  # fmt: skip


def size_of(size_bytes: float) -> str:
    """A size as a person reads it."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes / 2**10:.1f} KiB"


def table(plan: Plan) -> str:
    """The plan as a table: memory, then the work and its bound; a mark where a batch does not fit."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for batch in plan.batches:
        memory, bound_s = batch.memory, batch.bound_s(plan.gpu)
        rows.append(
            (
                str(batch.batch_size),
                *map(
                    size_of, (batch.parameter_bytes, batch.optimizer_bytes, memory.temporary_bytes, memory.peak_bytes)
                ),
                f"{memory.peak_bytes / plan.memory_bytes:.1%}" + ("" if plan.fits(batch) else " too much"),
                f"{batch.flops / 1e9:,.2f}",
                size_of(batch.moved_bytes),
                "-" if bound_s is None else f"{bound_s * 1e3:,.3f}",
                "-" if bound_s is None else f"{batch.batch_size / bound_s:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def advice(plan: Plan) -> list[str]:
    """What to do, in sentences."""
    largest, fastest = plan.largest, plan.fastest
    usable = f"{size_of(plan.usable_bytes)}, which leaves {MARGIN:.0%} of the device free"
    if largest is None:
        smallest = plan.batches[0]
        needed = size_of(smallest.memory.peak_bytes)
        return [f"nothing fits: a batch of {smallest.batch_size} needs {needed}, and there are {usable}"]
    above = min((b for b in plan.batches if not plan.fits(b)), key=lambda batch: batch.batch_size, default=None)
    beyond = "" if above is None else f"; {above.batch_size} would need {size_of(above.memory.peak_bytes)}"
    lines = [f"largest that fits: {largest.batch_size} ({size_of(largest.memory.peak_bytes)} of {usable}{beyond})"]
    if fastest is not None:
        rate = plan.rows_per_s(fastest)
        lines.append(
            f"fastest predicted: {fastest.batch_size} (at most {rate:,.0f} rows/s; within 2% of the best here)"
        )
    return lines


def as_json(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, FLOP."""
    return {
        "device": plan.device,
        "memory_bytes": plan.memory_bytes,
        "usable_bytes": plan.usable_bytes,
        "largest": plan.largest and plan.largest.batch_size,
        "fastest": plan.fastest and plan.fastest.batch_size,
        "batches": [
            {
                **dataclasses.asdict(batch),
                "peak_bytes": batch.memory.peak_bytes,
                "fits": plan.fits(batch),
                "moved_bytes": batch.moved_bytes,
                "bound_s": batch.bound_s(plan.gpu),
            }
            for batch in plan.batches
        ],
    }


def from_json(batch: dict) -> PlannedBatch:
    """A batch as `as_json` has written it."""
    names = {field.name for field in dataclasses.fields(PlannedBatch)}
    return PlannedBatch(**{name: batch[name] for name in names - {"memory"}}, memory=MemoryPlan(**batch["memory"]))
