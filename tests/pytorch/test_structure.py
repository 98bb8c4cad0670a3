"""Nested values are taken apart and put together again, whatever they are made of."""

import collections
import dataclasses
import typing

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from trainingcompiler.frameworks.pytorch.interop.pytree import flatten, map_leaves, unflatten

ROWS = torch.arange(6.0).view(2, 3)


class Named(typing.NamedTuple):
    first: object
    second: object


class Checked(collections.namedtuple("Pair", "low high")):
    def __new__(cls, low, high=None, *, unit="s"):  # what a value is made with is not what it is made of
        return super().__new__(cls, low, high)


class Own(tuple):
    pass


@dataclasses.dataclass
class Outputs:
    loss: torch.Tensor
    parts: dict


VALUES = {
    "tuple": (ROWS, 1, None),
    "list": [ROWS, [2, "word"]],
    "dict": {"x": ROWS, 3: (4,)},
    "ordered dict": collections.OrderedDict(b=ROWS, a=1),
    "default dict": collections.defaultdict(list, x=[ROWS]),
    "named tuple": Named(ROWS, {"x": 1}),
    "named tuple with a constructor": Checked(ROWS, 2),
    "own tuple": Own((ROWS, 1)),
    "max": ROWS.max(1),
    "topk": ROWS.topk(2, 1),
    "median": ROWS.median(0),
    "aminmax": torch.aminmax(ROWS),
    "svd": torch.linalg.svd(ROWS),
    "size": ROWS.size(),
    "slice": slice(1, ROWS, None),
    "dataclass": Outputs(ROWS, {"x": (1,)}),
    "model output": SequenceClassifierOutput(loss=ROWS.sum(), logits=ROWS),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_put_together_is_what_was_taken_apart(value):
    leaves, structure = flatten(value)
    again = unflatten(structure, iter(leaves))
    assert type(again) is type(value)
    leaves_again, structure_again = flatten(again)
    assert structure_again == structure and hash(structure_again) == hash(structure)
    assert len(leaves_again) == len(leaves)
    assert all(one is other for one, other in zip(leaves_again, leaves, strict=True))


def test_parts_keep_their_names():
    doubled = map_leaves(lambda leaf: leaf * 2, ROWS.max(1))
    assert torch.equal(doubled.values, ROWS.max(1).values * 2) and torch.equal(doubled.indices, doubled[1])
    assert map_leaves(lambda leaf: leaf + 1, Named(1, 2)) == Named(first=2, second=3)
