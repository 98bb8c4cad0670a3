"""One model under one engine, in a process of its own: runs steps when told to, and reports their seconds.

Speaks JSON lines: commands arrive on standard input, answers leave on what standard output was at the start.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import models
from engines import ENGINES


def main():
    """Take the first two steps, report them, then serve `{"steps": n}` until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=models.ENTRIES)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--narrow", action="store_true")
    args = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def answer(**fields):
        answers.write(json.dumps({**fields, "peak_rss_mib": _peak_rss_mib()}) + "\n")
        answers.flush()

    work = models.build(args.model, narrow=args.narrow)
    started = time.perf_counter()
    step = ENGINES[args.engine](work, args.cache)
    step()
    first_step_s = time.perf_counter() - started
    loss = step()  # tc.compile takes the first one in torch, and compiles at the second
    answer(first_step_s=first_step_s, two_steps_s=time.perf_counter() - started, loss=loss)
    for line in sys.stdin:
        seconds = []
        for _ in range(json.loads(line)["steps"]):
            started = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - started)
        answer(seconds=seconds, loss=loss)


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


if __name__ == "__main__":
    main()
