"""Two workers on one machine: an ordinary DDP script under torchrun, and under our launcher, in turns.

    python benchmarks/workers.py                                   # a GPT and a multilayer perceptron, 5 turns each
    python benchmarks/workers.py --models mlp --turns 1

Each turn is a whole run of workers_train.py with both; the script times its own steps, and the slowest rank counts. The
work, the global batch and the number of threads are the same. A single run's figure moves by 10% on two shared cores,
so the table has the median of the turns' ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
PLAIN = ["-m", "torch.distributed.run", "--standalone"]
OURS = ["-m", "trainingcompiler.launch", "--quiet"]
DIVIDED = [*OURS, "--strategy=fsdp"]
WORKERS = 2


def rows_per_s(starter: list[str], model: str) -> float:
    """The throughput of one run, of all workers together."""
    with tempfile.TemporaryDirectory() as folder:
        script = [str(HERE / "workers_train.py"), "--model", model, "--out", folder]
        command = [sys.executable, *starter, f"--nproc-per-node={WORKERS}", *script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        times_s = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    assert len(times_s) == WORKERS
    return min(found["rows"] / found["median_step_s"] for found in times_s) * WORKERS


def main() -> None:
    """Runs, prints a table, and writes the numbers if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt,mlp")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    print("| model | torchrun, DDP with gloo (rows/s) | compiled | ratio | compiled, `--strategy fsdp` | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in args.models.split(","):
        for starter in (OURS, DIVIDED):  # fills the cache: what is compared is training
            rows_per_s(starter, model)
        turns = [[rows_per_s(starter, model) for starter in (PLAIN, OURS, DIVIDED)] for _ in range(args.turns)]
        plain, ours, divided = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = [statistics.median(turn[index] / turn[0] for turn in turns) for index in (1, 2)]
        found.append(
            {
                "model": model,
                "torchrun_rows_per_s": plain,
                "compiled_rows_per_s": ours,
                "ratio": ratios[0],
                "divided_rows_per_s": divided,
                "divided_ratio": ratios[1],
            }
        )
        print(
            f"| {model} | {plain:,.0f} | {ours:,.0f} | {ratios[0]:.2f} | {divided:,.0f} | {ratios[1]:.2f} |", flush=True
        )
    print(f"\n{report.circumstances_text()}; {WORKERS} workers, {args.turns} turns")
    if args.json:
        args.json.write_text(json.dumps({"circumstances": report.circumstances(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
