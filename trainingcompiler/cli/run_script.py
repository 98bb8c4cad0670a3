"""Runs a script in this process as `python` would."""

import builtins
import contextlib
import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
from types import CodeType, ModuleType, TracebackType
from typing import Any

import trainingcompiler
from trainingcompiler.config import resolve
from trainingcompiler.errors import ConfigError, UsageError
from trainingcompiler.processes import error_file, rendezvous, xla_flags
from trainingcompiler.reporting import events, statistics

BAD_INPUT = 2
_HERE = os.path.dirname(trainingcompiler.__file__) + os.sep


def run(kind: str, name: str, *arguments: str) -> None:
    """Runs a `"script"` or `"module"`, sums up, and leaves with the script's exit code.

    A script that succeeds without one optimizer step, although its steps were to be compiled, is told so; where no
    fallback is wanted, it exits with code 2.
    """
    error_file.begin(os.environ)
    try:
        config = resolve({}, os.environ).config
        enabled = config.enabled
        xla_flags.check(os.environ)
        note = rendezvous.share_gpus(os.environ) if enabled else ""
        rendezvous.join(os.environ, compiled=enabled, script=(kind, name))
        trainingcompiler.enable()
    except (ConfigError, UsageError) as error:
        _refuse(error)
    if note:
        events.emit(events.Note(text=note))
    sys.argv[:] = ["-m" if kind == "module" else name, *arguments]
    process = os.getpid()
    succeeded = False
    try:
        code = _prepare_module(name) if kind == "module" else _prepare_file(name)
        exec(code, vars(sys.modules["__main__"]))
        succeeded = True
    except UsageError as error:
        _refuse(error)
    except SystemExit as leaving:
        succeeded = leaving.code in (None, 0)
        if not succeeded:
            rendezvous.abandon(leaving.code if isinstance(leaving.code, int) else 1)
        raise
    except BaseException as error:
        _hide_our_frames()
        rendezvous.abandon(-signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
        raise
    finally:
        if enabled and os.getpid() == process:  # a child forked by the script comes past here as well
            _finish(succeeded, may_fall_back=config.fallback != "error")


def _finish(succeeded: bool, may_fall_back: bool) -> None:
    trained = statistics.current().steps > 0
    if trained or succeeded:
        events.end()
    else:
        events.forget_end()  # what failed is told by the traceback, which is to be the last word
    if succeeded and not trained and not may_fall_back:
        sys.exit(BAD_INPUT)


def _refuse(error: Exception) -> None:
    text = f"trainingcompiler: {error}\n"
    if not error_file.tell(text):
        sys.stderr.write(text)
    rendezvous.abandon(BAD_INPUT)
    sys.exit(BAD_INPUT)


def _prepare_file(path: str) -> CodeType:
    """Makes `__main__` and `sys.path` what `python path` makes them, and returns the script's code."""
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    absolute = os.path.abspath(path)
    loader = importlib.machinery.SourceFileLoader("__main__", absolute)
    # No spec: a process that multiprocessing spawns then imports the script by its path, as it does without us.
    _new_main(__file__=absolute, __loader__=loader, __spec__=None, __package__=None, __cached__=None)
    return loader.source_to_code(loader.get_data(absolute), absolute)


def _prepare_module(name: str) -> CodeType:
    """Makes `__main__` and `sys.argv` what `python -m name` makes them, and returns the module's code."""
    spec = _spec_of(name)
    code = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
    _new_main(
        __file__=spec.origin, __loader__=spec.loader, __spec__=spec, __package__=spec.parent, __cached__=spec.cached
    )
    sys.argv[0] = spec.origin or name
    return code


def _spec_of(name: str) -> importlib.machinery.ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that a parent package imports
        spec = None
    if spec is None:
        raise UsageError(f"there is no module {name} (looked for from {os.getcwd()}, and where packages are installed)")
    return spec


def _new_main(**attributes: Any) -> None:
    main_module = ModuleType("__main__")
    vars(main_module).update(attributes, __builtins__=builtins)
    sys.modules["__main__"] = main_module


def _hide_our_frames() -> None:
    """Lets the traceback begin at the script, whoever prints it: a script may have its own `sys.excepthook`.

    The exception itself goes on to the interpreter, whose handling of exit codes and of Ctrl-C is then the script's.
    """
    show = sys.excepthook
    process = os.getpid()

    def show_from_script(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith((_HERE, "<frozen ")):
            trace = trace.tb_next
        error = error.with_traceback(trace)
        if not error_file.are_told_elsewhere() or os.getpid() != process:
            show(kind, error, trace)
            return
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown):
            show(kind, error, trace)
        if not error_file.tell(shown.getvalue(), error):
            sys.stderr.write(shown.getvalue())

    sys.excepthook = show_from_script
