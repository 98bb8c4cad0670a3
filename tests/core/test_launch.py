"""The launcher's command line."""

import os

import pytest

from trainingcompiler import config, launch
from trainingcompiler.cli import apply_plan
from trainingcompiler.cli.job import Job
from trainingcompiler.cli.parser import parse
from trainingcompiler.errors import UsageError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for variable in config.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Runs the launcher in a folder with a script, its worker replaced by a list of what it was asked to start."""
    calls: list[Job] = []
    monkeypatch.setitem(launch._LAUNCHERS, "local", calls.append)
    monkeypatch.setattr("trainingcompiler.targets.huge_pages.variables", lambda environ: {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "package").mkdir()
    return calls


def words_and_variables(jobs: list[Job]) -> list[tuple]:
    return [(list(job.arguments), job.variables) for job in jobs]


def refusal(capsys, *words: str) -> str:
    """Returns what the launcher says, after asserting that it refuses."""
    with pytest.raises(SystemExit) as leaving:
        launch.main(words)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("trainingcompiler.launch: ").rstrip("\n")


def test_options_become_variables_and_the_scripts_words_are_untouched(started):
    words = ["--engine=xla", "--cache_size_gb", "2", "--keep-gradients", "train.py", "--epochs", "3", "-x", "a b", ""]
    launch.main(words)
    assert words_and_variables(started) == [
        (
            ["script", "train.py", "--epochs", "3", "-x", "a b", ""],
            {
                "TRAININGCOMPILER_ENGINE": "xla",
                "TRAININGCOMPILER_CACHE_SIZE_GB": "2",
                "TRAININGCOMPILER_KEEP_GRADIENTS": "1",
            },
        )
    ]


def test_no_compile_turns_everything_off(started, monkeypatch):
    monkeypatch.setattr("trainingcompiler.targets.huge_pages.variables", lambda environ: {"GLIBC_TUNABLES": "x"})
    launch.main(["--no_compile", "--launcher", "local", "train.py"])
    assert words_and_variables(started) == [(["script", "train.py"], {"TRAININGCOMPILER": "0"})]


def test_the_worker_is_started_with_huge_pages_unless_told_otherwise(started, monkeypatch):
    monkeypatch.setattr("trainingcompiler.targets.huge_pages.variables", lambda environ: {"GLIBC_TUNABLES": "x"})
    launch.main(["train.py"])
    launch.main(["--small-pages", "train.py"])
    monkeypatch.setenv("TRAININGCOMPILER_SMALL_PAGES", "1")
    launch.main(["train.py"])
    assert [job.variables for job in started] == [
        {"GLIBC_TUNABLES": "x"},
        {"TRAININGCOMPILER_SMALL_PAGES": "1"},
        {},
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "package.train", "--epochs", "3"], ["module", "package.train", "--epochs", "3"]),
        (["--module=package.train", "-m", "--", "--debug"], ["module", "package.train", "-m", "--", "--debug"]),
        (["--", "train.py", "--debug"], ["script", "train.py", "--debug"]),
        (["--", "-m", "package.train", "--debug"], ["module", "package.train", "--debug"]),
        (["train.py", "--", "--debug"], ["script", "train.py", "--", "--debug"]),
        (["train.py", "--help", "-h"], ["script", "train.py", "--help", "-h"]),
    ],
)
def test_modules_and_separators(started, words, expected):
    launch.main(words)
    assert words_and_variables(started) == [(expected, {})]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engin", "xla", "train.py"], "--engin is not an option; did you mean --engine?"),
        (["--zzzzzz", "train.py"], "--zzzzzz is not an option; python -m trainingcompiler.launch --help lists them"),
        (["--debug", "--debug", "train.py"], "--debug is given twice; give it once"),
        (["--cache-dir", "a", "--cache_dir=b", "train.py"], "--cache-dir is given twice; give it once"),
        (["--engine"], "--engine needs a value: --engine auto|xla|eager|tensorflow"),
        (["--engine", "--debug", "train.py"], "--engine needs a value: --engine auto|xla|eager|tensorflow"),
        (["-m"], "--module needs a value: --module NAME"),
        (["--debug=1", "train.py"], "--debug=1: --debug takes no value"),
        (["--engine=xl", "train.py"], "--engine=xl: must be one of auto, xla, eager, tensorflow; did you mean xla?"),
        (
            ["--launcher=loca", "train.py"],
            "--launcher=loca: must be one of local, elastic, slurm, ray, kubernetes; did you mean local?",
        ),
        (["package"], "package is a folder, not a script; name a file in it, or use -m for a package"),
    ],
)
def test_bad_input_is_answered_and_nothing_is_started(started, capsys, words, said):
    assert refusal(capsys, *words) == said
    assert started == []


@pytest.mark.parametrize("words", [[], ["--debug"], ["--"]])
def test_no_script(started, capsys, words):
    assert refusal(capsys, *words).startswith("no script is given: python -m trainingcompiler.launch [options] script")


def test_a_script_that_does_not_exist(started, capsys, tmp_path):
    expected = f"there is no script trian.py (looked for from {os.getcwd()}); did you mean train.py?"
    assert refusal(capsys, "trian.py") == expected
    assert "did you mean" not in refusal(capsys, os.path.join("nowhere", "train.py"))


def test_a_script_that_cannot_be_read(started, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert refusal(capsys, "train.py") == "train.py cannot be read; check its permissions"


@pytest.mark.parametrize("word", ["--engine=xla", "--no_compile", "--module"])
def test_an_option_of_ours_after_the_script_is_refused_with_both_ways_out(started, capsys, word):
    said = refusal(capsys, "train.py", "--epochs", "3", word)
    assert said.startswith(f"{word} stands after the script")
    assert f"python -m trainingcompiler.launch {word} ... train.py" in said
    assert f"python -m trainingcompiler.launch -- train.py {word} ..." in said
    assert started == []


def test_mistakes_in_flags_and_environment_are_told_together(started, capsys, monkeypatch):
    monkeypatch.setenv("TRAININGCOMPILER_ENGNE", "xla")
    said = refusal(capsys, "--fallback=none", "train.py")
    assert "did you mean TRAININGCOMPILER_ENGINE?" in said
    assert "--fallback=none: must be one of eager, error" in said


def test_mistakes_in_script_configuration_and_job_are_told_together(started, capsys):
    words = ["--engine=xl", "--nproc-per-node=0", "--max-restarts=x", "trian.py"]
    title, *told = refusal(capsys, *words).split("\n  - ")
    assert title == "4 mistakes in the configuration:"
    starts = ("there is no script trian.py", "--engine=xl: must", "--nproc-per-node=0: must", "--max-restarts=x: must")
    assert [text.startswith(start) for text, start in zip(told, starts, strict=True)] == [True] * 4
    title, *told = refusal(capsys, "--devices=2", "--no-compile", "--nproc-per-node=2", "--tee=5", "train.py").split(
        "\n  - "
    )
    assert [text.partition(" ")[0] for text in told] == ["--devices=2", "--devices=2", "--tee=5:"]
    assert started == []


def test_print_config_shows_sources_and_starts_nothing(started, capsys, monkeypatch):
    monkeypatch.setenv("TRAININGCOMPILER_QUIET", "1")
    with pytest.raises(SystemExit) as leaving:
        launch.main(["--engine", "xla", "--print-config", "train.py"])
    assert leaving.value.code == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["engine", "xla", "--engine"] in rows
    assert ["quiet", "true", "TRAININGCOMPILER_QUIET"] in rows
    assert started == []


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as leaving:
        launch.main(["-h"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert [name for name in launch.LAUNCH.options if name not in shown] == []


def test_every_field_of_the_configuration_has_its_option():
    fields = {option.field: name for name, option in launch.LAUNCH.options.items() if option.field}
    assert fields == {name: config.flag_of(name) for name in config.FIELDS}


def test_parse_raises_what_main_prints():
    with pytest.raises(UsageError, match="is not an option"):
        parse(["--nope"], launch.LAUNCH)


def test_what_a_launcher_around_this_one_recommends_is_not_passed_on(started, monkeypatch):
    monkeypatch.setenv(config.RECIPE, "{}")
    launch.main(["train.py"])
    assert len(started) == 1 and config.RECIPE not in os.environ


def test_another_batch_is_planned_and_applied(started, monkeypatch, capsys):
    applied = apply_plan.Applied(arguments=("--bs", "32"), variables={"A": "1"}, lines=("keep-global",))
    monkeypatch.setattr(apply_plan, "apply", lambda line, folder: applied)
    launch.main(["--batch-size=keep-global", "--quiet", "train.py", "--bs", "8"])
    assert words_and_variables(started) == [
        (["script", "train.py", "--bs", "32"], {"TRAININGCOMPILER_QUIET": "1", "A": "1"})
    ]
    assert capsys.readouterr().err == "[batch]      keep-global\n"
