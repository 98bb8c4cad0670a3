"""Verdicts as a summary and as a page of documentation."""

import os
import tempfile
from collections import Counter
from pathlib import Path

FAILURES = ("mismatch", "crash", "too slow")
_STATUSES = ("passes", "unsupported", "excluded", *FAILURES)
_DTYPES = ("float32", "float64", "bfloat16", "int64", "bool")

_HEAD = """# Operators

Which operators of PyTorch's own `OpInfo` database a training step may contain. Each sample is run forward and, where
torch has gradients, backward, by the capture, the lowerings and the compiler that run a training step, and compared
with torch. `make conformance` writes this page: it takes torch {torch} and JAX {jax}.

* **passes**: every sample gives what torch gives, within `torch.testing.assert_close`'s tolerances for the dtype or
  the wider ones of PyTorch's own tests of the operator. Where two float32 or bfloat16 results differ by more,
  because an operator sums much or is badly conditioned, both are compared with float64, and ours may be no further
  from it than three times what torch's is at most, for these arguments and eight that differ from them by a bit ("as
  close to float64 as torch"). Operators that draw random numbers are compared by the distribution of 300 draws.
* **unsupported**: at least one sample cannot be captured or lowered; the note says why. A training step that contains
  it runs in torch, with one line that says so.
* **excluded**: no compiled step can contain it, or there is nothing to compare.

At most {samples} samples are taken of an operator and dtype, spread over those that PyTorch generates. Of the float32
entries that are not excluded, {share:.1%} pass.

"""


def share_of_float32(verdicts: list[dict]) -> float:
    """The share of float32 entries that pass, of those that are not excluded."""
    counts = Counter(verdict["status"] for verdict in verdicts if verdict["dtype"] == "float32")
    return counts["passes"] / max(1, sum(counts.values()) - counts["excluded"])


def _counts(verdicts: list[dict]) -> list[list[str]]:
    counts = Counter((verdict["dtype"], verdict["status"]) for verdict in verdicts)
    shown = [status for status in _STATUSES if any(counts[dtype, status] for dtype in _DTYPES)]
    return [["dtype", *shown], *([dtype, *(str(counts[dtype, status]) for status in shown)] for dtype in _DTYPES)]


def summary(verdicts: list[dict]) -> str:
    """A few lines for the terminal."""
    lines = ["  ".join(cell.rjust(11) for cell in row) for row in _counts(verdicts)]
    return "\n".join([*lines, f"{share_of_float32(verdicts):.1%} of the float32 entries that are not excluded pass"])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, body)])


def write(path: Path, verdicts: list[dict]) -> None:
    """Writes the page, all of it or nothing."""
    import jax
    import torch
    from conformance import SAMPLES

    head = _HEAD.format(
        torch=torch.__version__.split("+")[0],
        jax=jax.__version__,
        samples=SAMPLES,
        share=share_of_float32(verdicts),
    )
    rows = [["operator", "dtype", "status", "note"]]
    rows += [[f"`{v['operator']}`", v["dtype"], v["status"], v["note"]] for v in verdicts]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as page:
        page.write(f"{head}{_table(_counts(verdicts))}\n\n{_table(rows)}\n")
    os.chmod(page.name, 0o644)
    os.replace(page.name, path)
