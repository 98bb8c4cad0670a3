"""`python -m trainingcompiler.launch [options] script.py [script args]`: the script, unmodified, compiled."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from trainingcompiler.cli import apply_plan, job
from trainingcompiler.cli.job import Job
from trainingcompiler.cli.list_patches import list_patches
from trainingcompiler.cli.parser import CONFIGURING, GENERAL, Command, CommandLine, Option, flags_of, parse, target_of
from trainingcompiler.config import RECIPE, ResolvedConfig, default_cache_dir, resolve, to_environment
from trainingcompiler.errors import ConfigError, UsageError
from trainingcompiler.launchers import elastic, kubernetes, local, ray, slurm
from trainingcompiler.targets import huge_pages

Launcher = Callable[[Job], NoReturn]

_LAUNCHERS: dict[str, Launcher] = {
    "local": local.launch,
    "elastic": elastic.launch,
    "slurm": slurm.launch,
    "ray": ray.launch,
    "kubernetes": kubernetes.launch,
}

LAUNCH = Command(
    "trainingcompiler.launch",
    "Runs an ordinary training script, each of its steps as one compiled program.",
    {
        "--no-compile": Option("", "run the script as it is (as does TRAININGCOMPILER=0)", "enabled"),
        "--engine": Option(
            "auto|xla|eager|tensorflow", "who runs a step; auto measures and keeps the fastest", "engine"
        ),
        "--devices": Option("N|all", "run each step on N devices together; the batch stays the global one", "devices"),
        "--strategy": Option("dp|fsdp|tp=K|fsdp+tp=K", "how they share the training state", "strategy"),
        **CONFIGURING,
        **apply_plan.OPTIONS,
        "--dump": Option("DIR", "write there the stages of every program: tape, graph, StableHLO, HLO", "dump"),
        "--record": Option("FILE", "write there what the run was: options, times, changes, as JSON", "record"),
        "--small-pages": Option("", "do not ask for huge pages, which speed large CPU steps up", "small_pages"),
        **job.OPTIONS,
        "--list-patches": Option("", "print what is replaced in the installed frameworks, and why, and exit"),
        "--print-config": Option("", "print each option's value and where it came from, and exit"),
        **GENERAL,
    },
    "Each option that configures the compiler can also be set in the environment: TRAININGCOMPILER_ENGINE=xla.",
)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Reads the command line, checks everything that can be checked, and hands over to a launcher.

    Exits with code 2, and nothing done, where something is wrong.
    """
    try:
        line = parse(sys.argv[1:] if words is None else words, LAUNCH)
        if "--help" in line.given:
            sys.stdout.write(LAUNCH.usage() + "\n")
            sys.exit(0)
        flags = flags_of(line)
        if "--print-config" in line.given:
            sys.stdout.write(resolve(flags, os.environ).describe() + "\n")
            sys.exit(0)
        if "--list-patches" in line.given:
            sys.stdout.write("".join(f"{text}\n" for text in list_patches()))
            sys.exit(0)
        kind, target = "module" if line.is_module else "script", line.target or ""
        os.environ.pop(RECIPE, None)  # that of a launcher around this one is not for this script
        arguments, variables = line.arguments, to_environment(flags)
        resolved, asked = _checked(line, [kind, target, *arguments], flags, variables)
        if apply_plan.is_asked_for(line):
            applied = apply_plan.apply(line, resolved.config.cache_dir or default_cache_dir())
            sys.stderr.write("".join(f"[batch]      {text}\n" for text in applied.lines))
            arguments, variables = list(applied.arguments), {**variables, **applied.variables}
        if resolved.config.enabled and not resolved.config.small_pages:
            variables |= huge_pages.variables(os.environ)
        asked = dataclasses.replace(asked, arguments=(kind, target, *arguments), variables=variables)
        _LAUNCHERS[job.launcher_of(line)](asked)
    except (ConfigError, UsageError) as error:
        sys.stderr.write(f"{LAUNCH.name}: {error}\n")
        sys.exit(2)


def _checked(
    line: CommandLine, arguments: Sequence[str], flags: Mapping[str, object], variables: Mapping[str, str]
) -> tuple[ResolvedConfig, Job]:
    """The configuration and the job, where nothing is wrong with either.

    Raises:
        ConfigError: Something is; all mistakes together, whoever finds them.
    """
    mistakes: list[str] = []
    with _kept_in(mistakes):
        target_of(line)
    with _kept_in(mistakes):
        resolved = resolve(flags, os.environ)
        mistakes += _contradictions(line, resolved)
    with _kept_in(mistakes):
        asked = job.job_of(line, arguments, variables, os.environ)
    if mistakes:
        raise ConfigError(mistakes)
    return resolved, asked


@contextlib.contextmanager
def _kept_in(mistakes: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        mistakes += error.mistakes
    except UsageError as error:
        mistakes.append(str(error))


def _contradictions(line: CommandLine, resolved: ResolvedConfig) -> list[str]:
    """Devices of one process, and several processes, are two ways to the same end."""
    found = []
    devices, strategy = resolved.config.devices, resolved.config.strategy
    workers = job.is_distributed(line)
    others = "--no-compile" if not resolved.config.enabled else f"--engine={resolved.config.engine}"
    if devices != 1 and others in ("--no-compile", "--engine=eager", "--engine=tensorflow"):
        found.append(
            f"{resolved.sources['devices']}={devices} needs compiled steps, and {others} leaves them to the framework, "
            "which runs them on one device; leave one of the two out"
        )
    if workers and devices != 1:
        found.append(
            f"{resolved.sources['devices']}={devices} is for a script that knows of one process, and "
            "--nproc-per-node for one that is written for several (DistributedDataParallel, Accelerate); give one of "
            "them"
        )
    if workers and "tp=" in strategy:
        found.append(
            f"{resolved.sources['strategy']}={strategy} divides layers between the devices of one process, and workers "
            "have batches of their own: give --devices=all instead of --nproc-per-node, or --strategy=fsdp, which "
            "divides the state between workers"
        )
    if "--batch-size" in line.given and not resolved.config.enabled and "--no-compile" not in line.given:
        found.append(
            f"{resolved.sources['enabled']}=0 leaves the steps to the framework, and --batch-size compiles them to see "
            "what they need; leave one of the two out"
        )
    if workers and "--batch-size" in line.given:
        found.append("--batch-size plans a script of one process; it does not go with --nproc-per-node")
    if resolved.sources["strategy"] != "default" and devices == 1 and not workers:
        found.append(
            f"{resolved.sources['strategy']}={strategy} says how several devices share a training, and there is one: "
            "give --devices=all, or --nproc-per-node=N for a script that is written for several processes"
        )
    return found


if __name__ == "__main__":
    main()
