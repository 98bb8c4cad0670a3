"""Llama of 7 and 70 billion parameters on 8 to 1,024 H200s that are not there: memory, traffic, time to compile.

    build/venv-gpu/bin/python benchmarks/scale_plan.py --write docs/scale.md     # `make gpu-plan` makes that Python
    build/venv-gpu/bin/python benchmarks/scale_plan.py --models 7b --gpus 8      # two rows, printed

Each row is one run of `python -m trainingcompiler.plan` with scale_train.py as the script, one sequence of 4,096 tokens
for each GPU. Rows are kept in build/, so that a run that was interrupted goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "build" / "scale_plan.json"
STRATEGIES = ("fsdp", "fsdp+tp=8")
GPUS = (8, 64, 256, 1024)
LIMIT_S = 1800
GIB = 2**30


def planned(model: str, gpus: int, strategy: str) -> dict:
    """Plans one row in a process of its own.

    Returns:
        The plan's only batch, and `wall_s`, `host_bytes`; or a `reason`.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        options = ["--gpu=h200", f"--gpus={gpus}", f"--strategy={strategy}", "--batch-sizes=own", "--cache-size-gb=0"]
        script = [str(HERE / "scale_train.py"), f"--model={model}", f"--batch-size={gpus}"]
        command = [sys.executable, "-m", "trainingcompiler.plan", *options, f"--json={path}", "--", *script]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
            said = run.stderr.read() if run.stderr else ""
            _, status, usage = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode or not path.exists():
            return {"reason": (said.strip().splitlines() or ["no output"])[-1][:300]}
        (batch,) = json.loads(path.read_text())["batches"]
    return {**batch, "wall_s": round(time.monotonic() - start_s), "host_bytes": usage.ru_maxrss * 1024}


def rows(models: list[str], counts: list[int]) -> dict[str, dict]:
    """Every row that is asked for, planned or kept."""
    kept: dict[str, dict] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    wanted = [f"{m} {count} {strategy}" for m in models for count in counts for strategy in STRATEGIES]
    for number, key in enumerate(wanted, 1):
        if key not in kept:
            print(f"{number} of {len(wanted)}: {key}", file=sys.stderr, flush=True)
            model, count, strategy = key.split()
            kept[key] = planned(model, int(count), strategy)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1))
    return {key: kept[key] for key in wanted}


def table(found: dict[str, dict]) -> str:
    """The rows as Markdown."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    head = ["Llama", "GPUs", "strategy", "state (GiB)", "at the peak (GiB)", "fits", *(f"{k} (GiB)" for k in kinds)]
    head += ["compile (s)", "whole plan (s)", "host memory (GiB)"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for key, row in found.items():
        model, count, strategy = key.split()
        cells = [model.upper(), f"{int(count):,}", strategy]
        if "reason" in row:
            lines.append("| " + " | ".join([*cells, row["reason"]]) + " |")
            continue
        sent = {one["kind"]: one for one in row["collectives"]}
        cells += [f"{(row['parameter_bytes'] + row['optimizer_bytes']) / GIB:.2f}", f"{row['peak_bytes'] / GIB:.1f}"]
        cells.append("yes" if row["fits"] else "no")
        cells += [f"{sent[k]['count']} x, {sent[k]['size_bytes'] / GIB:.2f}" if k in sent else "-" for k in kinds]
        cells += [f"{row['compile_time_s']:.0f}", str(row["wall_s"]), f"{row['host_bytes'] / GIB:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, dict], path: Path) -> None:
    """Memory of one GPU over their number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for model, colour in (("7b", "tab:blue"), ("70b", "tab:red")):
        for strategy, line in zip(STRATEGIES, ("-o", "--s"), strict=True):
            points = [(int(key.split()[1]), row["peak_bytes"] / GIB) for key, row in found.items()
                      if key.split()[::2] == [model, strategy] and "reason" not in row]  # fmt: skip
            axes.plot(*zip(*points, strict=True), line, color=colour, label=f"Llama {model.upper()}, {strategy}")
    axes.axhline(139.7, color="grey", linewidth=1)
    axes.annotate("an H200", (8, 145), color="grey")
    axes.set(
        xscale="log", yscale="log", xlabel="GPUs, one sequence of 4,096 tokens each", ylabel="GiB on each, planned"
    )
    axes.set_xticks(GPUS, [f"{count:,}" for count in GPUS])
    axes.legend()
    figure.savefig(path, dpi=120)


HEADER = """# At scale, without the machines

Written by `benchmarks/scale_plan.py`: the whole training step (bfloat16 autocast, blocks computed again on the way
back, clipping, AdamW with its state in float32) of `benchmarks/scale_train.py`, an ordinary script that knows nothing
of devices, compiled for described H200s. One sequence of 4,096 tokens for each GPU. Memory is of one GPU, as XLA
planned it; collectives are counted in the compiled program, with the bytes that one GPU has of each result.

Known and not mended: under `fsdp` the peak of more than 64 GPUs is larger than that of 64. XLA's schedule gathers the
weights of many layers before forward comes to them; with a fiftieth of the memory (`xla_gpu_memory_limit_slop_factor`)
7B of 12 layers on 1,024 GPUs keeps 2.4 GiB in place of 4.6. The causal mask of the whole batch, which was kept as well,
is gone: with `fsdp+tp=8` on 1,024 GPUs 16 GiB of each. 70B with `fsdp` has its peak elsewhere, and is as it was.

Other work went on on the two cores at times: times to compile are up to five times those of a quiet machine, where 70B
on 1,024 GPUs had taken 73 and 78 s. The rows of 70B on 8 and 64 GPUs, and with `fsdp+tp=8` on 256, are from before the
mask was mended, on the quiet machine; by the size of the mask, they may have up to 0.1, 1 and 4 GiB too much.

{machine}

"""


def main() -> None:
    """Plans, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="7b,70b")
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)))
    parser.add_argument("--write", type=Path, help="a Markdown file; the plot goes beside it")
    args = parser.parse_args()
    found = rows(args.models.split(","), [int(count) for count in args.gpus.split(",")])
    text = table(found)
    print(text)
    if args.write:
        from report import circumstances_text

        args.write.write_text(
            HEADER.format(machine=circumstances_text()) + text + f"\n\n![memory](./{args.write.stem}.png)\n"
        )
        plot(found, args.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
