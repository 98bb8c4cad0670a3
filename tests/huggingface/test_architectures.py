"""The table of architectures: what it claims is there to be run, and rewriting it leaves the rest of the page alone."""

import re
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from write_models import EQUAL, HEADING, outcome, replaced, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows() -> dict[str, tuple[str, str]]:
    """Architecture to outcome and reason, as the page has them."""
    part = PAGE.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    return {name: (status, why) for _, name, _, status, why in cells[1:]}


def test_the_page_has_every_architecture_and_at_least_sixty_are_equal():
    found = rows()
    assert set(found) == {architecture.label for architecture in ARCHITECTURES}
    assert sum(status == EQUAL for status, _ in found.values()) >= 60
    assert all(why for status, why in found.values() if status != EQUAL)
    assert not [name for name, (status, _) in found.items() if status == "differs"]
    families = {architecture.family for architecture in ARCHITECTURES}
    assert families == {"decoder", "encoder", "encoder-decoder", "vision", "audio", "multimodal", "series"}


# One of each kind that compiles quickly, and one that does not compile; `make models` runs all.
@pytest.mark.parametrize("name", ["mamba2", "distilbert", "wav2vec2", "patchtst", "xlm"])
def test_an_outcome_is_what_the_page_says(name):
    architecture = next(one for one in ARCHITECTURES if one.label == name)
    assert outcome(architecture) == rows()[name]


def test_only_our_part_of_the_page_is_replaced():
    part = table([(ARCHITECTURES[0], EQUAL, "")])
    assert f"| {ARCHITECTURES[0].family} | {ARCHITECTURES[0].label} |" in part and part.startswith(HEADING)
    before, after = "# Models\n\n## Keras\n\n| a |\n\n", "## Others\n\nText.\n"
    page = before + HEADING + "\n\nold\n\n" + after
    new = replaced(page, part)
    assert new == before + part + "\n" + after and "old" not in new
    assert replaced(new, part) == new
    assert replaced(before, part) == before + part
    assert re.search(r"^## Keras$", replaced(before, part), re.MULTILINE)
