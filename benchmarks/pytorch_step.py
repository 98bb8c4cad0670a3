"""Compare engines on whole training steps, side by side in one run.

    python benchmarks/pytorch_step.py --quick                          # a look: three small models, few rounds
    python benchmarks/pytorch_step.py --models gpt2-small              # one model, all engines
    python benchmarks/pytorch_step.py --json out.json --plot out.png   # everything (hours on two cores)
    python benchmarks/pytorch_step.py --device cuda --quick            # six models on a GPU, in bfloat16
    python benchmarks/pytorch_step.py --engines tape --before ../old   # beside another checkout of this project

Every model runs under every engine in a process of its own: once with empty caches, for the cold time to the first
step, and once more with the caches that the first one left. The second processes of all engines then stay alive and
take turns, a few steps each, in an order that rotates from round to round, so that a machine that slows down slows all.
benchmarks/README.md says what each column means.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import report
from engines import BEFORE, ENGINES
from models import ENTRIES
from surroundings import environment, touch_memory

HERE = Path(__file__).resolve().parent
QUICK_MODELS = ("mlp", "vae", "gpt2")
JAX_MODELS = ("gpt2", "gpt2-small")
TURN_SECONDS = 1.0
MAX_TURN_STEPS = 50


class WorkerFailed(Exception):
    """A worker ended before it answered; its error stands above, on standard error."""


class Worker:
    """A process that runs one model under one engine; see worker.py."""

    def __init__(self, model: str, engine: str, caches: Path, width: str, device: str, before: Path | None = None):
        command = [sys.executable, str(HERE / "worker.py"), model, engine, "--cache", str(caches / "executables")]
        variables = environment(TORCHINDUCTOR_CACHE_DIR=str(caches / "inductor"), XDG_CACHE_HOME=str(caches / "home"))
        if engine == BEFORE:
            variables = {**variables, "PYTHONPATH": str(before)}
        if device == "cpu":
            touch_memory()
        self.process = subprocess.Popen(
            [*command, "--width", width, "--device", device],
            env=variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.first = self._answer()

    def run(self, steps: int) -> dict:
        """Runs steps.

        Returns:
            Their `seconds`, for ours their `host_seconds`, the last `loss`, and the `peak_rss_mib` so far.
        """
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise WorkerFailed
        return json.loads(line)


def measure(
    model: str,
    engines: list[str],
    rounds: int,
    with_narrow: bool,
    device: str,
    with_warm: bool = True,
    before: Path | None = None,
) -> list[dict]:
    """Measures one model under all engines.

    Args:
        model: A name of `models.ENTRIES`.
        engines: Names of `engines.ENGINES`.
        rounds: How often the engines take turns.
        device: "cpu", or "cuda": wider models, in bfloat16.
        with_narrow: Also time the narrow twin, whose step is mostly the host's work.
        with_warm: Also time a second start, with the caches of the first.
        before: The checkout that the engine `before` is of.

    Returns:
        One row per engine, as report.py describes it; an engine that failed has only a `failed` mark.
    """
    width = "full" if device == "cpu" else "gpu"
    rows = {engine: {"model": model, "engine": engine} for engine in engines}
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine, row in rows.items():
            caches = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _say(f"{model} / {engine}: cold, then warm start")
            try:
                cold = Worker(model, engine, caches, width, device, before)
                warm = None
                if with_warm:
                    cold.close()
                    warm = Worker(model, engine, caches, width, device, before)
                workers[engine] = stack.enter_context(contextlib.closing(warm or cold))
            except WorkerFailed:
                row["failed"] = True
                continue
            for name in ("first_step", "two_steps"):
                row[f"{name}_cold_s"] = cold.first[f"{name}_s"]
                if warm is not None:
                    row[f"{name}_warm_s"] = warm.first[f"{name}_s"]
            row["peak_rss_mib"] = cold.first["peak_rss_mib"]
        for engine, result in take_turns(workers, rounds).items():
            if "failed" in result:
                rows[engine] = {"model": model, "engine": engine, "failed": True}
                continue
            peak = max(rows[engine]["peak_rss_mib"], result["peak_rss_mib"])
            rows[engine] |= {**result, "peak_rss_mib": peak}
    if with_narrow:
        for engine, result in narrow_twin(
            model, [e for e in engines if "ms" in rows[e]], rounds, device, before
        ).items():
            rows[engine]["narrow_ms"] = result.get("ms")
    return list(rows.values())


def take_turns(workers: dict[str, Worker], rounds: int) -> dict[str, dict]:
    """Lets the workers run steps in turn, each the same number.

    Args:
        workers: By engine; those that fail are taken out.
        rounds: How often each has its turn.

    Returns:
        Per engine `ms`, `ms_all`, for ours `host_ms`, `steps`, `loss` and `peak_rss_mib`, or `failed`.
    """
    results: dict[str, dict] = {engine: {"steps": 1, "ms_all": []} for engine in workers}
    host_ms: dict[str, list[float]] = {engine: [] for engine in workers}

    def run(engine: str, steps: int) -> dict:
        try:
            answer = workers[engine].run(steps)
        except WorkerFailed:
            del workers[engine]
            results[engine] = {"failed": True}
            return {"seconds": []}
        results[engine]["steps"] += steps
        results[engine] |= {"loss": answer["loss"], "peak_rss_mib": answer["peak_rss_mib"]}
        return answer

    slowest_s = max((min(run(engine, 2)["seconds"], default=0.0) for engine in list(workers)), default=0.0)
    steps = max(1, min(MAX_TURN_STEPS, round(TURN_SECONDS / max(slowest_s, 1e-9))))
    for turn in range(rounds):
        _say(f"round {turn + 1} of {rounds}, {steps} steps each")
        engines = list(workers)
        shift = turn % max(1, len(engines))
        for engine in engines[shift:] + engines[:shift]:
            # The first step of a turn is not timed: a machine may have lent idle memory to others meanwhile.
            answer = run(engine, 1 + steps)
            results[engine].setdefault("ms_all", []).extend(1e3 * s for s in answer["seconds"][1:])
            host_ms[engine] += (1e3 * s for s in answer.get("host_seconds", ())[1:])
    for engine in workers:
        results[engine]["ms"] = statistics.median(results[engine]["ms_all"])
        if host_ms[engine]:
            results[engine]["host_ms"] = statistics.median(host_ms[engine])
    return results


def narrow_twin(
    model: str, engines: list[str], rounds: int, device: str, before: Path | None = None
) -> dict[str, dict]:
    """Times the narrow twin of a model, whose step is mostly the host's work, as `take_turns` returns it."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine in engines:
            _say(f"{model} / {engine}: narrow twin")
            caches = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with contextlib.suppress(WorkerFailed):
                worker = Worker(model, engine, caches, "narrow", device, before)
                workers[engine] = stack.enter_context(contextlib.closing(worker))
        return take_turns(workers, rounds)


def names_of(known):
    """An argparse type: a comma-separated list of known names, or "all"."""

    def parse(text: str) -> list[str]:
        names = list(known) if text == "all" else text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(known)}")
        return names

    return parse


def parse_args() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: wider models, in bfloat16")
    parser.add_argument("--models", type=names_of(ENTRIES), help=f"all, or some of {','.join(ENTRIES)}")
    engines = [engine for engine in ENGINES if engine != BEFORE]
    parser.add_argument("--engines", type=names_of(engines), default=engines, help=f"of {','.join(engines)}")
    parser.add_argument("--before", type=Path, help="another checkout of this project, whose tape takes turns too")
    parser.add_argument("--rounds", type=int, help="turns per engine (10; 3 with --quick)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    parser.add_argument("--cold-only", action="store_true", help="one start for each engine, with empty caches")
    parser.add_argument("--quick", action="store_true", help=f"few rounds, no narrow twin; {','.join(QUICK_MODELS)}")
    args = parser.parse_args()
    with_width = [name for name, entry in ENTRIES.items() if args.device == "cpu" or entry.gpu is not None]
    args.models = args.models or list(QUICK_MODELS if args.quick and args.device == "cpu" else with_width)
    if args.before is not None:
        if not (args.before / "trainingcompiler" / "frameworks").is_dir():
            parser.error(
                f"--before {args.before}: there is no trainingcompiler/frameworks in it; give a whole checkout"
            )
        args.before = args.before.resolve()
        args.engines = [*args.engines, BEFORE]
    args.rounds = args.rounds or (3 if args.quick else 10)
    return args


def main():
    """Measure, print the table, write the files."""
    args = parse_args()
    rows = []
    for model in args.models:
        by_hand = model in JAX_MODELS and args.device == "cpu"
        engines = [engine for engine in args.engines if engine != "jax" or by_hand]
        rows += measure(model, engines, args.rounds, not args.quick, args.device, not args.cold_only, args.before)
        print(report.table([row for row in rows if row["model"] == model]), flush=True)
        if args.json:  # after every model: a run of hours that is interrupted keeps what it has
            report.write_json(args.json, rows)
    print("\n" + report.circumstances_text())
    if args.plot:
        report.write_plot(args.plot, rows)
    sys.exit(any(row.get("failed", False) for row in rows))


def _say(text: str):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
