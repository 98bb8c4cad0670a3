"""Trains every architecture for a step, compiled and not, and writes what came of it into docs/models.md.

    .venv/bin/python tests/huggingface/write_models.py [--write docs/models.md] [--known LOG] [name ...]

Takes about half an hour on one core; what an interrupted run has printed is taken over with `--known`. Two steps of SGD
follow one in torch; each is one program.
"""

import argparse
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))

from architectures import ARCHITECTURES, Architecture
from parity import Run, assert_same, train

HEADING = "## Hugging Face architectures"
EQUAL = "equal"
STEPS = 3
WIDTH = 120
VERSION = torch.__version__.split("+")[0]


def outcome(architecture: Architecture) -> tuple[str, str]:
    """Trains one architecture.

    Returns:
        `"equal"`, `"eager"`, `"differs"` or `"not built"`, and why, if there is something to say.
    """
    generator = torch.Generator().manual_seed(1)
    try:
        torch.manual_seed(0)
        architecture.model()
        batch = architecture.batch(generator)
    except Exception as error:
        return "not built", _line(error)

    def run(compiled: bool, reverse: bool = False) -> Run:
        data = [{name: _reversed(value) for name, value in batch.items()} if reverse else batch] * STEPS
        return train(lambda: _made(architecture), _loop, data, compiled=compiled)

    try:
        eager, twin = run(False), run(False, reverse=True)
    except Exception as error:
        return "not built", f"eager PyTorch fails: {_line(error)}"
    compiled = run(True)
    if compiled.fallbacks():
        return "eager", compiled.fallbacks()[0].reason
    if compiled.statistics.launches not in (STEPS - 1, STEPS):  # a first forward that sets something up is torch's
        return "differs", f"{compiled.statistics.launches} programs in {STEPS} steps"
    try:
        assert_same(eager, compiled, twin)
    except AssertionError as error:
        return "differs", _line(error)
    return EQUAL, ""


def _made(architecture: Architecture) -> dict:
    model = architecture.model().train()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)}


def _loop(objects: dict, data: list) -> list[float]:
    losses = []
    for batch in data:
        objects["optimizer"].zero_grad()
        outputs = objects["model"](**batch)
        loss = outputs["loss"] if "loss" in outputs else outputs[0]
        loss.backward()
        objects["optimizer"].step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


def _reversed(value):
    return value.flip(0) if isinstance(value, torch.Tensor) else value


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].replace("|", "/")[:160]


def table(outcomes: list[tuple[Architecture, str, str]]) -> str:
    """The part of the page under `HEADING`."""
    counts = Counter(status for _, status, _ in outcomes)
    lines = [
        HEADING,
        "",
        textwrap.fill(
            f"Written by `tests/huggingface/write_models.py` (transformers {hf.__version__}, torch {VERSION}, on a "
            "CPU). Each architecture is as small as its configuration allows, random, in float32. Losses and weights "
            f"after {STEPS} steps of SGD are compared with eager's: they differ by at most "
            "three times what eager differs by when the rows of the batch are reversed, or by 1e-4.",
            WIDTH,
        ),
        "",
        textwrap.fill(
            "*equal*: forward, backward and step are one program, and it trains the same model. *eager*: torch runs "
            "the step, and one line says so. " + ", ".join(f"{n} {status}" for status, n in counts.most_common()) + ".",
            WIDTH,
        ),
        "",
        textwrap.fill(
            "`aten.item`, `aten._local_scalar_dense` and `aten.nonzero` ask for values in the middle of the forward, "
            "which one program cannot answer: which experts were hit (`experts_implementation='batched_mm'` does not "
            "ask), how long a sequence is, which labels are set.",
            WIDTH,
        ),
        "",
        "| family | architecture | model | outcome | why |",
        "|---|---|---|---|---|",
    ]
    for architecture, status, why in outcomes:
        made = getattr(architecture.auto, "__name__", "").removeprefix("AutoModelFor").removeprefix("Auto")
        lines.append(f"| {architecture.family} | {architecture.label} | {made} | {status} | {why} |")
    return "\n".join(lines) + "\n"


def replaced(page: str, part: str) -> str:
    """A page with the part under `HEADING` replaced, or added at its end."""
    pattern = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if not pattern.search(page):
        return page.rstrip("\n") + "\n\n" + part
    return pattern.sub(lambda found: part if found.end() == len(page) else part + "\n", page, count=1)


def _known(log: Path) -> dict[str, tuple[str, str]]:
    """The outcomes in the output of an earlier run."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    return {line[:32].strip(): (line[33:43].strip(), line[44:].strip()) for line in lines}


def main() -> None:
    """Reads the command line, trains, reports and, if asked to, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--known", type=Path, metavar="LOG", help="what an earlier run has printed")
    parser.add_argument("names", nargs="*", help="only these architectures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    known = _known(options.known) if options.known else {}
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for architecture in ARCHITECTURES:
            if not options.names or architecture.name in options.names:
                status, why = known.get(architecture.label) or outcome(architecture)
                outcomes.append((architecture, status, why))
                print(f"{architecture.label:<32} {status:<10} {why}", flush=True)
    if options.write:
        page = options.write.read_text(encoding="utf-8") if options.write.exists() else "# Models\n"
        options.write.write_text(replaced(page, table(outcomes)), encoding="utf-8")


if __name__ == "__main__":
    main()
