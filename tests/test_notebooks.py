"""The notebooks run from top to bottom, made short where they train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SHORTER = {
    "huggingface_finetune.ipynb": {"STEPS = 100": "STEPS = 6", "EXAMPLES = 300": "EXAMPLES = 20",
                                   "MAX_LENGTH = 48": "MAX_LENGTH = 12", "train_batch_size=16": "train_batch_size=4"},
    "pytorch_quickstart.ipynb": {"epochs=5": "epochs=2"},
    "plan_a_run.ipynb": {'"16,64,256,1024"': '"16,64"'},
}  # fmt: skip


def code_of(notebook: Path) -> str:
    """The code cells, one after the other."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_notebook_is_run():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == {*SHORTER, "keras_fit.ipynb"}  # see tests/keras


@pytest.mark.parametrize("name", SHORTER)
def test_a_notebook_runs(name, tmp_path):
    code = code_of(NOTEBOOKS / name)
    for long, short in SHORTER[name].items():
        assert long in code, f"{name} does not say {long} any more"
        code = code.replace(long, short)
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    environment = os.environ | {
        "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "TRAININGCOMPILER_ENGINE": "xla",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if name == "plan_a_run.ipynb":
        _planned(run.stdout)
        return
    assert "compiled: yes" in run.stderr and "[fallback]" not in run.stderr
    assert "largest difference of any" in run.stdout


def _planned(said: str) -> None:
    """The batch that keeps the global one trains the same model; the larger one is scaled."""
    assert "largest that fits: 64" in said
    as_it_is, same, larger = said.splitlines()[-3:]
    assert as_it_is.startswith("batch 16 x 4, lr 0.001: loss ") and same.startswith("batch 64 x 1, lr 0.001: loss ")
    assert larger.startswith("batch 256 x 1, lr 0.002: loss ")
    # The same sums in another order, float32, 84 steps.
    assert float(same.split()[-1]) == pytest.approx(float(as_it_is.split()[-1]), rel=0.05)
