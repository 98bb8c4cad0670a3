"""The original's table of tested models, redone: the largest batch that a plan finds, next to Amazon's two.

    build/venv-gpu/bin/python benchmarks/tested_models.py --write docs/tested_models.md     # `make gpu-plan` makes it
    build/venv-gpu/bin/python benchmarks/tested_models.py --gpus t4 --models gpt2           # a row, printed

Every row of tested_models.csv is planned by `python -m trainingcompiler.plan` for a GPU that is not there, with
tested_models_train.py as the script. Plans are kept in build/, so that a run that was interrupted goes on.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tested_models_report

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "build" / "tested_models.json"
GPUS = {
    "g4dn.16xlarge": "t4",
    "g5.4xlarge": "a10g",
    "g5.48xlarge": "a10g",
    "p3.2xlarge": "v100",
    "p4d.24xlarge": "a100-40",
}
LIMIT_S = 1200
START = 1.25  # the search begins at Amazon's compiler's batch times that: fewer compiles than from a small one


def rows() -> list[dict]:
    """Amazon's rows: `model`, `dataset`, `instance`, `gpu`, `length`, and the batches `native` and `compiler`."""
    lines = (HERE / "tested_models.csv").read_text().splitlines()
    found = csv.DictReader(line for line in lines if not line.startswith("#"))
    numbers = ("length", "native", "compiler")
    return [{**row, **{name: int(row[name]) for name in numbers}, "gpu": GPUS[row["instance"]]} for row in found]


def key(row: dict) -> str:
    """What a row's plan is kept under."""
    return f"{row['model']} {row['gpu']} {row['length']}"


def arguments(row: dict) -> list[str]:
    """The training script's options for a row.

    Of xsum, 128 can only be the length of the summaries: with articles as short, several times Amazon's batches would
    fit. The articles get the 1,024 tokens that are the default of transformers' example script.
    """
    length = str(row["length"])
    lengths = ["--length", "1024", "--target-length", length] if row["dataset"] == "xsum" else ["--length", length]
    return ["--model", row["model"], *lengths, "--batch-size", str(max(1, round(START * row["compiler"])))]


def planned(row: dict) -> dict:
    """Plans one row in a process of its own.

    Returns:
        `largest`, `largest_eager` and `batches`, which maps a compiled size to its bytes; or a `reason`. And `wall_s`.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "trainingcompiler.plan", "--gpu", row["gpu"], "--json", str(path)]
        script = [str(HERE / "tested_models_train.py"), *arguments(row)]
        try:
            run = subprocess.run([*command, *script], capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"reason": f"not finished after {LIMIT_S} s", "wall_s": LIMIT_S}
        wall_s = round(time.monotonic() - start_s)
        if run.returncode or not path.exists():
            last = (run.stderr.strip().splitlines() or ["no output"])[-1]
            return {"reason": last.removeprefix("trainingcompiler.plan: ")[:300], "wall_s": wall_s}
        plan = json.loads(path.read_text())
    return {
        "largest": plan["largest"],
        "largest_eager": plan["largest_eager"],
        "usable_bytes": plan["usable_bytes"],
        "batches": {batch["batch_size"]: batch["peak_bytes"] for batch in plan["batches"]},
        "eager": {batch["batch_size"]: batch["eager_bytes"] for batch in plan["batches"]},
        "wall_s": wall_s,
    }


def main() -> None:
    """Plans what has no plan yet, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", help=f"comma-separated: {','.join(dict.fromkeys(GPUS.values()))}; all if not given")
    parser.add_argument("--models", help="comma-separated, as in tested_models.csv; all if not given")
    parser.add_argument("--write", type=Path, help="the page to write; the plot is written beside it")
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for row in rows():
        if args.gpus and row["gpu"] not in args.gpus.split(","):
            continue
        if args.models and row["model"] not in args.models.split(","):
            continue
        if not kept.get(key(row), {}).get("largest"):
            kept[key(row)] = json.loads(json.dumps(planned(row)))
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1))
        print(key(row), kept[key(row)], flush=True)
    if args.write:
        found = [{**row, **kept.get(key(row), {})} for row in rows()]
        args.write.write_text(tested_models_report.page(found))
        tested_models_report.write_plot(args.write.with_suffix(".png"), found)


if __name__ == "__main__":
    main()
