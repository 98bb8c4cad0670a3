"""`launch --batch-size ... --lr-scaling ...`: plans the script, and runs it with what the plan recommends.

The script is planned in a process of its own. What it says there decides who changes the batch: the script's own
options, which are rewritten; a library whose arguments can be set; or the script itself, which asks.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trainingcompiler import recommended
from trainingcompiler.command_line import CommandLine, Option, option_in, with_option
from trainingcompiler.config import did_you_mean
from trainingcompiler.errors import UsageError
from trainingcompiler.scaling import POLICIES, Scaled, keep_global, rescale

OPTIONS = {
    "--batch-size": Option(
        "keep-global|max|N",
        "plan first, then train with another batch: the largest that leaves the training as it is (fewer accumulated "
        "batches), the largest that fits, or N rows",
    ),
    "--lr-scaling": Option(
        "|".join(POLICIES), "what becomes of the learning rate if the global batch changes; auto goes by the optimizer"
    ),
    "--batch-size-arg": Option("--NAME", "the script's own option for its batch size"),
    "--accumulation-arg": Option("--NAME", "the script's own option for how many batches it accumulates"),
    "--lr-arg": Option("--NAME", "the script's own option for its learning rate"),
}
_FIELDS = {
    "batch_size": "--batch-size-arg",
    "accumulation_steps": "--accumulation-arg",
    "lr": "--lr-arg",
}
# How each is called where nobody has named an option for it.
_MEANINGS = {"batch_size": "batch size", "accumulation_steps": "number of accumulated batches", "lr": "learning rate"}


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What the worker is started with.

    Attributes:
        arguments: The script's, some of them rewritten.
        variables: For the worker's environment.
        lines: What to tell the person.
    """

    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    lines: tuple[str, ...]


def is_asked_for(line: CommandLine) -> bool:
    """Whether the command line wants another batch; and if not, that it names nothing that belongs to it.

    Raises:
        UsageError: An option without `--batch-size`, or with a value that it does not take.
    """
    if "--batch-size" not in line.given:
        alone = [name for name in OPTIONS if name in line.given]
        if alone:
            raise UsageError(f"{alone[0]} goes with --batch-size={OPTIONS['--batch-size'].value}, which is not given")
        return False
    size, policy = line.given["--batch-size"], line.given.get("--lr-scaling", "auto")
    if size not in ("keep-global", "max") and not (size.isdigit() and int(size) > 0):
        raise UsageError(f"--batch-size={size}: must be keep-global, max, or a whole number of rows, 1 or more")
    if policy not in POLICIES:
        raise UsageError(f"--lr-scaling={policy}: must be one of {', '.join(POLICIES)}{did_you_mean(policy, POLICIES)}")
    for name in ("--no-compile", "--engine"):
        if name in line.given:
            raise UsageError(f"{name} does not go with --batch-size, which compiles the step to see what it needs")
    return True


def apply(line: CommandLine, cache_dir: str) -> Applied:
    """Plans the script, and decides what its run changes.

    Args:
        line: The command line, which `is_asked_for` has checked.
        cache_dir: Where the run is recorded if the person names no file.

    Raises:
        UsageError: The script cannot be planned, nothing fits, or nobody knows how to change it.
    """
    plan = _plan(line)
    if plan["recipe"] is None:
        raise UsageError("the script's optimizer does not tell its learning rate, so nothing can be scaled")
    scaled = decide(plan, line.given["--batch-size"], line.given.get("--lr-scaling", "auto"))
    arguments = list(line.arguments)
    remarks: list[str] = []
    if plan["applies"] == "arguments":
        arguments, remarks = rewritten(arguments, scaled, line.given)
    variables = recommended.to_environment(scaled, plan["applies"])
    if "--record" not in line.given:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{Path(line.target or '').stem}.json"
        variables["TRAININGCOMPILER_RECORD"] = str(Path(cache_dir) / "runs" / name)
    return Applied(
        arguments=tuple(arguments), variables=variables, lines=(*scaled.describe().splitlines(), *remarks)
    )  # fmt: skip


def decide(plan: Mapping[str, Any], size: str, policy: Any) -> Scaled:
    """The recipe that a run is to have.

    Args:
        plan: As `trainingcompiler.plan --json` writes it.
        size: "keep-global", "max", or rows as text.
        policy: The rule for the learning rate.

    Raises:
        UsageError: The batch does not fit, or a rule has no solution.
    """
    recipe = recommended.recipe_from_json(plan["recipe"])
    largest = plan["largest"]
    if largest is None or (size.isdigit() and largest < int(size)):
        smallest = min(plan["batches"], key=lambda batch: batch["batch_size"])
        raise UsageError(
            f"a batch of {smallest['batch_size']} does not fit {plan['device']}: it needs {smallest['peak_bytes']:,} "
            f"bytes of {plan['usable_bytes']:,}. python -m trainingcompiler.plan says what does"
        )
    if size == "keep-global":
        return keep_global(recipe, batch_size=largest)
    rows = int(size) if size.isdigit() else largest
    # Accumulation makes up for memory: where a batch is larger, fewer of them are accumulated before anything grows.
    accumulated = max(1, round(recipe.batch_size * recipe.accumulation_steps / rows))
    if rows * accumulated == recipe.batch_size * recipe.accumulation_steps:
        return keep_global(recipe, batch_size=rows)
    return rescale(recipe, batch_size=rows, accumulation_steps=accumulated, policy=policy)


def rewritten(arguments: list[str], scaled: Scaled, names: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """A script's arguments with its own options changed.

    Args:
        arguments: What the script was to be given.
        scaled: What is to change.
        names: `"--batch-size-arg"` and the like -> the script's option.

    Returns:
        The new arguments, and what cannot be said with them.

    Raises:
        UsageError: Nobody has named the option for something that has to change.
    """
    remarks = []
    for field, (old, new) in scaled.changes().items():
        option = names.get(_FIELDS.get(field, ""))
        if option is not None:
            arguments = _changed(arguments, option, old, new)
        elif field in _FIELDS:
            raise UsageError(
                f"the {_MEANINGS[field]} is to change from {old} to {new}, and nobody has said how: name the script's "
                f"option for it, {_FIELDS[field]}=--..., or have the script ask trainingcompiler.recommendation()"
            )
        else:
            remarks.append(f"  {field} stays {old} in the script: the rule would make it {new:.6g}")
    return arguments, remarks


def _changed(arguments: list[str], option: str, old: Any, new: Any) -> list[str]:
    """A learning rate is changed by its ratio: the script may give the optimizer another one than it was given."""
    given = option_in(arguments, option)
    if isinstance(old, float) and given is not None:
        new = recommended.scaled_number(float(given), old, new)
    return with_option(arguments, option, f"{new:.10g}" if isinstance(new, float) else str(new))


def _plan(line: CommandLine) -> dict[str, Any]:
    """Runs `trainingcompiler.plan` on the script; what it says on the way is shown."""
    size = line.given["--batch-size"]
    sizes = {"keep-global": "keep-global", "max": "auto"}.get(size, size)
    assert line.target is not None
    script = ["-m", line.target] if line.is_module else [line.target]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        options = [f"--batch-sizes={sizes}", f"--json={path}"]
        for name, value in line.given.items():
            if name in ("--cache-dir", "--cache-size-gb", "--fallback", "--quiet", "--batch-size-arg"):
                options.append(f"{name}={value}" if value else name)
        command = [sys.executable, "-m", "trainingcompiler.plan", *options, "--", *script, *line.arguments]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode or not path.exists():
            raise UsageError("the script was not planned, see above; without --batch-size it runs as it is")
        return json.loads(path.read_text(encoding="utf-8"))
