"""Train examples/pytorch/char_gpt.py twice, compiled and eager, one after the other, and compare.

    make demo

The script is the same and knows nothing of it: once it is run by `python -m trainingcompiler.launch`, once by `python`.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "pytorch" / "char_gpt.py"
LAUNCHERS = {"compiled": ["-m", "trainingcompiler.launch"], "eager": []}
FINAL = re.compile(r"^final: val_loss=([\d.]+) ms/step=([\d.]+)$", re.MULTILINE)


def train(launcher: list[str], steps: int) -> tuple[float, float, float]:
    """Runs the example, echoing what it prints.

    Returns:
        Seconds from the start of the process to its end, the median milliseconds of a step, the final loss.
    """
    command = [sys.executable, *launcher, str(SCRIPT), "--steps", str(steps)]
    print("\n$ python " + " ".join([*launcher, f"examples/pytorch/{SCRIPT.name}", *command[-2:]]), flush=True)
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(process.returncode)  # its error stands above
    loss, ms = FINAL.search("".join(lines)).groups()
    return seconds, float(ms), float(loss)


def main():
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)  # or the first of the two would read it off disk
    results = {name: train(launcher, args.steps) for name, launcher in LAUNCHERS.items()}
    print(f"\n{'':10}{'whole run (s)':>15}{'ms/step (median)':>20}{'final val loss':>18}")
    for name, (seconds, ms, loss) in results.items():
        print(f"{name:10}{seconds:15.1f}{ms:20.1f}{loss:18.4f}")
    (compiled_s, compiled_ms, compiled_loss), (eager_s, eager_ms, eager_loss) = results.values()
    print(
        f"\ncompiled against eager: a step {eager_ms / compiled_ms:.2f}x as fast; the whole run, compiling included, "
        f"{eager_s / compiled_s:.2f}x as fast;\nlosses {abs(compiled_loss - eager_loss):.4f} apart. "
        f"One run each of {args.steps} steps: on a busy machine, repeat it."
    )


if __name__ == "__main__":
    main()
