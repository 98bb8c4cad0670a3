"""Which layers are divided by columns, and which by rows."""

import re

import pytest

from trainingcompiler.errors import UsageError
from trainingcompiler.parallel import layer_rules as rules


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch):
    monkeypatch.setattr(rules, "_given", {})


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        ("transformer.h.0.attn.c_attn", "column"),
        ("transformer.h.0.mlp.c_proj", "row"),
        ("bert.encoder.layer.1.attention.self.query", "column"),
        ("bert.encoder.layer.1.attention.output.dense", "row"),
        ("encoder.block.0.layer.0.SelfAttention.o", "row"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "column"),
        ("vit.layers.0.attention.q_proj", "column"),
        ("model.layers.3.mlp.down_proj", "row"),
        ("model.embed_tokens", "row"),
        ("pooler", None),
    ],
)
def test_the_transformers_that_the_tests_train_are_known(layer, side):
    assert rules.side_of(layer) == side


def test_a_given_rule_wins_over_the_models_own_and_that_over_the_built_in_one():
    assert rules.side_of("h.0.up_proj", {"*.up_proj": "row"}) == "row"
    rules.tensor_parallel({"h.*.up_proj": "column"})
    assert rules.side_of("h.0.up_proj", {"*.up_proj": "row"}) == "column"


def test_a_rule_is_a_column_or_a_row():
    with pytest.raises(UsageError, match=re.escape("a rule is \"column\" or \"row\", not 'up': 'colum'")):
        rules.tensor_parallel({"up": "colum", "down": "row"})
    assert rules.side_of("down") is None
