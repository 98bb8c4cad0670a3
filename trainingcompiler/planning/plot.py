"""A plan as a figure: memory over the batch, and the bound on rows a second where there is one."""

from pathlib import Path

from trainingcompiler.errors import UsageError
from trainingcompiler.planning.search import Plan

GIB = 2**30


def check() -> None:
    """Raises a `UsageError` where the figure could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None


def save(plan: Plan, path: Path) -> None:
    """Draws a plan into a file; its suffix says which format."""
    from matplotlib.figure import Figure

    sizes = [batch.batch_size for batch in plan.batches]
    figure = Figure(figsize=(7, 4))
    memory = figure.subplots()
    memory.plot(sizes, [batch.memory.peak_bytes / GIB for batch in plan.batches], "o-", label="total")
    memory.plot(sizes, [batch.memory.temporary_bytes / GIB for batch in plan.batches], "o--", label="temporaries")
    memory.axhline(plan.usable_bytes / GIB, color="black", linewidth=0.8, label="usable")
    memory.set_xlabel("batch size")
    memory.set_ylabel("GiB")
    rates = [rate for batch in plan.batches if (rate := plan.rows_per_s(batch)) is not None]
    if rates:
        speed = memory.twinx()
        speed.plot(sizes, rates, "s:", color="tab:green", label="rows/s, at most")
        speed.set_ylabel("rows/s, at most")
    figure.suptitle(plan.device, fontsize=9)
    figure.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.12, 0.88))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
