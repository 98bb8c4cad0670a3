"""Which batch fits a device, and which is the fastest: read off compiled programs, before anything runs.

Memory is what the compiled program itself reports. Time is a bound: no device can do the program's arithmetic faster
than its peak, nor move the bytes that have to be moved faster than its memory (the roofline of Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785). It says which of two batches is the better one, not how long a step takes.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainingcompiler.compiling import compiler
from trainingcompiler.compiling.compiler import MemoryPlan
from trainingcompiler.compiling.hlo_collectives import Collective, collectives
from trainingcompiler.parallel.sharding import bytes_per_device
from trainingcompiler.planning.batch_scaling import Recipe
from trainingcompiler.program import StepProgram
from trainingcompiler.targets.gpus import Gpu
from trainingcompiler.targets.target import Target

MARGIN = 0.1  # of the memory: the libraries' workspaces, the driver's context, fragmentation
MOST_COMPILES = 8

_PRODUCT = re.compile(
    r"stablehlo\.(?:dot_general|convolution)\b(?P<options>[^\n]*?): \(tensor<[^>]*?(?P<dtype>bf16|f16|f32|f64)>"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """The step at one batch size, compiled for the device.

    Attributes:
        batch_size: Rows, of all devices together.
        parameter_bytes: Of the model, on one device.
        optimizer_bytes: Of the optimizer's state, of buffers and, on one CPU, of the gradients that a script may read
            after its step, likewise.
        memory: The compiled program's own plan, of one device.
        flops: Arithmetic of one step on one device.
        product_dtype: What most matrix products take, as `Gpu.flops` names it.
        compile_time_s: Seconds that compiling took.
        collectives: What the devices send each other.
        eager_bytes: What the same step needs in the framework itself on one device, an estimate; None where nobody
            can tell.
    """

    batch_size: int
    parameter_bytes: int
    optimizer_bytes: int
    memory: MemoryPlan
    flops: float
    product_dtype: str
    compile_time_s: float
    collectives: tuple[Collective, ...] = ()
    eager_bytes: int | None = None

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
        device: Its name, or that of all of them.
        memory_bytes: All of the memory of one.
        gpu: Its description, if it is a described one.
        batches: By size.
        recipe: What of the script's run depends on its batch size, as far as its first step tells.
        remarks: What else there is to say, a line each.
    """

    device: str
    memory_bytes: int
    gpu: Gpu | None
    batches: tuple[PlannedBatch, ...]
    recipe: Recipe | None = None
    remarks: tuple[str, ...] = ()

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

    @property
    def largest_eager(self) -> int | None:
        """The largest batch for which the framework itself would have memory: an estimate.

        What it holds grows in a straight line, row by row: nothing is computed again, and nothing is fused.
        """
        known = [batch for batch in self.batches if batch.eager_bytes is not None]
        if len(known) < 2:
            return None
        one, other = known[0], known[-1]
        assert one.eager_bytes is not None and other.eager_bytes is not None
        row_bytes = (other.eager_bytes - one.eager_bytes) / (other.batch_size - one.batch_size)
        fixed_bytes = one.eager_bytes - row_bytes * one.batch_size
        return max(0, int((self.usable_bytes - fixed_bytes) // row_bytes)) if row_bytes > 0 else None

    def rows_per_s(self, batch: PlannedBatch) -> float | None:
        """Rows a second, at most."""
        bound_s = batch.bound_s(self.gpu)
        return None if bound_s is None else batch.batch_size / bound_s


def planned(program: StepProgram, batch_size: int, target: Target, eager_bytes: int | None = None) -> PlannedBatch:
    """Compiles a program for a target and reads its plan."""
    lowered = compiler.lowered(program)
    costs = lowered.cost_analysis()
    executable = compiler.compile(program, target, checks_memory=False)
    devices, strategy = target.device_count, target.strategy
    parameters = [spec for spec in program.state if spec.role == "parameter"]
    parameter_bytes = bytes_per_device(parameters, devices, strategy)
    return PlannedBatch(
        batch_size=batch_size,
        parameter_bytes=parameter_bytes,
        optimizer_bytes=bytes_per_device(program.state, devices, strategy) - parameter_bytes,
        memory=executable.memory,
        flops=float(costs.get("flops", 0.0)) / devices,
        product_dtype=product_dtype(lowered.as_text()),
        compile_time_s=executable.compile_time_s,
        collectives=collectives(executable.as_text(), devices) if devices > 1 else (),
        eager_bytes=eager_bytes,
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


def bisect(at: Callable[[int], PlannedBatch], sizes: Sequence[int], usable_bytes: int) -> list[PlannedBatch]:
    """Finds the largest of some sizes that fits, and shows that the next one does not.

    Args:
        at: Compiles one size.
        sizes: Which there are, the smallest first.
        usable_bytes: What there is.

    Returns:
        What was compiled, by size.
    """
    known: dict[int, PlannedBatch] = {}
    low, high = -1, len(sizes)
    place = high - 1  # most often all of them fit
    while low < high - 1:
        known[sizes[place]] = batch = at(sizes[place])
        low, high = (place, high) if batch.memory.peak_bytes <= usable_bytes else (low, place)
        place = (low + high) // 2
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
    at: Callable[[int], PlannedBatch],
    start: int,
    target: Target,
    sizes: Sequence[int] = (),
    *,
    recipe: Recipe | None = None,
    bisects: bool = False,
    at_all: Callable[[Sequence[int]], list[PlannedBatch]] | None = None,
) -> Plan:
    """Compiles batch sizes and puts them side by side.

    Args:
        at: Compiles one size: rows of all devices together.
        start: The script's own size.
        target: The devices.
        sizes: Which ones; none searches for the largest that fits, among those that the devices divide.
        recipe: What else is known of the run.
        bisects: Whether to search among `sizes`, instead of compiling all of them.
        at_all: Compiles several sizes that are known beforehand, at once if it can; None takes `at` for each.
    """
    plan = Plan(
        device=target.description, memory_bytes=target.memory_bytes, gpu=target.described, batches=(), recipe=recipe
    )
    devices = target.device_count
    if bisects:
        found = bisect(at, sorted(set(sizes)), plan.usable_bytes)
    elif sizes:
        known = sorted(set(sizes))
        found = at_all(known) if at_all is not None else [at(size) for size in known]
    else:
        found = search(lambda rows: at(rows * devices), max(1, start // devices), plan.usable_bytes)
    return dataclasses.replace(plan, batches=tuple(found))
