"""`launch --batch-size ... --lr-scaling ...`: plans the script, and runs it with what the plan recommends.

The script is planned in a process of its own. What it says there decides who changes the batch: the script's own
options, which are rewritten; a library whose arguments can be set; or the script itself, which asks.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from trainingcompiler.cli.parser import CommandLine, Option, option_in, with_option
from trainingcompiler.config import did_you_mean
from trainingcompiler.errors import UsageError
from trainingcompiler.planning import first_step, recommendation
from trainingcompiler.planning.batch_scaling import POLICIES, Scaled, keep_global, rescale
from trainingcompiler.planning.first_step import FirstStep, shown

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
    "--weight-decay-arg": Option("--NAME", "the script's own option for its weight decay"),
}
_FIELDS = {
    "batch_size": "--batch-size-arg",
    "accumulation_steps": "--accumulation-arg",
    "lr": "--lr-arg",
    "weight_decay": "--weight-decay-arg",
}
# How each is called where nobody has named an option for it.
_MEANINGS = {
    "batch_size": "batch size",
    "accumulation_steps": "number of accumulated batches",
    "lr": "learning rate",
}


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
    if plan["first_step"] is None:
        raise UsageError("nothing tells what the script's first step trains with, so no decision could be checked")
    scaled = decide(plan, line.given["--batch-size"], line.given.get("--lr-scaling", "auto"))
    settled = settle(line.arguments, scaled, plan, line.given, lambda *run: _rehearse(line, plan["applies"], *run))
    variables = recommendation.to_environment(settled.scaled, plan["applies"], settled.first_step)
    if "--record" not in line.given:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{Path(line.target or '').stem}.json"
        variables["TRAININGCOMPILER_RECORD"] = str(Path(cache_dir) / "runs" / name)
    return Applied(arguments=settled.arguments, variables=variables, lines=settled.lines)


def decide(plan: Mapping[str, Any], size: str, policy: Any) -> Scaled:
    """The recipe that a run is to have.

    Args:
        plan: As `trainingcompiler.plan --json` writes it.
        size: "keep-global", "max", or rows as text.
        policy: The rule for the learning rate.

    Raises:
        UsageError: The batch does not fit, or a rule has no solution.
    """
    recipe = recommendation.recipe_from_json(plan["recipe"])
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


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What the script did with changes, up to its first step.

    Attributes:
        batch_size: Rows of the step's batch.
        accumulation_steps: Batches that the step adds up.
        first_step: What it would have trained with.
    """

    batch_size: int
    accumulation_steps: int
    first_step: FirstStep


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A decision that has been rehearsed, and holds.

    Attributes:
        arguments: The script's, some of them rewritten.
        scaled: The decision, without what nobody can change.
        first_step: What the run's first step is to train with.
        lines: What to tell the person.
    """

    arguments: tuple[str, ...]
    scaled: Scaled
    first_step: FirstStep
    lines: tuple[str, ...]


Rehearse = Callable[[Sequence[str], Scaled], Rehearsed]


def settle(
    arguments: Sequence[str], scaled: Scaled, plan: Mapping[str, Any], names: Mapping[str, str], rehearse: Rehearse
) -> Settled:
    """Changes what a script is given until it trains what was decided.

    The script is rehearsed with the changes. If all its rates are then too large by one factor, it scales them itself,
    and its option makes up for that.

    Args:
        arguments: What the script was to be given.
        scaled: What was decided.
        plan: As `trainingcompiler.plan --json` writes it.
        names: `"--batch-size-arg"` and the like -> the script's option.
        rehearse: Runs the script with arguments and a recommendation, up to its first step.

    Raises:
        UsageError: It does not train what was decided; both values are said.
    """
    planned, values, rewrites = (
        first_step.from_json(plan["first_step"]),
        plan["options"],
        plan["applies"] == "arguments",
    )
    given = list(arguments)
    remarks: list[str] = []
    if rewrites:
        given, scaled, remarks = rewritten(given, scaled, names, values)
    lines = [*scaled.describe().splitlines(), *remarks]
    seen = rehearse(given, scaled)
    _check_batch(scaled, seen, names, rewrites)
    found = _compared(planned, seen, scaled)
    option = names.get("--lr-arg") if rewrites else None
    cure = _CURES[plan["applies"]] if not rewrites else _NAMED if option is not None else _UNNAMED
    if found.factor != 1.0 and option is not None:
        before = _value_of(option, given, values)
        if before is None or before <= 0:
            _refuse(found, cure, option, given)
        given = with_option(given, option, f"{before / found.factor:.10g}")
        tried = found
        try:
            seen = rehearse(given, scaled)
        except UsageError as error:  # no rate that an optimizer takes
            _refuse(tried, cure, option, [option, f"{before:.10g}"], first_step.Comparison(differences=(str(error),)))
        _check_batch(scaled, seen, names, rewrites)
        found = _compared(planned, seen, scaled)
        if found.differences:
            _refuse(tried, cure, option, with_option(given, option, f"{before:.10g}"), found)
        lines.append(
            f"  the script itself makes its rates {shown(tried.factor)} times as large with this batch: it is given "
            f"{option} {before / tried.factor:.10g}, so that the decided ones train"
        )
    if found.differences:
        _refuse(found, cure, option, given)
    lines += [f"  {remark}" for remark in (*found.remarks, *_schedules(planned, scaled, plan["applies"]))]
    return Settled(arguments=tuple(given), scaled=scaled, first_step=seen.first_step, lines=tuple(lines))


def rewritten(
    arguments: list[str], scaled: Scaled, names: Mapping[str, str], values: Mapping[str, float]
) -> tuple[list[str], Scaled, list[str]]:
    """A script's arguments with its own options changed.

    Args:
        arguments: What the script was to be given.
        scaled: What is to change.
        names: `"--batch-size-arg"` and the like -> the script's option.
        values: What the script's parser made of its options.

    Returns:
        The new arguments, the decision without what cannot be said with them, and a line for each such thing.

    Raises:
        UsageError: Nobody has named the option for the batch size.
    """
    remarks = []
    kept: dict[str, Any] = {}
    for field, (old, new) in scaled.changes().items():
        option = names.get(_FIELDS.get(field, ""))
        if option is not None:
            arguments = _changed(arguments, option, old, new, values)
        elif field == "batch_size":
            _refuse_unnamed(field, old, new)
        elif field not in _MEANINGS:  # of these, the rehearsal shows whether the script changes them itself
            kept[field] = old
            remarks.append(f"  {field} stays {old} in the script: the rule would make it {_number(new)}")
    return arguments, dataclasses.replace(scaled, recipe=dataclasses.replace(scaled.recipe, **kept)), remarks


def _changed(arguments: list[str], option: str, old: Any, new: Any, values: Mapping[str, float]) -> list[str]:
    """A rate is changed by its ratio: the script may give the optimizer another one than it was given."""
    if not isinstance(old, float):
        return with_option(arguments, option, str(new))
    own = _value_of(option, arguments, values)
    return with_option(arguments, option, f"{new if own is None else recommendation.scaled_number(own, old, new):.10g}")


def _value_of(option: str, arguments: Sequence[str], values: Mapping[str, float]) -> float | None:
    """The value of a script's option: on its command line, or as its parser saw it; None where neither tells."""
    text = option_in(arguments, option)
    if text is None:
        return values.get(option)
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"{option}={text}: the script's option for its rate is no number that could be scaled"
        ) from None


def _compared(planned: FirstStep, seen: Rehearsed, scaled: Scaled) -> first_step.Comparison:
    before, after = scaled.before, scaled.recipe
    decay = after.weight_decay / before.weight_decay if before.weight_decay else 1.0
    return first_step.compare(planned, seen.first_step, lr=after.lr / before.lr, weight_decay=decay)


def _check_batch(scaled: Scaled, seen: Rehearsed, names: Mapping[str, str], rewrites: bool) -> None:
    for field in ("batch_size", "accumulation_steps"):
        old, new, got = getattr(scaled.before, field), getattr(scaled.recipe, field), getattr(seen, field)
        if got == new:
            continue
        option = names.get(_FIELDS[field])
        if rewrites and option is None:
            _refuse_unnamed(field, old, new, got)
        raise UsageError(
            f"the {_MEANINGS[field]} was decided to be {new}, and the script's first step has {got}: "
            + (f"is {option} the option for it?" if rewrites else "the script sets it itself")
            + " Nothing has been trained"
        )


def _refuse_unnamed(field: str, old: Any, new: Any, got: Any = None) -> NoReturn:
    found = "" if got in (None, old) else f" (the script itself makes it {got})"
    raise UsageError(
        f"the {_MEANINGS[field]} is to change from {_number(old)} to {_number(new)}{found}, and nobody has said how: "
        f"name the script's option for it, {_FIELDS[field]}=--..., or have the script ask "
        "trainingcompiler.recommendation()"
    )


_NAMED = (
    "Is that the option for all of them? Name the right one, or have the script ask trainingcompiler.recommendation()"
)
_UNNAMED = (
    "Name the script's options for them, --lr-arg=--... and --weight-decay-arg=--..., or have the script ask "
    "trainingcompiler.recommendation()"
)
_CURES = {
    "script": "The script asks trainingcompiler.recommendation(): have it use what that says for all of its groups",
    "huggingface": "The Trainer's arguments have been changed, and the script sets these itself: have it ask "
    "trainingcompiler.recommendation() and use what that says for everything",
    "keras": "The optimizer has been changed, and the script sets these itself, most likely in a callback: have it ask "
    "trainingcompiler.recommendation() and use what that says for everything",
}


def _refuse(
    found: first_step.Comparison,
    cure: str,
    option: str | None,
    given: Sequence[str],
    corrected: first_step.Comparison | None = None,
) -> NoReturn:
    """Says what the script would train with, and what was decided."""
    tried = f" with {option} {option_in(given, option)}" if option is not None else ""
    lines = [f"  {line}" for line in found.differences]
    if corrected is not None:
        lines += ["and with that option changed to make up for it:", *(f"  {line}" for line in corrected.differences)]
    first = f"the script would not train as decided{tried}; nothing has been trained:"
    raise UsageError("\n".join([first, *lines, cure]))


def _schedules(planned: FirstStep, scaled: Scaled, applies: str) -> list[str]:
    """What a person has to know of schedules that count steps, where a step is no longer as many rows."""
    kinds = dict.fromkeys(group.schedule for group in planned.groups if group.schedule)
    if not kinds or scaled.factor == 1 or applies not in ("arguments", "script"):
        return []
    return [
        f"what the script's schedule counts in steps stays its own ({', '.join(kinds)}): a step is now "
        f"{scaled.factor:g} times as many rows"
    ]


def _number(value: Any) -> str:
    return shown(value) if isinstance(value, float) else str(value)


def _plan(line: CommandLine) -> dict[str, Any]:
    """Runs `trainingcompiler.plan` on the script; what it says on the way is shown."""
    size = line.given["--batch-size"]
    sizes = {"keep-global": "keep-global", "max": "auto"}.get(size, size)
    options = [f"--batch-sizes={sizes}", *_options(line, "--batch-size-arg", "--quiet")]
    return _run(line, "trainingcompiler.plan", options, line.arguments, {}, "planned")


def _rehearse(line: CommandLine, applies: str, arguments: Sequence[str], scaled: Scaled) -> Rehearsed:
    """Runs the script as it will be run, up to its first step."""
    variables = recommendation.to_environment(scaled, applies)
    content = _run(line, "trainingcompiler.rehearsal", _options(line), arguments, variables, "rehearsed")
    return Rehearsed(**{**content, "first_step": first_step.from_json(content["first_step"])})


def _options(line: CommandLine, *more: str) -> list[str]:
    names = ("--cache-dir", "--cache-size-gb", "--fallback", *more)
    return [f"{name}={value}" if value else name for name, value in line.given.items() if name in names]


def _run(
    line: CommandLine, module: str, options: list[str], arguments: Sequence[str], variables: dict[str, str], done: str
) -> dict[str, Any]:
    """Has a program of ours run the script in a process of its own, and returns what it writes down."""
    assert line.target is not None
    script = ["-m", line.target] if line.is_module else [line.target]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", module, f"--json={path}", *options, "--", *script, *arguments]
        ended = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, check=False)
        if ended.returncode or not path.exists():
            words = " ".join(map(str, arguments))
            with_what = f" with {words}" if done == "rehearsed" and words else ""
            raise UsageError(f"the script was not {done}{with_what}, see above; without --batch-size it runs as it is")
        return json.loads(path.read_text(encoding="utf-8"))
