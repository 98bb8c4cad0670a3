"""GPUs that a program can be compiled for where there is none, as the numbers that XLA's cost models and limits need.

Sources: the descriptions that come with XLA (openxla/xla, xla/backends/gpu/target_config/specs), which are what the
driver reports on the machine; NVIDIA's data sheets for the memory of the H200, for all of L4, L40S, A10G and T4, and
for the peaks of arithmetic, which are the dense ones of the SXM boards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainingcompiler.config import did_you_mean
from trainingcompiler.errors import UsageError

_CUDNN = (9, 10)  # what XLA's own descriptions say; flash attention, forward and backward, needs 8.9 or newer


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: What its driver calls it.
        compute_capability: Major and minor.
        memory_bytes: All of the device's memory.
        bandwidth: Bytes a second from and to that memory.
        cores: Streaming multiprocessors.
        float32_units: Per core.
        clock_ghz: Boosted.
        l2_bytes: The cache that all cores share.
        shared_bytes: Shared memory of one core.
        shared_bytes_block: The part of it that one block may ask for.
        flops: Floating-point operations a second, dense, at most: by what matrix products take ("float32", "tf32",
            "float16", "bfloat16"). What a GPU has no units for is missing.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    bandwidth: int
    cores: int
    float32_units: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    shared_bytes_block: int
    flops: Mapping[str, float] = field(hash=False)

    def description(self) -> str:
        """The GPU as text of XLA's `GpuTargetConfigProto`."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.float32_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  shared_memory_per_block_optin: {self.shared_bytes_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
device_description_str: "{self.name}"
"""


_HOPPER: dict[str, Any] = dict(
    compute_capability=(9, 0),
    cores=132,
    float32_units=128,
    clock_ghz=1.98,
    l2_bytes=52428800,
    shared_bytes=233472,
    shared_bytes_block=232448,
    flops={"float32": 66.9e12, "tf32": 494.7e12, "float16": 989.4e12, "bfloat16": 989.4e12},
)
_AMPERE: dict[str, Any] = dict(
    compute_capability=(8, 0),
    cores=108,
    float32_units=64,
    clock_ghz=1.41,
    l2_bytes=41943040,
    shared_bytes=167936,
    shared_bytes_block=166912,
    flops={"float32": 19.5e12, "tf32": 156e12, "float16": 312e12, "bfloat16": 312e12},
)
# Ada and the small Ampere: 128 units a core, 100 KB of shared memory, of which a block may have 99.
_SMALL: dict[str, Any] = dict(float32_units=128, shared_bytes=102400, shared_bytes_block=101376)

GPUS: dict[str, Gpu] = {
    # XLA's file gives the H200 141 GiB; the data sheet says 141 GB, of which programs can use a little less.
    "h200": Gpu(name="NVIDIA H200", memory_bytes=150_000_000_000, bandwidth=4_800_000_000_000, **_HOPPER),
    "h100": Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=84_942_979_072, bandwidth=3_352_320_000_000, **_HOPPER),
    "a100-80": Gpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=85_100_068_864, bandwidth=2_039_040_000_000, **_AMPERE),
    "a100-40": Gpu(name="NVIDIA A100-SXM4-40GB", memory_bytes=42_331_013_120, bandwidth=1_555_200_000_000, **_AMPERE),
    "b200": Gpu(
        name="NVIDIA B200",
        compute_capability=(10, 0),
        memory_bytes=191_514_411_008,
        bandwidth=7_672_320_000_000,
        cores=148,
        float32_units=128,
        clock_ghz=1.965,
        l2_bytes=132644864,
        shared_bytes=233472,
        shared_bytes_block=232448,
        flops={"float32": 74.5e12, "tf32": 1125e12, "float16": 2250e12, "bfloat16": 2250e12},
    ),
    "l40s": Gpu(
        name="NVIDIA L40S",
        compute_capability=(8, 9),
        memory_bytes=47_810_936_832,
        bandwidth=864_000_000_000,
        cores=142,
        clock_ghz=2.52,
        l2_bytes=100663296,
        flops={"float32": 91.6e12, "tf32": 183e12, "float16": 362e12, "bfloat16": 362e12},
        **_SMALL,
    ),
    "l4": Gpu(
        name="NVIDIA L4",
        compute_capability=(8, 9),
        memory_bytes=23_669_899_264,
        bandwidth=300_000_000_000,
        cores=58,
        clock_ghz=2.04,
        l2_bytes=50331648,
        flops={"float32": 30.3e12, "tf32": 60e12, "float16": 121e12, "bfloat16": 121e12},
        **_SMALL,
    ),
    "a10g": Gpu(
        name="NVIDIA A10G",
        compute_capability=(8, 6),
        memory_bytes=23_836_098_560,
        bandwidth=600_096_000_000,
        cores=80,
        clock_ghz=1.71,
        l2_bytes=6291456,
        flops={"float32": 35e12, "tf32": 35e12, "float16": 70e12, "bfloat16": 70e12},
        **_SMALL,
    ),
    "t4": Gpu(
        name="Tesla T4",
        compute_capability=(7, 5),
        memory_bytes=15_828_320_256,
        bandwidth=320_064_000_000,
        cores=40,
        float32_units=64,
        clock_ghz=1.59,
        l2_bytes=4194304,
        shared_bytes=65536,
        shared_bytes_block=65536,
        flops={"float32": 8.1e12, "float16": 65e12},
    ),
}
"""What a person calls a GPU -> its description."""


def gpu(name: str) -> Gpu:
    """Finds a GPU by name; case does not matter.

    Raises:
        UsageError: There is no description of it.
    """
    found = GPUS.get(name.lower())
    if found is None:
        hint = did_you_mean(name.lower(), GPUS) or f"; described are {', '.join(GPUS)}"
        raise UsageError(f"there is no description of a GPU {name!r}{hint}")
    return found
