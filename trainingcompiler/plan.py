"""`python -m trainingcompiler.plan [--gpu NAME] script.py [script args]`: which batch fits, and which is fastest.

Runs the script up to its first training step, takes no step, and compiles that step for the device at several batch
sizes. A described GPU need not be there.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainingcompiler.cli import run_until
from trainingcompiler.cli import script_options as options
from trainingcompiler.cli.parser import (
    CONFIGURING,
    GENERAL,
    Command,
    CommandLine,
    Option,
    flags_of,
    parse,
    target_of,
    with_option,
)
from trainingcompiler.config import resolve, to_environment
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.files import write_json
from trainingcompiler.planning import first_step, planner
from trainingcompiler.planning.batch_scaling import Recipe, keep_global_sizes
from trainingcompiler.planning.recommendation import recipe_from_json
from trainingcompiler.strategy import Strategy
from trainingcompiler.targets.gpus import GPUS, gpu

BAD_INPUT = 2
_MODES = ("auto", "own", "keep-global")

PLAN = Command(
    "trainingcompiler.plan",
    "Runs the script up to its first training step, takes none, and compiles the step for a device at several batch\n"
    "sizes: memory, arithmetic, a bound on the time, the largest batch that fits and the fastest.",
    {
        "--gpu": Option(
            "local|NAME|FILE.json",
            f"this machine's device, a described one ({', '.join(GPUS)}), or one that you describe",
        ),
        "--gpus": Option("N", "so many of them, which run one program together; a batch is divided between them"),
        "--strategy": Option(
            "fsdp|dp|tp=K|fsdp+tp=K",
            "how several share it: the state divided (fsdp) or copied (dp), each layer between K of them (tp)",
        ),
        "--batch-sizes": Option(
            "auto|own|keep-global|8,16,...",
            "search for the largest that fits (auto), only the script's own, those that the global batch is a "
            "multiple of, or these",
        ),
        "--script-batch-size": Option("N", "the script's batch size, where its tensors disagree: N rows are scaled"),
        "--batch-size-arg": Option("--NAME", "the script's own option for it: the script is run again for every size"),
        "--fill-weights": Option("", "let the script fill its model's weights, which takes their memory"),
        "--json": Option("FILE", "write the plan there as well"),
        "--plot": Option("FILE", "draw it: memory, and rows a second, over the batch"),
        **CONFIGURING,
        **GENERAL,
    },
    "Exit code 0: planned. 2: there was nothing to plan, or the script failed.",
)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the command line asks for."""

    gpu: str
    gpus: int
    strategy: Strategy
    mode: str
    sizes: tuple[int, ...]
    script_batch_size: int | None
    batch_size_arg: str | None
    fills_weights: bool
    json: Path | None
    plot: Path | None
    line: CommandLine
    flags: dict[str, object]

    def target(self) -> Any:
        """The devices to compile for."""
        from trainingcompiler.targets.target import Target

        return Target.local() if self.gpu == "local" else Target.gpu(self.gpu, self.gpus, self.strategy)

    def chosen(self, own: int, recipe: Recipe | None) -> dict[str, Any]:
        """What `planning.evaluate` is to compile."""
        sizes = {"auto": (), "own": (own,), "keep-global": ()}.get(self.mode, self.sizes)
        bisects = self.mode == "keep-global"
        if bisects and recipe is None:
            raise UsageError("--batch-sizes=keep-global needs the script's optimizer, which nothing tells")
        if recipe is not None and bisects:
            sizes = tuple(keep_global_sizes(recipe))
        _check_divides(sizes, self.gpus // self.strategy.tensor_parallel)
        return {"sizes": sizes, "bisects": bisects, "recipe": recipe}


def main(words: Sequence[str] | None = None) -> None:
    """Plans the script named on the command line."""
    try:
        line = parse(sys.argv[1:] if words is None else words, PLAN)
        if "--help" in line.given:
            sys.stdout.write(PLAN.usage() + "\n")
            sys.exit(0)
        request = _request(line)
        plan, script_tells = _by_runs(request) if request.batch_size_arg else _in_this_process(request)
    except (TrainingCompilerError, ValueError) as error:
        sys.stderr.write(f"{PLAN.name}: {error}\n")
        sys.exit(BAD_INPUT)
    from trainingcompiler.planning import report

    script = os.path.basename(request.line.target or "")
    sys.stdout.write(f"{script} on {report.described(plan)}\n")
    if request.json is not None:
        write_json(request.json, {**report.as_json(plan), **script_tells})
    if request.plot is not None:
        _plotting().save(plan, request.plot)


def _in_this_process(request: _Request) -> tuple[Any, dict[str, Any]]:
    """Runs the script once, and captures its step again for every size; returns the plan, and what the script tells."""
    if request.gpu != "local":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for a driver
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA complains of every batch that is too large
    os.environ.update(to_environment({**request.flags, "enabled": True, "engine": "xla"}))
    from trainingcompiler.planning import memory_advice, search
    from trainingcompiler.planning.store import PlanStore

    target = request.target()
    target.devices()  # what is not installed is said before anything is run
    waiting = planner.current = planner.Planner(request.script_batch_size, request.fills_weights, gpu=target.described)
    with waiting.surroundings, options.watched() as values:
        failure = run_until.run(request.line, waiting.Enough)
    planner.current = None
    if failure is not None:
        raise UsageError(f"the script failed before its first training step ({type(failure).__name__}: {failure})")
    own = waiting.rows()
    recipe = waiting.recipe()
    store = PlanStore.of(resolve(request.flags, os.environ).config)

    def compiled(size: int, program: Any, eager_bytes: int | None) -> Any:
        found = store.load(program, target)
        if found is None:
            found = search.planned(program, size, target, eager_bytes)
            store.save(program, target, found)
        return found

    def captured(size: int) -> tuple[int, Any, int | None]:
        return size, waiting.program_at(size), waiting.eager_bytes(max(1, size // target.device_count))

    def at_all(sizes: Sequence[int]) -> list[Any]:
        # XLA compiles for a GPU on one core. Capturing runs the script's code, which is for one thread.
        programs = [captured(size) for size in sizes]
        with ThreadPoolExecutor(min(len(sizes), os.cpu_count() or 1)) as threads:
            return list(threads.map(compiled, *zip(*programs, strict=True)))

    def at(size: int) -> Any:
        return compiled(*captured(size))

    plan = search.evaluate(at, own, target, **request.chosen(own, recipe), at_all=at_all)
    if plan.largest is None:
        remarks = memory_advice.explained(waiting.step, own, plan.batches[0].batch_size, target)
        plan = dataclasses.replace(plan, remarks=tuple(remarks))
    seen = waiting.first_step and first_step.as_json(waiting.first_step)
    return plan, {"applies": waiting.applies, "first_step": seen, "options": values}


def _by_runs(request: _Request) -> tuple[Any, dict[str, Any]]:
    """Runs the script anew for every size, each time with its own option for the batch size."""
    from trainingcompiler.planning import report, search

    def run(size: int | None) -> tuple[Any, dict]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            done = subprocess.run(_command(request, size, path), stdout=subprocess.DEVNULL, check=False)
            if done.returncode or not path.exists():
                raise UsageError(f"the run with a batch of {size or 'its own size'} was not planned; see above")
            plan = json.loads(path.read_text(encoding="utf-8"))
        found = report.from_json(plan["batches"][0])
        if size is not None and found.batch_size != size:
            raise UsageError(
                f"{request.batch_size_arg} {size} gave the step a batch of {found.batch_size}: is it the option for "
                "the batch size of training?"
            )
        return found, plan

    own, plan = run(None)
    recipe = plan["recipe"] and recipe_from_json(plan["recipe"])
    known = {own.batch_size: own}

    def at(size: int) -> Any:
        return known.get(size) or run(size)[0]

    chosen = request.chosen(own.batch_size, recipe)
    script_tells = {name: plan[name] for name in ("applies", "first_step", "options")}
    return search.evaluate(at, own.batch_size, request.target(), **chosen), script_tells


def _command(request: _Request, size: int | None, path: Path) -> list[str]:
    line = request.line
    assert request.batch_size_arg is not None and line.target is not None
    replaced = {
        "--batch-size-arg": None, "--plot": None, "--module": None, "--batch-sizes": "own", "--json": str(path),
    }  # fmt: skip
    if request.script_batch_size is not None:
        replaced["--script-batch-size"] = str(size or request.script_batch_size)
    options = {**line.given, **replaced}
    words = [f"{name}={value}" if value else name for name, value in options.items() if value is not None]
    arguments = line.arguments
    if size is not None:
        arguments = with_option(arguments, request.batch_size_arg, str(size))
    script = ["-m", line.target] if line.is_module else [line.target]
    return [sys.executable, "-m", PLAN.name, *words, "--", *script, *arguments]


def _request(line: CommandLine) -> _Request:
    """Checks everything that can be checked before the script runs.

    Raises:
        UsageError, ValueError: Something is wrong.
    """
    given = line.given
    name = given.get("--gpu", "local")
    name = name.lower() if name.lower() in ("local", *GPUS) else name
    if name != "local":
        gpu(name)
    gpus = _positive("--gpus", given.get("--gpus", "1"), "a number of GPUs")
    strategy = Strategy.parse(given.get("--strategy", "fsdp"))
    if name == "local" and gpus > 1:
        raise UsageError("--gpus goes with a described GPU: --gpu h100 --gpus 8")
    if gpus == 1 and "--strategy" in given:
        raise UsageError("--strategy says how several GPUs share the training state; give their number too: --gpus 8")
    strategy.check(gpus)
    mode = given.get("--batch-sizes", "auto")
    numbers = [] if mode in _MODES else [_positive("--batch-sizes", text, "a batch size") for text in mode.split(",")]
    _check_divides(numbers, gpus // strategy.tensor_parallel)
    own = given.get("--script-batch-size")
    target_of(line)
    if "--plot" in given:
        _plotting().check()
    return _Request(
        gpu=name,
        gpus=gpus,
        strategy=strategy,
        mode=mode,
        sizes=tuple(numbers),
        script_batch_size=None if own is None else _positive("--script-batch-size", own, "a batch size"),
        batch_size_arg=given.get("--batch-size-arg"),
        fills_weights="--fill-weights" in given,
        json=Path(given["--json"]) if "--json" in given else None,
        plot=Path(given["--plot"]) if "--plot" in given else None,
        line=line,
        flags=flags_of(line),
    )


def _check_divides(sizes: Sequence[int], gpus: int) -> None:
    for size in sizes:
        if size % gpus:
            raise UsageError(
                f"a batch of {size} cannot be divided between {gpus} GPUs: give sizes that are multiples of {gpus}, "
                f"--batch-sizes={gpus},{2 * gpus}"
            )


def _plotting() -> Any:
    return importlib.import_module("trainingcompiler.planning.plot")  # reaches JAX, which is to be imported late


def _positive(name: str, text: str, what: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{name}: {text!r} is not {what}; give whole numbers, 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
