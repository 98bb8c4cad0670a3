"""The commands under one name: `trainingcompiler launch`, `plan` and `check`."""

import subprocess
import sys

import pytest

from trainingcompiler.__main__ import COMMANDS, main


def test_a_command_is_the_module_of_its_name(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys; print(sys.argv[1:])")
    for command in (
        [sys.executable, "-m", "trainingcompiler", "launch"],
        [sys.executable, "-m", "trainingcompiler.launch"],
    ):
        done = subprocess.run([*command, "--no-compile", script, "--epochs", "3"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "['--epochs', '3']\n"), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code in (0, None) and f"trainingcompiler.{command}" in capsys.readouterr().out


def test_without_a_command_all_are_listed(capsys):
    for words, code in ([], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as leaving:
            main(words)
        shown = capsys.readouterr()
        assert leaving.value.code == code and all(name in shown.out + shown.err for name in COMMANDS)


def test_a_command_that_there_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["lunch", "train.py"])
    said = "trainingcompiler: lunch is no command of launch, plan, check; did you mean launch?\n"
    assert capsys.readouterr().err == said
