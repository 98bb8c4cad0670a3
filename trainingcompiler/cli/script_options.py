"""The numbers that a script's options have, as its own parser gives them: argparse, what builds on it, and click.

Only where a script is planned: the value that an option has without being given is known to nobody else.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from trainingcompiler.adapters.import_hooks import after_import


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Collects, for every option that is parsed inside, each of its names and its value, if it is a number."""
    seen: dict[str, float] = {}
    parse = argparse.ArgumentParser.parse_known_args
    undo = []

    def parse_known_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse(parser, *args, **kwargs)
        for action in parser._actions:
            _note(seen, action.option_strings, getattr(namespace, action.dest, None))
        return namespace, rest

    def watch_click() -> None:
        parameter = sys.modules["click.core"].Parameter
        handle = parameter.handle_parse_result

        def handle_parse_result(option: Any, *args: Any, **kwargs: Any) -> Any:
            value, rest = handle(option, *args, **kwargs)
            _note(seen, option.opts, value)
            return value, rest

        parameter.handle_parse_result = handle_parse_result
        undo.append(lambda: setattr(parameter, "handle_parse_result", handle))

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
    undo.append(after_import("click.core", watch_click))
    try:
        yield seen
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
        for function in undo:
            function()


def _note(seen: dict[str, float], names: Sequence[str], value: Any) -> None:
    with contextlib.suppress(TypeError, ValueError):  # no number
        if not isinstance(value, bool):
            seen.update(dict.fromkeys(names, float(value)))
