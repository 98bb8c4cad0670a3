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
    parser.add_argument("--width", choices=("full", "narrow", "gpu"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def answer(**fields):
        peak = _peak_rss_mib() if args.device == "cpu" else _peak_gpu_mib(args.engine)
        answers.write(json.dumps({**fields, "peak_rss_mib": peak}) + "\n")
        answers.flush()

    work = models.build(args.model, args.width, args.device)
    started = time.perf_counter()
    step = ENGINES[args.engine](work, args.cache)
    step().item()
    first_step_s = time.perf_counter() - started
    loss = step().item()  # tc.compile takes the first one in torch, and compiles at the second
    answer(first_step_s=first_step_s, two_steps_s=time.perf_counter() - started, loss=loss)
    for line in sys.stdin:
        count, seconds, host_seconds = json.loads(line)["steps"], [], []
        # A GPU computes behind the loop, which reads a loss now and then: there a turn is timed as a whole.
        for together in [1] * count if args.device == "cpu" else [1, count - 1]:
            started, waited_s = time.perf_counter(), _waited_s()
            for _ in range(together):
                loss = step()
            loss = loss.item()
            seconds.append((time.perf_counter() - started) / together)
            host_seconds.append(seconds[-1] - (_waited_s() - waited_s) / together)
        answer(seconds=seconds, loss=loss, **({"host_seconds": host_seconds} if _waited_s() else {}))


def _waited_s() -> float:
    """How long our engines have waited for programs so far; the others do not tell."""
    statistics = sys.modules.get("trainingcompiler.reporting.statistics")
    return statistics.current().waited_s if statistics else 0.0


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _peak_gpu_mib(engine: str) -> float:
    """What PyTorch and XLA have taken of the GPU's memory at most; each keeps what it has had."""
    import torch

    peak = torch.cuda.max_memory_reserved()
    if engine in ("tc.compile", "tape"):
        import jax

        peak += jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return peak / 2**20


if __name__ == "__main__":
    main()
