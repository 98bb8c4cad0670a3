"""Runs an ordinary script twice, by itself and through the launcher, and compares what it prints.

Scripts print numbers in float64. What the compiled run says about itself is on standard error.
"""

import atexit
import functools
import json
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

TOLERANCE = 1e-7  # relative, in float64: orders of summation differ by 1e-13, and 20 steps may amplify it

PREAMBLE = """
import torch
from torch import nn
from torch.nn import functional as F

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
DATA = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(24)]

def mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))

def report(*models):
    for model in models:
        print("parameters", *(value.double().sum().item() for value in model.state_dict().values()))
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One run of a script.

    Attributes:
        out: The lines of its standard output.
        said: The lines of its standard error.
    """

    out: list[str]
    said: list[str]

    def lines(self, tag: str) -> list[str]:
        """What was said under a tag such as `fallback`."""
        return [line for line in self.said if line.startswith(f"[{tag}]")]

    @property
    def compiled_steps(self) -> int:
        """How many steps ran as a compiled program."""
        (done,) = self.lines("done")
        found = re.search(r"\((\d+) compiled", done)
        steps = re.search(r"(\d+) steps?", done)
        assert steps is not None
        return int(found.group(1)) if found else int(steps.group(1))

    @property
    def compiles(self) -> int:
        """How many programs were compiled."""
        found = re.search(r"(\d+) compiles?\b", self.lines("done")[0])
        return int(found.group(1)) if found else 0


@functools.cache
def _forks() -> subprocess.Popen:
    server = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    atexit.register(process.communicate)
    return process


def _run(script: str, folder: Path, **command) -> Ran:
    path = folder / "train.py"
    path.write_text(PREAMBLE + textwrap.dedent(script))
    print(json.dumps({"script": str(path), **command}), file=_forks().stdin)
    code = _forks().stdout.readline()
    out, said = (Path(f"{path}.{name}").read_text() for name in ("out", "err"))
    assert code == "0\n", said
    return Ran(out=out.splitlines(), said=said.splitlines())


def plainly(script: str, folder: Path) -> Ran:
    """Runs a script, after `PREAMBLE`, by itself."""
    return _run(script, folder)


def run(script: str, folder: Path, *options: str) -> Ran:
    """Runs a script, after `PREAMBLE`, through the launcher."""
    return _run(script, folder, options=options, environment={"XDG_CACHE_HOME": str(folder / "cache")})


def holds(script: str, folder: Path, *, says: str | None = None, line: str | None = None, notes: int = 0) -> Ran:
    """Asserts that a script prints the same numbers compiled as eagerly.

    Args:
        script: What follows `PREAMBLE`.
        folder: A temporary one.
        says: A part of the reason why steps run eagerly; None if all steps but the first must be compiled.
        line: The text of the script's line that the reason has to name; with `says`.
        notes: How many reasons to run single steps eagerly may be noted, without `says`.

    Returns:
        The compiled run.
    """
    eager = plainly(script, folder)
    compiled = run(script, folder, "--engine=xla")
    assert eager.out, "the script prints nothing"
    same(eager.out, compiled.out)
    eagerly = [text for text in compiled.said if text.startswith("[fallback]") or "ran eagerly" in text]
    if says is None:
        assert len(eagerly) <= notes and not compiled.lines("fallback"), eagerly
        assert compiled.compiled_steps >= 20, compiled.said
        return compiled
    assert says and line, "a loop that runs eagerly says why and where"
    numbers = [n for n, text in enumerate((folder / "train.py").read_text().splitlines(), 1) if line in text]
    assert any(says in text and f"train.py:{n}: " in text for n in numbers for text in eagerly), (
        numbers,
        compiled.said,
    )
    return compiled


def same(eager: list[str], compiled: list[str]) -> None:
    """Asserts that two outputs are equal up to rounding."""
    assert len(eager) == len(compiled), (eager, compiled)
    for right, judged in zip(eager, compiled, strict=True):
        for one, other in zip(right.split(), judged.split(), strict=True):
            try:
                a, b = float(one), float(other)
            except ValueError:
                assert one == other, (right, judged)
                continue
            assert math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (right, judged)
