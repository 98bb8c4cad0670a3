"""Which dim of each weight is divided between devices that share a layer: column and row rules on layers' names.

The first of two products is divided by columns and the second by rows, so that what is between them stays where it is
and one sum over the devices ends each pair (Megatron-LM, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053,
section 3). A rule decides how fast the step is and what fits, not what it computes.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from trainingcompiler.errors import UsageError

Side = Literal["column", "row"]
Rules = Mapping[str, Side]

FAMILIES: Rules = {
    # GPT-2
    "*.attn.c_attn": "column",
    "*.attn.c_proj": "row",
    "*.mlp.c_fc": "column",
    "*.mlp.c_proj": "row",
    "*wte": "row",
    # BERT
    "*.attention.self.query": "column",
    "*.attention.self.key": "column",
    "*.attention.self.value": "column",
    "*.attention.output.dense": "row",
    "*.intermediate.dense": "column",
    "*.output.dense": "row",
    "*word_embeddings": "row",
    # T5
    "*Attention.[qkv]": "column",
    "*Attention.o": "row",
    "*.DenseReluDense.wi": "column",
    "*.DenseReluDense.wi_[01]": "column",
    "*.DenseReluDense.wo": "row",
    "shared": "row",
    # ViT, Llama and most that came after
    "*.[qkv]_proj": "column",
    "*.o_proj": "row",
    "*.out_proj": "row",
    "*.mlp.fc1": "column",
    "*.mlp.fc2": "row",
    "*.gate_proj": "column",
    "*.up_proj": "column",
    "*.down_proj": "row",
    "*embed_tokens": "row",
    "*lm_head": "column",
}
"""Of the transformers that the tests train; `*` is any text, as in file names."""

_given: dict[str, Side] = {}


def tensor_parallel(rules: Rules) -> None:
    """Says how layers are divided under `--strategy=tp=K`, for models whose layers no built-in rule knows.

    Call it before the first training step. Later calls add rules; one that is given wins over a built-in one.

    Args:
        rules: Pattern of a layer's name -> "column" (its output features are divided) or "row" (its input features,
            or an embedding's vocabulary).

    Raises:
        UsageError: A rule is neither.

    Example:
        >>> tc.tensor_parallel({"blocks.*.up": "column", "blocks.*.down": "row"})
    """
    wrong = {pattern: side for pattern, side in rules.items() if side not in ("column", "row")}
    if wrong:
        mistakes = ", ".join(f"{pattern!r}: {side!r}" for pattern, side in wrong.items())
        raise UsageError(f'tc.tensor_parallel: a rule is "column" or "row", not {mistakes}')
    _given.update(rules)


def side_of(layer: str, own: Rules | None = None) -> Side | None:
    """How a layer is divided; None if it is not.

    Args:
        layer: Its name in the model.
        own: What the model itself says, which wins over `FAMILIES`.
    """
    for rules in (_given, own or {}, FAMILIES):
        for pattern, side in rules.items():
            if fnmatchcase(layer, pattern):
                return side
    return None


def refuse(program: str, names: Iterable[str], shared: int) -> UsageError:
    """The error for a step whose layers no rule knows."""
    shown = ", ".join([*list(names)[:4], "..."])
    return UsageError(
        f"--strategy=tp={shared}: no rule says how the layers of {program} are divided ({shown}). Say it before "
        'the first step, the first of two products by columns and the second by rows: tc.tensor_parallel({"*.up": '
        '"column", "*.down": "row"}); or take --strategy=fsdp, which needs none'
    )
