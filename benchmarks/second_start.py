"""How long a script takes to its first finished step: the first time, the second time, and without us.

    python benchmarks/second_start.py --models gpt2,mlp --rounds 3 --json out.json

The script is ordinary and is run by `python -m trainingcompiler.launch --engine=xla`, with an empty cache and then with
the one that this left, and by `python`. Two times of each: from the start of the process, which includes importing the
framework and making the model, and from the start of the training loop. benchmarks/README.md says more.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import ENTRIES
from report import circumstances, circumstances_text
from surroundings import environment, touch_memory

SCRIPT = Path(__file__).resolve().parent / "second_start_train.py"
LAUNCHER = ("-m", "trainingcompiler.launch", "--engine=xla")
STARTS = ("first", "second", "eager")


def start(model: str, cache: str | None) -> dict[str, float]:
    """Starts the script once.

    Args:
        model: A name of `models.ENTRIES`.
        cache: The folder of executables for our launcher; None starts the script without it.

    Returns:
        Seconds from the start of the process (`process_s`) and of the loop (`loop_s`) to the first finished step, or to
        the second where the first ran in torch (`by_torch`), and what getting programs ready took (`ready_s`).
    """
    with tempfile.TemporaryDirectory() as folder:
        out, record = Path(folder) / "moments.json", Path(folder) / "record.json"
        launcher = [] if cache is None else [*LAUNCHER, "--cache-dir", cache, "--record", str(record)]
        touch_memory()
        begun = time.time()
        command = [sys.executable, *launcher, str(SCRIPT), "--model", model, "--out", str(out)]
        subprocess.run(command, check=True, env=environment(), stderr=subprocess.DEVNULL)
        loop, *ends = json.loads(out.read_text())
        run = json.loads(record.read_text())["run"] if launcher else {"eager_steps": 0, "compile_time_s": 0.0}
    by_torch = run["eager_steps"]
    end = ends[by_torch]
    return {
        "process_s": end - begun,
        "loop_s": end - loop,
        "ready_s": run["compile_time_s"],
        "by_torch": by_torch,
    }


def measure(model: str, rounds: int) -> dict:
    """Starts a model's script in all ways, several times in turn; each figure is the median."""
    found: dict[str, list[dict]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in STARTS:
                found[name].append(start(model, None if name == "eager" else cache))
    row: dict = {"model": model}
    for name, starts in found.items():
        row[name] = {key: statistics.median(each[key] for each in starts) for key in starts[0]}
    return row


def table(rows: list[dict]) -> str:
    """The measurements in Markdown: seconds of the first start, the second, and eager's."""
    lines = [
        "| model | program ready (s) | second / first | loop to first step (s) | second / first | eager "
        "| process to first step (s) | eager |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        first, second, eager = (row[name] for name in STARTS)
        mark = "\\*" if first["by_torch"] else ""
        lines.append(
            f"| {row['model']}{mark} | {first['ready_s']:.2f}, {second['ready_s']:.2f} "
            f"| {second['ready_s'] / first['ready_s']:.2f} | {first['loop_s']:.2f}, {second['loop_s']:.2f} "
            f"| {second['loop_s'] / first['loop_s']:.2f} | {eager['loop_s']:.2f} "
            f"| {first['process_s']:.2f}, {second['process_s']:.2f} | {eager['process_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(ENTRIES), help="comma-separated names of models.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for model in args.models.split(","):
        rows.append(measure(model, args.rounds))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows), circumstances_text(), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps({**circumstances(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
