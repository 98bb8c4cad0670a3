"""Which part of a step workers compute apart, and which is common to all and can be divided."""

from dataclasses import dataclass

import torch

from trainingcompiler.frameworks.pytorch.graph.ir import Node, Ref
from trainingcompiler.frameworks.pytorch.lowering.fsdp_split import _parted, common_inputs, common_values

MEAN = "trainingcompiler.mean_over_workers.default"
META = ((4,), torch.float32)


def node(operator: str, output: int, *reads: int, seed: int | None = None) -> Node:
    return Node(operator, tuple(map(Ref, reads)), {}, (output,), (META,), seed and (Ref(seed), 0))


@dataclass(eq=False)
class Item:
    """What `common_inputs` looks at of a lifted tensor."""

    value: int
    new_value: int

    def tensor(self):
        return self


WEIGHT, BATCH, MOMENTUM, RATE = 1, 2, 3, 4
STEP = [
    node("aten.mul.Tensor", 10, WEIGHT, BATCH),  # forward and backward
    Node(MEAN, ((Ref(10),), 2), {}, (11,), (META,)),
    node("aten.add.Tensor", 12, MOMENTUM, 11),
    node("aten.mul.Tensor", 13, 12, RATE),
    node("aten.sub.Tensor", 14, WEIGHT, 13),
]


def outputs(nodes: list[Node]) -> list[int]:
    return [number for one in nodes for number in one.outputs]


def test_what_follows_the_mean_is_common():
    common = common_values(STEP, {WEIGHT, MOMENTUM, RATE})
    assert common >= {11, 12, 13, 14} and 10 not in common
    own, shared = _parted(STEP, common)
    assert (outputs(own), outputs(shared)) == ([10, 11], [12, 13, 14])


def test_a_common_value_that_a_worker_needs_apart_is_computed_apart():
    cast = node("aten._to_copy.default", 9, WEIGHT)
    nodes = [cast, node("aten.mul.Tensor", 10, 9, BATCH), *STEP[1:]]
    own, shared = _parted(nodes, common_values(nodes, {WEIGHT, MOMENTUM, RATE}))
    assert outputs(own) == [9, 10, 11] and outputs(shared) == [12, 13, 14]


def test_chance_is_each_workers_own():
    assert 5 not in common_values([node("aten.bernoulli.default", 5, WEIGHT, seed=8)], {WEIGHT, 8})


def test_nothing_of_a_gradient_is_left_when_the_mean_is_copied_over_it():
    copy = node("aten.copy.default", 12, BATCH, 11)
    assert 12 in common_values([STEP[0], STEP[1], copy], {WEIGHT})


def test_what_one_worker_changes_alone_is_not_common():
    weight, momentum = Item(WEIGHT, 14), Item(MOMENTUM, 12)
    both = {id(weight), id(momentum)}
    assert common_inputs(STEP, [weight, momentum], both, {RATE}) == {WEIGHT, MOMENTUM, RATE}
    alone = [STEP[0], node("aten.add.Tensor", 12, MOMENTUM, 10), *STEP[3:]]  # nobody averages
    assert common_inputs(alone, [weight, momentum], both, {RATE}) == {RATE}
