"""Descriptions of GPUs: those that come along, those of a file, and which compiler makes code for them."""

import json
import os

import numpy as np
import pytest

from trainingcompiler.compiling import compiler
from trainingcompiler.errors import UsageError
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets import target
from trainingcompiler.targets.gpus import GPUS, gpu
from trainingcompiler.targets.target import Target

OWN = {
    "name": "NVIDIA GeForce RTX 3090",
    "compute_capability": "8.6",
    "memory_bytes": 25_438_126_080,
    "bandwidth": 936.1e9,
    "cores": 82,
    "float32_units": 128,
    "clock_ghz": 1.695,
    "l2_bytes": 6_291_456,
    "shared_bytes": 102_400,
    "shared_bytes_block": 101_376,
    "flops": {"float32": 35.6e12, "tf32": 35.6e12, "float16": 71e12, "bfloat16": 71e12},
}


@pytest.fixture
def described(tmp_path):
    """Writes a file, and gives its path."""

    def write(content: object, name: str = "own.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def installed(monkeypatch):
    """Makes it look as if exactly these wheels of JAX were installed."""
    return lambda *wheels: monkeypatch.setattr(target, "find_spec", lambda name: name in wheels or None)


def increment() -> StepProgram:
    """Counts."""
    counter = TensorSpec(name="counter", shape=(9,), dtype=np.dtype("float32"), role="parameter")
    return StepProgram(
        name="increment",
        function=lambda state, inputs: ((state[0] + 1,), ()),
        state=(counter,),
        inputs=(),
        outputs=(),
    )


def refused(path: str) -> str:
    """What is said of a file."""
    with pytest.raises(UsageError) as caught:
        gpu(path)
    return str(caught.value)


def test_a_volta_has_no_units_for_bfloat16():
    v100 = gpu("V100")
    assert v100.name == "Tesla V100-SXM2-16GB" and v100.compute_capability == (7, 0)
    assert v100.flops == {"float32": 15.7e12, "float16": 125e12}


@pytest.mark.parametrize("name", GPUS)
def test_the_numbers_are_whole_and_plausible(name):
    one = GPUS[name]
    sizes = (one.memory_bytes, one.bandwidth, one.cores, one.l2_bytes, one.shared_bytes, one.shared_bytes_block)
    assert all(type(number) is int for number in sizes)
    assert one.shared_bytes_block <= one.shared_bytes < one.l2_bytes < one.memory_bytes < one.bandwidth
    # What the units can do at their clock, a multiply and an add each, is what the data sheet says, within a sixth.
    assert one.flops["float32"] == pytest.approx(2 * one.cores * one.float32_units * one.clock_ghz * 1e9, rel=0.17)
    assert one.flops["float32"] == min(one.flops.values())


def test_a_gpu_of_a_file(described):
    found = gpu(described(OWN))
    assert found.compute_capability == (8, 6)
    assert found.bandwidth == 936_100_000_000 and type(found.bandwidth) is int
    assert found == gpu(described({**OWN, "compute_capability": [8, 6]}))
    assert found == gpu(described(OWN, "no_ending"))
    assert 'device_description_str: "NVIDIA GeForce RTX 3090"' in found.description()


def test_what_a_file_does_not_say_is_like_another_gpu(described):
    found = gpu(described({"like": "A100-80", "name": "half an A100", "memory_bytes": 4e10}))
    a100 = GPUS["a100-80"]
    assert (found.name, found.memory_bytes) == ("half an A100", 40_000_000_000)
    assert (found.cores, found.flops) == (a100.cores, a100.flops)


def test_a_described_gpu_comes_before_a_file_of_that_name(described, monkeypatch):
    monkeypatch.chdir(os.path.dirname(described(OWN, "t4")))
    assert gpu("t4") is GPUS["t4"]


def test_all_mistakes_of_a_file_are_named_together(described):
    flops = {"float32": -1, "bfloat": 1e12, "tf32": 1e12}
    wrong = {"compute_capability": 8.6, "memory_bytes": "24 GB", "cores": 0, "clock_ghz": True, "l2_bytes": 1.5}
    path = described({**OWN, **wrong, "flops": flops, "bandwith": 1e12, "name": "", "float32_units": 2**31})
    first, *mistakes = refused(path).split("\n  - ")
    assert first == f"{path}: 10 mistakes in this description of a GPU:"
    assert mistakes == [
        'name is "", and must be text, on one line',
        'compute_capability is 8.6, and must be text such as "8.6", or [8, 6]',
        'memory_bytes is "24 GB", and must be a whole number from 1 to 9,223,372,036,854,775,807',
        "cores is 0, and must be a whole number from 1 to 2,147,483,647",
        "float32_units is 2147483648, and must be a whole number from 1 to 2,147,483,647",
        "clock_ghz is true, and must be a number above 0",
        "l2_bytes is 1.5, and must be a whole number from 1 to 9,223,372,036,854,775,807",
        "flops.bfloat is not known; did you mean bfloat16?",
        "flops.float32 is -1, and must be a number above 0",
        "bandwith is no field of a GPU; did you mean bandwidth?",
    ]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"flops": {"tf32": 1e12}}, 'flops is {"tf32": 1000000000000.0}, and must be an object such as {"float32": '),
        ({"flops": 1e12}, "flops is 1000000000000.0, and must be an object"),
        ({"compute_capability": "8"}, 'compute_capability is "8", and must be'),
        ({"compute_capability": [8, -6]}, "compute_capability is [8, -6], and must be"),
        ({"name": "two\nlines"}, r'name is "two\nlines", and must be text, on one line'),
        ({"clock_ghz": float("nan")}, "clock_ghz is NaN, and must be a number above 0"),
        ({"bandwidth": float("inf")}, "bandwidth is Infinity, and must be a whole number"),
        ({"like": "a100"}, 'like is "a100", which is no described GPU; did you mean a100-80 or a100-40?'),
        ({"like": 5}, "like is 5, which is no described GPU; described are h200, "),
        ({"xyz": 5}, "xyz is no field of a GPU; the fields are name, compute_capability, "),
    ],
)
def test_a_mistake_alone(described, changed, expected):
    path = described({**OWN, **changed})
    assert refused(path).startswith(f"{path}: {expected}")


def test_missing_fields(described):
    path = described({name: value for name, value in OWN.items() if name not in ("cores", "flops")})
    assert refused(path) == f'{path}: missing: cores, flops; give them, or "like": "a100-80" to take them from that one'


def test_a_file_that_is_none(described, tmp_path):
    path = tmp_path / "absent.json"
    assert refused(str(path)) == f"{path}: this description of a GPU cannot be read: No such file or directory"
    assert "is not JSON: Expecting" in refused(described("{'name': 5}"))
    assert "is one JSON object, {...}; this is [1, 2]" in refused(described([1, 2]))


def test_an_unknown_gpu_is_refused_with_what_can_be_given():
    assert refused("a100") == "there is no description of a GPU 'a100'; did you mean a100-80 or a100-40?"
    assert refused("H20").endswith("did you mean h200?")
    assert refused("h1000").endswith("did you mean h100?")
    assert refused("abacus").endswith("described are " + ", ".join(GPUS) + ", and a JSON file can describe others")


def test_keys_tell_apart_what_has_one_name(described):
    keys = {
        Target.gpu(described(content)).key
        for content in (
            {"like": "h200"},
            {"like": "h200", "cores": 60},
            {"like": "h200", "flops": {"float32": 1e12}},
            {"like": "h200", "flops": {"float32": 2e12}},
        )
    }
    assert len(keys) == 4 and Target.gpu("h200").key in keys and Target.gpu("H200").key in keys
    assert all(key.startswith("NVIDIA-H200-") for key in keys)
    strange = Target.gpu(described({"like": "h200", "name": "../é \\ " + "x" * 300})).key
    assert len(strange) < 80 and set(strange) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert Target.local().key == Target.local().key


def test_what_cuda_13_no_longer_compiles_for_is_said_before_compiling(described, installed):
    installed("jax_cuda13_plugin")
    old = Target.gpu(described({"like": "v100", "name": "an old card"}))
    with pytest.raises(UsageError) as caught:
        compiler.compile(increment(), old)
    assert str(caught.value) == (
        "CUDA 13, which is installed, does not compile for an old card, of compute capability 7.0, but for 7.5, 8.0, "
        "8.6, 8.7, 8.8, 8.9, 9.0, 10.0, 10.3, 10.7, 11.0, 12.0, 12.1. Either pip uninstall jax-cuda13-plugin "
        'jax-cuda13-pjrt, and pip install "trainingcompiler[cuda12]"; or take another described GPU: h200, h100, '
        "a100-80, a100-40, b200, l40s, l4, a10g, t4"
    )


def test_what_only_cuda_13_compiles_for(described, installed):
    new = Target.gpu(described({"like": "b200", "name": "a new card", "compute_capability": "11.0"}))
    installed("jax_cuda12_plugin")
    with pytest.raises(UsageError, match=r"CUDA 12, which is installed, does .*trainingcompiler\[cuda13\].* v100$"):
        compiler.compile(increment(), new)
    installed("jax_cuda12_plugin", "jax_cuda13_plugin")  # JAX loads one of them, whichever comes first
    with pytest.raises(UsageError, match="pip uninstall jax-cuda12-plugin jax-cuda12-pjrt, and"):
        compiler.compile(increment(), new)
    installed()
    with pytest.raises(UsageError, match=r'not installed: pip install "trainingcompiler\[cuda13\]" \('):
        compiler.compile(increment(), new)


def test_what_no_compiler_knows(described, installed):
    installed("jax_cuda12_plugin")
    slip = Target.gpu(described({"like": "a10g", "name": "a slip", "compute_capability": "8.4"}))
    with pytest.raises(UsageError, match=r"does not compile for a slip, of compute capability 8.4: those of CUDA 12"):
        compiler.compile(increment(), slip)
