"""Where arrays live on several devices, and what is read off a program that runs on them."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from trainingcompiler.collectives import Collective, collectives
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.sharding import bytes_per_device, mesh_of, shardings


def spec(*shape: int, role: str = "parameter", batch_dim: int | None = None) -> TensorSpec:
    return TensorSpec(name="x", shape=shape, dtype=np.dtype(np.float32), role=role, batch_dim=batch_dim)


def program(state: tuple, inputs: tuple) -> StepProgram:
    return StepProgram(name="step", function=lambda *a: a, state=state, inputs=inputs, outputs=())


def specs_of(strategy: str, state: tuple = (), inputs: tuple = ()) -> tuple[list, list]:
    placed = shardings(program(state, inputs), mesh_of(list(range(8))), strategy)
    return tuple([sharding.spec for sharding in part] for part in placed)


@pytest.fixture(autouse=True)
def described_mesh(monkeypatch):
    """Shardings of devices that need not be any."""
    monkeypatch.setattr("trainingcompiler.sharding.NamedSharding", lambda mesh, spec: type("S", (), {"spec": spec})())
    monkeypatch.setattr("trainingcompiler.sharding.Mesh", lambda devices, names: devices)


def test_fsdp_divides_the_longest_dim_that_can_be_divided():
    state = (spec(1024, 4096), spec(4096, 4095), spec(1001, 999), spec(4096), spec(128, 128))
    found, _ = specs_of("fsdp", state)
    whole = PartitionSpec()
    assert found == [PartitionSpec(None, "data"), PartitionSpec("data"), whole, whole, PartitionSpec("data")]
    assert bytes_per_device(state[:2], 8, "fsdp") == 4 * (1024 * 4096 + 4096 * 4095) // 8
    assert bytes_per_device(state[2:4], 8, "fsdp") == 4 * (1001 * 999 + 4096)


def test_dp_copies_the_state_and_divides_the_batch():
    rows = (spec(64, 512, role="batch", batch_dim=0), spec(12, 512, role="batch", batch_dim=0), spec(role="rng"))
    state, inputs = specs_of("dp", (spec(1024, 4096),), rows)
    assert state == [PartitionSpec()] and inputs == [PartitionSpec("data"), PartitionSpec(), PartitionSpec()]
    assert bytes_per_device((spec(1024, 4096),), 8, "dp") == 4 * 1024 * 4096


def test_frozen_weights_are_divided_as_well():
    _, inputs = specs_of("fsdp", inputs=(spec(4096, 4096, role="constant"), spec(64, 64, role="hyperparameter")))
    assert inputs == [PartitionSpec("data"), PartitionSpec()]


TEXT = """
  %all-gather-start = (bf16[4096,512]{0,1}, bf16[4096,4096]{0,1}) all-gather-start(%bitcast.0), channel_id=11
  %all-gather-done = bf16[4096,4096]{0,1} all-gather-done(%all-gather-start)
  %rs = f32[512,64]{1,0} reduce-scatter(%fusion.1), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %rs.1 = ((f32[4096]{0}, f32[64]{0}), (f32[512]{0}, /*index=1*/f32[8]{0})) reduce-scatter-start(%a, %b), channel_id=2
  %all-reduce-start = f32[] all-reduce-start(%loss), to_apply=%add
  %ar = (f32[8]{0}, f32[4]{0}) all-reduce(%a, %b), to_apply=%add
"""


def test_collectives_are_counted_once_with_their_whole_size():
    assert collectives(TEXT, 8) == (
        Collective(kind="all-gather", count=1, size_bytes=2 * 4096 * 4096),
        Collective(kind="all-reduce", count=2, size_bytes=4 + 4 * 12),
        Collective(kind="reduce-scatter", count=2, size_bytes=4 * 4096 * 64 + 4 * (4096 + 64)),
    )
