"""Where arrays live on several devices, and what is read off a program that runs on them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from trainingcompiler.compiling.hlo_collectives import Collective, collectives
from trainingcompiler.errors import UsageError
from trainingcompiler.parallel.sharding import bytes_per_device, mesh_of, shardings, undivided_rows, with_batch_found
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.strategy import DP, FSDP, Strategy


def spec(*shape: int, role: str = "parameter", batch_dim: int | None = None) -> TensorSpec:
    return TensorSpec(name="x", shape=shape, dtype=np.dtype(np.float32), role=role, batch_dim=batch_dim)


def program(state: tuple, inputs: tuple) -> StepProgram:
    return StepProgram(name="step", function=lambda *a: a, state=state, inputs=inputs, outputs=())


def specs_of(strategy: str, state: tuple = (), inputs: tuple = ()) -> tuple[list, list]:
    parsed = Strategy.parse(strategy)
    placed = shardings(program(state, inputs), mesh_of(list(range(8)), parsed), parsed)
    return tuple([sharding.spec for sharding in part] for part in placed[:2])


@pytest.fixture(autouse=True)
def described_mesh(monkeypatch):
    """Shardings of devices that need not be any."""
    monkeypatch.setattr(
        "trainingcompiler.parallel.sharding.NamedSharding", lambda mesh, spec: type("S", (), {"spec": spec})()
    )
    monkeypatch.setattr("trainingcompiler.parallel.sharding.Mesh", lambda devices, names: devices)


def test_fsdp_divides_the_longest_dim_that_can_be_divided():
    state = (spec(1024, 4096), spec(4096, 4095), spec(1001, 999), spec(4096), spec(128, 128))
    found, _ = specs_of("fsdp", state)
    whole = PartitionSpec()
    assert found == [PartitionSpec(None, "data"), PartitionSpec("data"), whole, whole, PartitionSpec("data")]
    assert bytes_per_device(state[:2], 8, FSDP) == 4 * (1024 * 4096 + 4096 * 4095) // 8
    assert bytes_per_device(state[2:4], 8, FSDP) == 4 * (1001 * 999 + 4096)


def test_dp_copies_the_state_and_divides_the_batch():
    rows = (spec(64, 512, role="batch", batch_dim=0), spec(12, 512, role="batch", batch_dim=0), spec(role="rng"))
    state, inputs = specs_of("dp", (spec(1024, 4096),), rows)
    assert state == [PartitionSpec()] and inputs == [PartitionSpec("data"), PartitionSpec(), PartitionSpec()]
    assert bytes_per_device((spec(1024, 4096),), 8, DP) == 4 * 1024 * 4096


def test_frozen_weights_are_divided_as_well():
    _, inputs = specs_of("fsdp", inputs=(spec(4096, 4096, role="constant"), spec(64, 64, role="hyperparameter")))
    assert inputs == [PartitionSpec("data"), PartitionSpec()]


def test_layers_are_shared_along_their_dim_and_the_state_along_another():
    up, down = replace(spec(4096, 1024), tensor_dim=0), replace(spec(1024, 4096), tensor_dim=1)
    odd = replace(spec(4095, 1024), tensor_dim=0)
    batch = (spec(64, 512, role="batch", batch_dim=0),)
    shared, inputs = specs_of("tp=2", (up, down, odd, spec(1024, 1024)), batch)
    assert shared == [PartitionSpec("tensor"), PartitionSpec(None, "tensor"), PartitionSpec(), PartitionSpec()]
    assert inputs == [PartitionSpec("data")]
    both, _ = specs_of("fsdp+tp=2", (up, down))
    assert both == [PartitionSpec(("tensor", "data")), PartitionSpec(None, ("tensor", "data"))]
    assert bytes_per_device((up, down), 8, Strategy.parse("fsdp+tp=2")) == 2 * 4 * 1024 * 4096 // 8
    assert bytes_per_device((up,), 8, Strategy.parse("tp=2")) == 4 * 1024 * 4096 // 2


def test_the_batch_is_the_length_that_most_inputs_begin_with():
    tokens, labels, positions = spec(8, 512, role="batch"), spec(8, role="batch"), spec(512, role="batch")
    found = with_batch_found(program((), (positions, tokens, labels, spec(8, 8, role="constant"))))
    assert [one.batch_dim for one in found.inputs] == [None, 0, 0, None]
    assert undivided_rows(found, 3, DP) == 8 and undivided_rows(found, 4, DP) is None
    assert undivided_rows(found, 6, Strategy.parse("tp=3")) is None
    assert with_batch_found(program((), (spec(role="batch"),))).inputs[0].batch_dim is None


@pytest.mark.parametrize("text", ["dp", "fsdp", "tp=2", "fsdp+tp=16"])
def test_a_strategy_is_written_as_it_is_read(text):
    assert str(Strategy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "tp", "tp=1", "dp+tp=2", "FSDP", "tp=2+fsdp", "fsdp+tp=0"])
def test_another_word_for_a_strategy_is_refused(text):
    with pytest.raises(UsageError, match=re.escape("must be dp, fsdp, tp=K or fsdp+tp=K, K being 2 or more")):
        Strategy.parse(text)


def test_groups_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(UsageError, match="groups of 3 devices do not divide 8; take a multiple of 3"):
        Strategy.parse("tp=3").check(8)


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
