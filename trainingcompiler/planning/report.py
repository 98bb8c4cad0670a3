"""A plan as a person reads it, a table and sentences, and as plain data."""

import dataclasses
from collections.abc import Callable

from trainingcompiler.compiling.compiler import MemoryPlan
from trainingcompiler.compiling.hlo_collectives import Collective
from trainingcompiler.compiling.memory import size_of
from trainingcompiler.planning.search import MARGIN, Plan, PlannedBatch


def described(plan: Plan) -> str:
    """The device, the table, and what to do."""
    return "\n".join([f"{plan.device} ({size_of(plan.memory_bytes)})", table(plan), *advice(plan), *plan.remarks])


def table(plan: Plan) -> str:
    """The plan as a table: memory, then the work and its bound; a mark where a batch does not fit."""
    columns = {name: [cell(plan, batch) for batch in plan.batches] for name, cell in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    widths = {name: max(map(len, (name, *cells))) for name, cells in columns.items()}
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths.values(), strict=True)) for row in rows
    )


def _of_device(plan: Plan, batch: PlannedBatch) -> str:
    share = f"{batch.memory.peak_bytes / plan.memory_bytes:.1%}"
    return share if plan.fits(batch) else f"{share} too much"


def _bound(plan: Plan, batch: PlannedBatch) -> str:
    bound_s = batch.bound_s(plan.gpu)
    return "-" if bound_s is None else f"{bound_s * 1e3:,.3f}"


def _rate(plan: Plan, batch: PlannedBatch) -> str:
    rate = plan.rows_per_s(batch)
    return "-" if rate is None else f"{rate:,.0f}"


def _sent(plan: Plan, batch: PlannedBatch) -> str:
    return size_of(sum(collective.size_bytes for collective in batch.collectives)) if batch.collectives else ""


def _eager(plan: Plan, batch: PlannedBatch) -> str:
    return "" if batch.eager_bytes is None else size_of(batch.eager_bytes)


_COLUMNS: dict[str, Callable[[Plan, PlannedBatch], str]] = {
    "batch": lambda plan, batch: str(batch.batch_size),
    "parameters": lambda plan, batch: size_of(batch.parameter_bytes),
    "optimizer": lambda plan, batch: size_of(batch.optimizer_bytes),
    "temporaries": lambda plan, batch: size_of(batch.memory.temporary_bytes),
    "total": lambda plan, batch: size_of(batch.memory.peak_bytes),
    "of device": _of_device,
    "GFLOP": lambda plan, batch: f"{batch.flops / 1e9:,.2f}",
    "moved": lambda plan, batch: size_of(batch.moved_bytes),
    "ms/step, at least": _bound,
    "rows/s, at most": _rate,
    "sent": _sent,
    "not compiled": _eager,
}


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
    eager = plan.largest_eager
    if eager is not None and above is not None:
        times = f": {largest.batch_size} is {largest.batch_size / eager:.2f} times as many" if eager else ""
        lines.append(f"without compiling, about {eager} would fit (an estimate, from two sizes){times}")
    for collective in largest.collectives:
        lines.append(f"sent in a step: {collective.count} {collective.kind}, {size_of(collective.size_bytes)}")
    return lines


def as_json(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, FLOP."""
    return {
        "device": plan.device,
        "memory_bytes": plan.memory_bytes,
        "usable_bytes": plan.usable_bytes,
        "largest": plan.largest and plan.largest.batch_size,
        "fastest": plan.fastest and plan.fastest.batch_size,
        "largest_eager": plan.largest_eager,
        "recipe": plan.recipe and dataclasses.asdict(plan.recipe),
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
    plain = {field.name: batch[field.name] for field in dataclasses.fields(PlannedBatch)}
    plain["memory"] = MemoryPlan(**batch["memory"])
    plain["collectives"] = tuple(Collective(**collective) for collective in batch["collectives"])
    return PlannedBatch(**plain)
