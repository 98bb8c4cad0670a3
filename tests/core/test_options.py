"""The values of a script's options, as its parser gives them."""

import argparse

import pytest

from trainingcompiler.cli import script_options


def test_what_argparse_makes_of_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", "--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--name", default="x")
    parser.add_argument("--flag", action="store_true")
    parse = argparse.ArgumentParser.parse_known_args
    with script_options.watched() as seen:
        parsed = parser.parse_args(["--bs=16"])
        parsed.lr *= 2  # what the script makes of it is not the option's value
    assert seen == {"--lr": 1e-3, "--learning-rate": 1e-3, "--bs": 16.0}
    assert argparse.ArgumentParser.parse_known_args is parse


def test_commands_below_commands():
    parser = argparse.ArgumentParser()
    train = parser.add_subparsers().add_parser("train")
    train.add_argument("--lr", type=float, default=0.5)
    with script_options.watched() as seen:
        parser.parse_args(["train"])
    assert seen == {"--lr": 0.5}


def test_what_click_makes_of_options():
    click = pytest.importorskip("click")

    @click.command()
    @click.option("--lr", default=0.125)
    @click.option("--name", default="x")
    def main(lr, name):
        assert (lr, name) == (0.125, "x")

    handle = click.core.Parameter.handle_parse_result
    with script_options.watched() as seen:
        main([], standalone_mode=False)
    assert seen == {"--lr": 0.125} and click.core.Parameter.handle_parse_result is handle
