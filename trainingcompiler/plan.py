"""`python -m trainingcompiler.plan [--gpu NAME] script.py [script args]`: which batch fits, and which is fastest.

Runs the script up to its first training step, takes no step, and compiles that step for the device at several batch
sizes. A described GPU need not be there.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainingcompiler import planner, watched
from trainingcompiler.config import resolve, to_environment
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.gpus import GPUS, gpu
from trainingcompiler.launch import CommandLine, flags_of, parse, target_of

PROGRAM = "trainingcompiler.plan"
BAD_INPUT = 2
_OPTIONS = {
    "--gpu": f"local|{'|'.join(GPUS)}",
    "--batch-sizes": "auto|own|8,16,...",
    "--script-batch-size": "N",
    "--batch-size-arg": "NAME",
    "--json": "FILE",
    "--plot": "FILE",
}
_USAGE = f"""usage: python -m {PROGRAM} [options] [launcher options] script.py [script args]

Runs the script up to its first training step, takes none, and compiles the step for a device at several batch sizes:
memory, arithmetic, a bound on the time, the largest batch that fits and the fastest.

  --gpu local|NAME          the device: this machine's (local), or a described one, which need not be there:
                            {", ".join(GPUS)}
  --batch-sizes auto|own|8,16,...
                            search for the largest that fits (auto), only the script's own, or these
  --script-batch-size N     rows of the script's batch, where its tensors disagree: what has N rows is scaled
  --batch-size-arg=--bs     the script's own option for its batch size: the script is run again for every size
  --json FILE               write the plan there as well
  --plot FILE               draw it: memory, and rows a second, over the batch

Exit code 0: planned. 2: there was nothing to plan, or the script failed."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the command line asks for."""

    gpu: str
    sizes: tuple[int, ...]
    searches: bool
    script_batch_size: int | None
    batch_size_arg: str | None
    json: Path | None
    plot: Path | None
    line: CommandLine
    flags: dict[str, object]


def main(words: Sequence[str] | None = None) -> None:
    """Plans the script named on the command line."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE + "\n")
        sys.exit(0)
    try:
        request = _parse(words)
        plan = _by_runs(request) if request.batch_size_arg else _in_this_process(request)
    except (TrainingCompilerError, ValueError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        sys.exit(BAD_INPUT)
    from trainingcompiler import planning

    script = os.path.basename(request.line.target or "")
    lines = [
        f"{script} on {plan.device} ({planning.size_of(plan.memory_bytes)})",
        planning.table(plan),
        *planning.advice(plan),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if request.json is not None:
        _write(request.json, planning.as_json(plan))
    if request.plot is not None:
        _plotting().save(plan, request.plot)


def _in_this_process(request: _Request) -> Any:
    """Runs the script once, and captures its step again for every size."""
    if request.gpu != "local":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for a driver
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns of every batch that is too large
    os.environ.update(to_environment({**request.flags, "enabled": True, "engine": "xla"}))
    from trainingcompiler import planning
    from trainingcompiler.plan_store import PlanStore
    from trainingcompiler.targets import Target

    target = Target.local() if request.gpu == "local" else Target.gpu(request.gpu)
    target.sharding()  # what is not installed is said before anything is run
    waiting = planner.current = planner.Planner(request.script_batch_size)
    failure = watched.run(request.line, waiting.Enough)
    planner.current = None
    if failure is not None:
        raise UsageError(f"the script failed before its first training step ({type(failure).__name__}: {failure})")
    own = waiting.rows()
    store = PlanStore.of(resolve(request.flags, os.environ).config)

    def at(size: int) -> Any:
        program = waiting.program_at(size)
        found = store.load(program, target)
        if found is None:
            found = planning.planned(program, size, target)
            store.save(program, target, found)
        return found

    sizes = request.sizes or (() if request.searches else (own,))
    return planning.evaluate(at, own, target, _memory_bytes(request.gpu), sizes)


def _by_runs(request: _Request) -> Any:
    """Runs the script anew for every size, each time with its own option for the batch size."""
    from trainingcompiler import planning
    from trainingcompiler.targets import Target

    target = Target.local() if request.gpu == "local" else Target.gpu(request.gpu)

    def run(size: int | None) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            done = subprocess.run(_command(request, size, path), stdout=subprocess.DEVNULL, check=False)
            if done.returncode or not path.exists():
                raise UsageError(f"the run with a batch of {size or 'its own size'} was not planned; see above")
            (batch,) = json.loads(path.read_text(encoding="utf-8"))["batches"]
        found = planning.from_json(batch)
        if size is not None and found.batch_size != size:
            raise UsageError(
                f"{request.batch_size_arg} {size} gave the step a batch of {found.batch_size}: is it the option for "
                "the batch size of training?"
            )
        return found

    own = run(None)
    known = {own.batch_size: own}

    def at(size: int) -> Any:
        return known.get(size) or run(size)

    sizes = request.sizes or (() if request.searches else (own.batch_size,))
    return planning.evaluate(at, own.batch_size, target, _memory_bytes(request.gpu), sizes)


def _command(request: _Request, size: int | None, path: Path) -> list[str]:
    line, name = request.line, request.batch_size_arg
    assert name is not None and line.target is not None
    arguments = list(line.arguments)
    if size is not None:
        arguments = _with_option(arguments, name, size)
    options = ["--gpu", request.gpu, "--batch-sizes", "own", "--json", str(path)]
    if request.script_batch_size is not None:
        options += ["--script-batch-size", str(size or request.script_batch_size)]
    environment_flags = [
        word for key, value in line.given.items() if key != "--module" for word in ([key, value] if value else [key])
    ]
    script = ["-m", line.target] if line.is_module else [line.target]
    return [sys.executable, "-m", PROGRAM, *options, *environment_flags, "--", *script, *arguments]


def _with_option(arguments: list[str], name: str, value: int) -> list[str]:
    """The script's arguments with the last mention of an option replaced, or the option added."""
    for index in range(len(arguments) - 1, -1, -1):
        if arguments[index].startswith(f"{name}="):
            return [*arguments[:index], f"{name}={value}", *arguments[index + 1 :]]
        if arguments[index] == name:
            return [*arguments[: index + 1], str(value), *arguments[index + 2 :]]
    return [*arguments, name, str(value)]


def _memory_bytes(name: str) -> int:
    if name != "local":
        return gpu(name).memory_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _parse(words: list[str]) -> _Request:
    given: dict[str, str] = {}
    while words and words[0].partition("=")[0].replace("_", "-") in _OPTIONS:
        name, equals, text = words.pop(0).partition("=")
        name = name.replace("_", "-")
        if name in given:
            raise UsageError(f"{name} is given twice; give it once")
        if not equals:
            if not words:
                raise UsageError(f"{name} needs a value: {name} {_OPTIONS[name]}")
            text = words.pop(0)
        given[name] = text
    name = given.get("--gpu", "local").lower()
    if name != "local":
        gpu(name)
    sizes = given.get("--batch-sizes", "auto")
    numbers = [] if sizes in ("auto", "own") else [_positive("--batch-sizes", text) for text in sizes.split(",")]
    own = given.get("--script-batch-size")
    line = parse(words)
    target_of(line)
    for option in ("--no-compile", "--engine"):
        if option in line.given:  # without our step there is none to stop at: the script would train
            raise UsageError(f"{option} does not go with a plan, which compiles the script's step and takes none")
    if "--plot" in given:
        _plotting().check()
    return _Request(
        gpu=name,
        sizes=tuple(numbers),
        searches=sizes == "auto",
        script_batch_size=None if own is None else _positive("--script-batch-size", own),
        batch_size_arg=given.get("--batch-size-arg"),
        json=Path(given["--json"]) if "--json" in given else None,
        plot=Path(given["--plot"]) if "--plot" in given else None,
        line=line,
        flags=flags_of(line),
    )


def _plotting() -> Any:
    return importlib.import_module("trainingcompiler.plan_plot")  # reaches JAX, which is to be imported late


def _positive(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{name}: {text!r} is not a batch size; give whole numbers, 1 or more")
    return int(text)


def _write(path: Path, plan: dict) -> None:
    """A file is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
