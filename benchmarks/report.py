"""What the benchmark prints and writes: a table, a JSON file, a figure.

A row is a dict: `model`, `engine`, `first_step_cold_s`, `first_step_warm_s`, `two_steps_cold_s`, `two_steps_warm_s`,
`ms` (median), `ms_all`, `host_ms`, `narrow_ms`, `peak_rss_mib`, `steps`, `loss`; or `model`, `engine` and `failed`.
"""

import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from trainingcompiler.targets import huge_pages

COLUMNS = {
    "engine": ("engine", "{}"),
    "first_step_cold_s": ("first step cold (s)", "{:.2f}"),
    "first_step_warm_s": ("warm (s)", "{:.2f}"),
    "two_steps_cold_s": ("two steps cold (s)", "{:.2f}"),
    "two_steps_warm_s": ("warm (s)", "{:.2f}"),
    "ms": ("ms/step", "{:.2f}"),
    "ratio": ("x eager", "{:.2f}"),
    "host_ms": ("host ms/step", "{:.2f}"),
    "narrow_ms": ("narrow twin ms/step", "{:.2f}"),
    "peak_rss_mib": ("peak RSS (MiB)", "{:.0f}"),
    "loss": ("loss", "{:.5f}"),
}
PACKAGES = ("trainingcompiler", "torch", "jax", "jaxlib", "transformers", "numpy")


def ask_for_huge_pages() -> None:
    """Starts this program again with huge pages, as the launcher would, for all contenders alike."""
    asked = huge_pages.variables(os.environ)
    if asked:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **asked})


def table(rows: list[dict]) -> str:
    """The rows of one model as a Markdown table; "x eager" is eager's milliseconds over the engine's."""
    eager_ms = next((row.get("ms") for row in rows if row["engine"] == "eager"), None)
    lines = [[title for title, _ in COLUMNS.values()]]
    for row in rows:
        ratio = eager_ms / row["ms"] if eager_ms and "ms" in row else None
        values = {**row, "ratio": ratio}
        lines.append([_cell(values.get(key), form) for key, (_, form) in COLUMNS.items()])
        if row.get("failed"):
            lines[-1][1] = "failed"
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    lines.insert(1, ["-" * width for width in widths])
    body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    steps = next((row["steps"] for row in rows if "steps" in row), 0)
    return "\n".join(["", f"{rows[0]['model']} (loss after {steps} steps)", "", *body])


def circumstances() -> dict:
    """The command, the versions and the machine, without which a number means nothing."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.system(), **_gpu()},
    }


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def circumstances_text() -> str:
    """`circumstances` in two lines."""
    facts = circumstances()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = facts["machine"]
    return (
        f"{facts['command']}\n"
        f"Python {facts['python']}, {versions}; {machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    )


def write_json(path: Path, rows: list[dict]):
    """Writes the circumstances and the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**circumstances(), "rows": rows}, indent=1) + "\n")


def write_plot(path: Path, rows: list[dict]):
    """Draws speed relative to eager, and time to two finished steps, one group of bars per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "ms" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    by_pair = {(row["model"], row["engine"]): row for row in rows}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(max(6, 1.2 * len(models)), 7), sharex=True)
    bar = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        pairs = [(m, by_pair[m, engine]) for m in models if (m, engine) in by_pair]
        places = [models.index(m) + (i - (len(engines) - 1) / 2) * bar for m, _ in pairs]
        speeds = [by_pair[m, "eager"]["ms"] / row["ms"] if (m, "eager") in by_pair else 0.0 for m, row in pairs]
        top.bar(places, speeds, bar, label=engine)
        bottom.bar(places, [row["two_steps_cold_s"] for _, row in pairs], bar)
    top.axhline(1, color="black", linewidth=0.8)
    top.set_ylabel("speed of a step, eager = 1")
    top.legend()
    bottom.set_ylabel("time to two finished steps, cold (s)")
    bottom.set_yscale("log")
    bottom.set_xticks(range(len(models)), models, rotation=45, ha="right")
    figure.suptitle(f"{circumstances()['machine']['cpu']}, {os.cpu_count()} cores", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _cell(value, form: str) -> str:
    return "-" if value is None else form.format(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
