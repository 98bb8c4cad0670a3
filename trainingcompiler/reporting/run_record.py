"""The run record: what a run was, as one JSON file, written when it ends."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainingcompiler._version import __version__
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.files import write_json
from trainingcompiler.reporting import events
from trainingcompiler.reporting.statistics import RunStatistics


class RunRecord:
    """Collects the events of a run, and writes them down at its end.

    Args:
        path: The file. Its folder is made where there is none.
        config: The options that hold.
        decided: What the launcher has decided about batch and rates, as plain data.
    """

    def __init__(self, path: Path, config: TrainingCompilerConfig, decided: Mapping[str, Any]):
        self._path = path
        self._content: dict[str, Any] = {
            "trainingcompiler": __version__,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": sys.version.split()[0],
            "config": dataclasses.asdict(config),
            **decided,
        }

    def __call__(self, event: events.Event) -> None:
        """Notes one event; the last one writes the file."""
        if isinstance(event, events.Started):
            self._content |= {name: value for name, value in _plain(event).items() if value}
        elif type(event) in _LISTS:
            self._content.setdefault(_LISTS[type(event)], []).append(_plain(event))
        elif isinstance(event, events.Ended):
            self._write(event.statistics)

    def _write(self, statistics: RunStatistics) -> None:
        counts = {name: value for name, value in _plain(statistics).items() if not name.startswith("_")}
        del counts["started_s"]  # a reading of a clock that means nothing to another process
        self._content["command"] = list(sys.argv)  # by now the script's own
        self._content["run"] = {**counts, "step_time_s": statistics.step_time_s}
        try:
            write_json(self._path, self._content)
        except OSError as error:  # a full disk is no reason for a finished training to fail
            events.emit(events.Note(text=f"the run record was not written to {self._path}: {error}"))
            return
        events.emit(events.Note(text=f"what this run was: {self._path}"))


_LISTS: dict[type, str] = {
    events.EngineChosen: "engines",
    events.FellBack: "fallbacks",
    events.Recompiled: "recompiles",
}


def keep(config: TrainingCompilerConfig, decided: Mapping[str, Any]) -> Callable[[], None]:
    """Starts to record; returns what ends it without a file."""
    assert config.record is not None
    return events.subscribe(RunRecord(Path(config.record).expanduser().absolute(), config, decided))


def _plain(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
