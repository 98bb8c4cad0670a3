"""Plans kept between runs: what a compiled program needs does not change until the program does."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from trainingcompiler.cache.executables import key_of
from trainingcompiler.config import TrainingCompilerConfig, default_cache_dir
from trainingcompiler.files import write_json
from trainingcompiler.planning.report import from_json
from trainingcompiler.planning.search import PlannedBatch
from trainingcompiler.program import StepProgram
from trainingcompiler.targets.target import Target


@dataclass(frozen=True, slots=True)
class PlanStore:
    """A folder of plans, a kilobyte each; None keeps nothing."""

    folder: Path | None

    @classmethod
    def of(cls, config: TrainingCompilerConfig) -> "PlanStore":
        """The store beside the executables that a configuration keeps."""
        base = Path(config.cache_dir or default_cache_dir()).expanduser()
        return cls(base / "plans" if config.cache_size_gb else None)

    def load(self, program: StepProgram, target: Target) -> PlannedBatch | None:
        """The plan of a program on a target; None if it is not kept or cannot be understood."""
        path = self._path(program, target)
        try:
            return None if path is None else from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, program: StepProgram, target: Target, batch: PlannedBatch) -> None:
        """Keeps a plan."""
        path = self._path(program, target)
        if path is None:
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(batch))

    def _path(self, program: StepProgram, target: Target) -> Path | None:
        if self.folder is None or program.digest is None:
            return None
        return self.folder / f"{key_of(program, target)}-{target.key}.json"
