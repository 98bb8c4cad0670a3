"""An ordinary training script that times its own first step: what `second_start.py` runs, with and without us."""

import argparse
import json
import time
from pathlib import Path

import models


def main() -> None:
    """Makes a model of the benchmark, takes a step, and writes when the loop began and when the step was finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=models.ENTRIES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    work = models.build(args.model)
    moments = [time.time()]
    for _ in range(2):
        work.optimizer.zero_grad()
        loss = work.loss(work.model, *work.batch)
        loss.backward()
        work.optimizer.step()
        loss.item()
        moments.append(time.time())
    args.out.write_text(json.dumps(moments))


if __name__ == "__main__":
    main()
