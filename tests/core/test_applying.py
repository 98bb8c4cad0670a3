"""What the launcher makes of a plan: which batch, which rule, which of the script's options."""

import json
from pathlib import Path

import pytest

from trainingcompiler import applying, planner, recommended
from trainingcompiler.command_line import parse
from trainingcompiler.errors import UsageError
from trainingcompiler.files import write_json
from trainingcompiler.launch import LAUNCH
from trainingcompiler.scaling import Recipe, keep_global_sizes, rescale


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
    scaled = applying.decide(plan(largest=16), "keep-global", "auto")
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
    recipe = applying.decide(plan(), size, "auto").recipe
    assert (recipe.batch_size, recipe.accumulation_steps) == (batch, accumulated)
    assert recipe.lr == pytest.approx(lr)


def test_a_batch_that_does_not_fit_is_refused_with_its_numbers():
    said = "a batch of 8 does not fit a GPU: it needs 1,234 bytes of 1,000. python -m trainingcompiler.plan says what"
    for size, largest in (("max", None), ("8", 4)):
        with pytest.raises(UsageError, match=said):
            applying.decide(plan(largest), size, "auto")


def test_the_scripts_own_options_are_rewritten():
    scaled = applying.decide(plan(), "max", "linear")
    names = {"--batch-size-arg": "--bs", "--accumulation-arg": "-a", "--lr-arg": "--lr"}
    arguments, remarks = applying.rewritten(["--bs=8", "data", "--lr", "0.1", "-a", "4"], scaled, names)
    assert arguments == ["--bs=64", "data", "--lr", "0.2", "-a", "1"] and remarks == []
    # A script that is given twice the rate that its optimizer has keeps the relation.
    arguments, _ = applying.rewritten(["--lr", "0.2"], scaled, names)
    assert arguments == ["--lr", "0.4", "--bs", "64", "-a", "1"]


def test_what_nobody_has_named_an_option_for():
    scaled = applying.decide(plan(optimizer="AdamW", weight_decay=0.1), "max", "auto")
    with pytest.raises(UsageError, match=r"the batch size is to change from 8 to 64, and nobody has said how: name"):
        applying.rewritten([], scaled, {})
    names = {"--batch-size-arg": "--bs", "--accumulation-arg": "-a", "--lr-arg": "--lr"}
    arguments, remarks = applying.rewritten([], scaled, names)
    assert arguments == ["--bs", "64", "-a", "1", "--lr", "0.1414213562"]
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
        applying.is_asked_for(parse([*words, "train.py"], LAUNCH))
    assert str(refused.value).startswith(said)


def test_the_scripts_own_batch_size_option_is_the_scripts():
    line = parse(["train.py", "--batch-size", "8"], LAUNCH)
    assert line.arguments == ["--batch-size", "8"] and not applying.is_asked_for(line)
    line = parse(["--batch-size-arg", "--batch-size", "--batch-size=16", "train.py"], LAUNCH)
    assert line.given == {"--batch-size-arg": "--batch-size", "--batch-size": "16"}


def test_a_recommendation_reaches_the_worker_whole(monkeypatch):
    recipe = Recipe(batch_size=8, lr=1e-3, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, total_steps=100)
    scaled = rescale(recipe, batch_size=16, policy="adam")
    monkeypatch.setenv(*next(iter(recommended.to_environment(scaled, "keras").items())))
    assert recommended.planned() == recommended.current() == recommended.for_library("keras") == scaled
    assert recommended.for_library("huggingface") is None
    monkeypatch.delenv("TRAININGCOMPILER_RECIPE")
    assert recommended.planned() is recommended.current() is recommended.for_library("keras") is None


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
    assert recommended.current() is None and recommended.for_library("huggingface") is None
    waiting.tell("huggingface", lr=0.1)
    assert waiting.applies == "script"
