"""A step whose state workers divide, for GPUs: parts are gathered and scattered by NCCL, and updated where they are."""

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainingcompiler.frameworks.pytorch.graph.ir import Node, Ref
from trainingcompiler.frameworks.pytorch.lowering.fsdp_split import run_local_then_replicated
from trainingcompiler.frameworks.pytorch.lowering.interpreter import _run_node_or_say
from trainingcompiler.parallel import spmd
from trainingcompiler.targets.target import Target, compiling_for

pytestmark = pytest.mark.gpu_plan

SHAPE, META = (1024, 1024), ((1024, 1024), torch.float32)
WEIGHT, MOMENTUM, BATCH = 1, 2, 3
STEP = [
    Node("aten.mm.default", (Ref(BATCH), Ref(WEIGHT)), {}, (10,), (META,)),
    Node("trainingcompiler.mean_over_workers.default", ((Ref(10),), 4), {}, (11,), (META,)),
    Node("aten.add.Tensor", (Ref(MOMENTUM), Ref(11)), {}, (12,), (META,)),
    Node("aten.sub.Tensor", (Ref(WEIGHT), Ref(12)), {}, (13,), (META,)),
]


def test_each_gpu_holds_and_updates_its_part(monkeypatch):
    target = Target.gpu("h100", 4)
    mesh = Mesh(np.array(target.devices()), (spmd.AXIS,))
    monkeypatch.setattr(spmd, "own", lambda: NamedSharding(mesh, PartitionSpec()))
    spmd.divided.cache_clear()
    divided = spmd.divided(SHAPE)

    def step(state, batch):
        values = {WEIGHT: state[0], MOMENTUM: state[1], BATCH: batch}
        run_local_then_replicated(STEP, [13, 12], values, {WEIGHT, MOMENTUM}, _run_node_or_say)
        return values[13], values[12]

    array = jax.ShapeDtypeStruct(SHAPE, np.float32)
    where = {"in_shardings": ((divided, divided), spmd.own()), "out_shardings": (divided, divided)}
    with compiling_for(target):
        compiled = jax.jit(step, donate_argnums=0, **where).lower((array, array), array).compile()
    spmd.divided.cache_clear()
    text, part = compiled.as_text(), 4 * 1024 * 1024 // 4
    assert "all-gather" in text and "reduce-scatter" in text and "all-reduce" not in text
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * part
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * part + 4 * part  # the batch is each GPU's own
