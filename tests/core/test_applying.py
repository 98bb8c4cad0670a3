"""What the launcher makes of a plan: which batch, which rule, which of the script's options."""

import json
from pathlib import Path

import pytest

from trainingcompiler import launch
from trainingcompiler.cli import apply_plan
from trainingcompiler.cli.parser import parse
from trainingcompiler.config import resolve
from trainingcompiler.errors import UsageError
from trainingcompiler.files import write_json
from trainingcompiler.launch import LAUNCH
from trainingcompiler.planning import first_step, planner, recommendation
from trainingcompiler.planning.batch_scaling import Recipe, keep_global_sizes, rescale
from trainingcompiler.planning.first_step import FirstStep, Group


def plan(largest: int | None = 64, **recipe) -> dict:
    """As `trainingcompiler.plan --json` writes it."""
    known = {
        "batch_size": 8, "accumulation_steps": 4, "world_size": 1, "optimizer": "SGD", "lr": 0.1, "betas": None,
        "epsilon": None, "weight_decay": 0.0, "ema_decay": None, "warmup_steps": 0, "total_steps": None,
    }  # fmt: skip
    return {
        "device": "a GPU", "usable_bytes": 1000, "largest": largest, "recipe": {**known, **recipe},
        "batches": [{"batch_size": 8, "peak_bytes": 1234}],
    }  # fmt: skip


def test_keep_global_takes_the_largest_and_fewer_accumulated_batches():
    scaled = apply_plan.decide(plan(largest=16), "keep-global", "auto")
    assert scaled.changes() == {"batch_size": (8, 16), "accumulation_steps": (4, 2)}
    assert keep_global_sizes(scaled.before) == [8, 16, 32]
    assert keep_global_sizes(Recipe(batch_size=6, accumulation_steps=4, lr=1.0)) == [6, 8, 12, 24]


@pytest.mark.parametrize(
    ("size", "batch", "accumulated", "lr"),
    [
        ("max", 64, 1, 0.2),  # 32 rows a step become 64
        ("16", 16, 2, 0.1),  # 32 stay 32: fewer accumulated batches, and nothing is scaled
        ("24", 24, 1, 0.075),  # the nearest there is to 32 rows
        ("4", 4, 8, 0.1),
        ("2", 2, 16, 0.1),
    ],
)
def test_accumulation_makes_up_before_anything_is_scaled(size, batch, accumulated, lr):
    recipe = apply_plan.decide(plan(), size, "auto").recipe
    assert (recipe.batch_size, recipe.accumulation_steps) == (batch, accumulated)
    assert recipe.lr == pytest.approx(lr)


def test_a_batch_that_does_not_fit_is_refused_with_its_numbers():
    said = "a batch of 8 does not fit a GPU: it needs 1,234 bytes of 1,000. python -m trainingcompiler.plan says what"
    for size, largest in (("max", None), ("8", 4)):
        with pytest.raises(UsageError, match=said):
            apply_plan.decide(plan(largest), size, "auto")


def test_the_scripts_own_options_are_rewritten():
    scaled = apply_plan.decide(plan(), "max", "linear")
    names = {"--batch-size-arg": "--bs", "--accumulation-arg": "-a", "--lr-arg": "--lr"}
    arguments, kept, remarks = apply_plan.rewritten(["--bs=8", "data", "--lr", "0.1", "-a", "4"], scaled, names, {})
    assert arguments == ["--bs=64", "data", "--lr", "0.2", "-a", "1"] and remarks == [] and kept == scaled
    # A script that is given twice the rate that its optimizer has keeps the relation.
    arguments, _, _ = apply_plan.rewritten(["--lr", "0.2"], scaled, names, {})
    assert arguments == ["--lr", "0.4", "--bs", "64", "-a", "1"]
    # What its parser has seen is the option's value where the command line has none.
    arguments, _, _ = apply_plan.rewritten([], scaled, names, {"--lr": 0.5})
    assert arguments == ["--bs", "64", "-a", "1", "--lr", "1"]
    with pytest.raises(UsageError, match="--lr=fast: the script's option for its rate is no number that could be"):
        apply_plan.rewritten(["--lr", "fast"], scaled, names, {})


def test_what_nobody_has_named_an_option_for():
    scaled = apply_plan.decide(plan(optimizer="AdamW", weight_decay=0.1), "max", "auto")
    with pytest.raises(UsageError, match=r"the batch size is to change from 8 to 64, and nobody has said how: name"):
        apply_plan.rewritten([], scaled, {}, {})
    names = {"--batch-size-arg": "--bs", "--accumulation-arg": "-a", "--lr-arg": "--lr"}
    arguments, kept, remarks = apply_plan.rewritten([], scaled, names, {})
    assert arguments == ["--bs", "64", "-a", "1", "--lr", "0.1414213562"]
    assert kept.recipe.weight_decay == 0.1 and "weight_decay" not in kept.changes()  # it is not decided
    assert remarks == ["  weight_decay stays 0.1 in the script: the rule would make it 0.141421"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lr-scaling=sqrt",), "--lr-scaling goes with --batch-size=keep-global|max|N, which is not given"),
        (("--batch-size=most",), "--batch-size=most: must be keep-global, max, or a whole number of rows, 1 or more"),
        (("--batch-size=0",), "--batch-size=0: must be keep-global, max, or a whole number of rows, 1 or more"),
        (("--batch-size=max", "--lr-scaling=liner"), "--lr-scaling=liner: must be one of auto, linear, sqrt"),
        (("--batch-size=max", "--no-compile"), "--no-compile does not go with --batch-size, which compiles the step"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_runs(words, said):
    with pytest.raises(UsageError) as refused:
        apply_plan.is_asked_for(parse([*words, "train.py"], LAUNCH))
    assert str(refused.value).startswith(said)


def test_the_scripts_own_batch_size_option_is_the_scripts():
    line = parse(["train.py", "--batch-size", "8"], LAUNCH)
    assert line.arguments == ["--batch-size", "8"] and not apply_plan.is_asked_for(line)
    line = parse(["--batch-size-arg", "--batch-size", "--batch-size=16", "train.py"], LAUNCH)
    assert line.given == {"--batch-size-arg": "--batch-size", "--batch-size": "16"}


def group(lr: float, **more) -> Group:
    return Group(**{"name": "SGD", "lr": lr, "base": lr, "peak": lr, **more})


class Script:
    """Stands for the process that rehearses: makes groups of what is on the command line."""

    def __init__(self, groups, batch_size=None, accumulation_steps=None):
        self._groups, self._wanted = groups, (batch_size, accumulation_steps)
        self.runs = []

    def __call__(self, arguments, scaled) -> apply_plan.Rehearsed:
        self.runs.append(list(arguments))
        given = {name: float(value) for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
        rows, batches = self._wanted
        rows, batches = rows or int(given["--bs"]), batches or int(given.get("-a", 4))
        groups = self._groups(given.get("--lr", 0.1), rows * batches / 32)
        return apply_plan.Rehearsed(
            batch_size=rows,
            accumulation_steps=batches,
            first_step=FirstStep(calls=(rows,) * batches, groups=groups),
        )


NAMES = {"--batch-size-arg": "--bs", "--accumulation-arg": "-a", "--lr-arg": "--lr"}


def settled(script: Script, names=NAMES, applies="arguments", options={"--lr": 0.1}, **recipe) -> apply_plan.Settled:  # noqa: B006
    """32 rows a step become 64, under the linear rule: rates are to be doubled."""
    planned = script(["--bs", "8"], None).first_step
    script.runs.clear()
    content = {
        **plan(**{"lr": planned.groups[0].peak, **recipe}), "applies": applies, "options": options,
        "first_step": first_step.as_json(planned),
    }  # fmt: skip
    return apply_plan.settle([], apply_plan.decide(content, "max", "linear"), content, names, script)


def test_a_decision_that_holds_is_rehearsed_once():
    script = Script(lambda lr, rows: (group(lr / 25, base=lr, peak=lr, schedule="OneCycleLR"), group(10 * lr)))
    found = settled(script)
    assert script.runs == [["--bs", "64", "-a", "1", "--lr", "0.2"]] and list(found.arguments) == script.runs[0]
    assert found.first_step.groups[0].lr == pytest.approx(0.008) and found.first_step.calls == (64,)
    assert found.lines[-1] == (
        "  what the script's schedule counts in steps stays its own (OneCycleLR): a step is now 2 times as many rows"
    )


def test_the_scripts_own_scaling_is_made_up_for_or_is_the_rule():
    def own(lr, rows):
        return (group(lr * rows), group(10 * lr * rows))

    script = Script(own)
    found = settled(script)
    assert script.runs[-1] == ["--bs", "64", "-a", "1", "--lr", "0.1"] and len(script.runs) == 2
    assert [g.lr for g in found.first_step.groups] == pytest.approx([0.2, 2.0])
    assert (
        "  the script itself makes its rates 2 times as large with this batch: it is given --lr 0.1" in found.lines[-1]
    )
    unnamed = {"--batch-size-arg": "--bs", "--accumulation-arg": "-a"}
    assert settled(Script(own), unnamed).arguments == ("--bs", "64", "-a", "1")


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            lambda lr, rows: (group(lr), group(0.5)),
            "the script would not train as decided with --lr 0.2; nothing has been trained:\n"
            "  the learning rate of SGD: 1 decided, 0.5 in the script\nIs that the option for all of them?",
        ),
        (
            lambda lr, rows: (group(lr**2),),
            "with --lr 0.2; nothing has been trained:\n  the learning rate of SGD: 0.02 decided, 0.04 in the script\n"
            "and with that option changed to make up for it:\n  the learning rate of SGD: 0.02 decided, 0.01 in the",
        ),
        (lambda lr, rows: (group(0.3),), "  the learning rate of SGD: 0.6 decided, 0.3 in the script\n"),
    ],
)
def test_a_rate_that_its_option_does_not_give_is_refused_with_both_values(groups, said):
    with pytest.raises(UsageError) as refused:
        settled(Script(groups))
    assert said in str(refused.value)


def test_a_script_that_fails_with_what_makes_up_for_it_is_refused_with_both_values():
    def rehearse(arguments, scaled):
        if script.runs[1:]:
            raise UsageError("the script was not rehearsed")
        return script(arguments, scaled)

    script = Script(lambda lr, rows: (group(lr * rows),))
    content = {**plan(), "applies": "arguments", "options": {}, "first_step": None}
    content["first_step"] = first_step.as_json(script(["--bs", "8"], None).first_step)
    with pytest.raises(UsageError, match=r"0.2 decided, 0.4 in the script\n.*\n  the script was not rehearsed\n"):
        apply_plan.settle([], apply_plan.decide(content, "max", "linear"), content, NAMES, rehearse)


@pytest.mark.parametrize(
    ("script", "names", "said"),
    [
        (
            Script(lambda lr, rows: (group(lr),), batch_size=8), NAMES,
            "the batch size was decided to be 64, and the script's first step has 8: is --bs the option for it?",
        ),
        (
            Script(lambda lr, rows: (group(lr),)), {"--batch-size-arg": "--bs", "--lr-arg": "--lr"},
            "the number of accumulated batches is to change from 4 to 1, and nobody has said how: name the script's "
            "option for it, --accumulation-arg=--...",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_is_not_the_decided_one_is_refused(script, names, said):
    with pytest.raises(UsageError) as refused:
        settled(script, names)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("applies", "said"), [("script", "The script asks"), ("keras", "The optimizer has been changed")]
)
def test_who_else_was_to_change_it_is_named(applies, said):
    script = Script(lambda lr, rows: (group(0.1),), batch_size=64, accumulation_steps=1)
    with pytest.raises(UsageError, match=f"0.2 decided, 0.1 in the script\n{said}"):
        settled(script, applies=applies)


def test_the_cli_of_a_run_that_compiles_nothing_is_refused():
    line = parse(["--batch-size=64", "train.py"], LAUNCH)
    found = launch._contradictions(line, resolve({}, {"TRAININGCOMPILER": "0"}))
    assert found == [
        "TRAININGCOMPILER=0 leaves the steps to the framework, and --batch-size compiles them to see what they need; "
        "leave one of the two out"
    ]


def test_a_recommendation_reaches_the_worker_whole(monkeypatch):
    recipe = Recipe(batch_size=8, lr=1e-3, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, total_steps=100)
    scaled = rescale(recipe, batch_size=16, policy="adam")
    monkeypatch.setenv(*next(iter(recommendation.to_environment(scaled, "keras").items())))
    assert recommendation.planned() == recommendation.current() == recommendation.for_library("keras") == scaled
    assert recommendation.for_library("huggingface") is None
    assert recommendation.decided() is None  # a rehearsal finds out
    step = FirstStep(calls=(16,), groups=(Group(name="Adam", lr=0.1, base=0.2, peak=0.2, schedule="OneCycleLR"),))
    monkeypatch.setenv(*next(iter(recommendation.to_environment(scaled, "keras", step).items())))
    assert recommendation.decided() == step and recommendation.planned() == scaled
    monkeypatch.setattr(planner, "current", planner.Planner(rehearses=True))
    assert (
        recommendation.current() == recommendation.for_library("keras") == scaled and recommendation.decided() is None
    )
    monkeypatch.setattr(planner, "current", None)
    monkeypatch.delenv("TRAININGCOMPILER_RECIPE")
    assert recommendation.planned() is recommendation.current() is recommendation.for_library("keras") is None


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "folder" / "plan.json"
    write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]} and [path] == list(path.parent.iterdir())
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}


def test_a_full_disk_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_script_that_asks_is_not_changed_by_its_library_as_well(monkeypatch):
    waiting = planner.Planner()
    monkeypatch.setattr(planner, "current", waiting)
    assert recommendation.current() is None and recommendation.for_library("huggingface") is None
    waiting.tell("huggingface", lr=0.1)
    assert waiting.applies == "script"
