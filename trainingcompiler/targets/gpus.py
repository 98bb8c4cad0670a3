"""GPUs that a program can be compiled for where there is none, as the numbers that XLA's cost models and limits need.

Sources: the descriptions that come with XLA (openxla/xla, xla/backends/gpu/target_config/specs), which are what the
driver reports on the machine; NVIDIA's data sheets for the memory of the H200, for all of L4, L40S, A10G and T4, and
for the peaks of arithmetic, which are the dense ones of the SXM boards. A person's own GPU comes from a file.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
            "float16", "bfloat16"). What a GPU has no units for is missing; "float32" never is.
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
device_description_str: {json.dumps(self.name)}
"""


_DTYPES = ("float32", "tf32", "float16", "bfloat16")

# By compute capability: 32-bit units of a core, its shared memory, and the part of it that one block may ask for.
_CORES = {
    (7, 0): (64, 98304, 98304),
    (7, 5): (64, 65536, 65536),
    (8, 0): (64, 167936, 166912),
    (8, 6): (128, 102400, 101376),
    (8, 9): (128, 102400, 101376),
    (9, 0): (128, 233472, 232448),
    (10, 0): (128, 233472, 232448),
}

# sm 90 is compute capability 9.0. XLA's file gives the H200 141 GiB; the data sheet says 141 GB, of which programs can
# use a little less.
# fmt: off
_ROWS: dict[str, tuple[Any, ...]] = {
    #           driver's name            sm     memory bytes     GB/s  cores   GHz  L2 MiB TFLOP/s, as _DTYPES
    "h200":    ("NVIDIA H200",           90, 150_000_000_000,    4800,  132,  1.98,    50, 66.9, 494.7, 989.4, 989.4),
    "h100":    ("NVIDIA H100 80GB HBM3",  90,  84_942_979_072, 3352.32,  132,  1.98,    50, 66.9, 494.7, 989.4, 989.4),
    "a100-80": ("NVIDIA A100-SXM4-80GB",  80,  85_100_068_864, 2039.04,  108,  1.41,    40, 19.5,   156,   312, 312),
    "a100-40": ("NVIDIA A100-SXM4-40GB",  80,  42_331_013_120,  1555.2,  108,  1.41,    40, 19.5,   156,   312, 312),
    "b200":    ("NVIDIA B200",          100, 191_514_411_008, 7672.32,  148, 1.965, 126.5, 74.5,  1125,  2250, 2250),
    "l40s":    ("NVIDIA L40S",           89,  47_810_936_832,     864,  142,  2.52,    96, 91.6,   183,   362, 362),
    "l4":      ("NVIDIA L4",             89,  23_669_899_264,     300,   58,  2.04,    48, 30.3,    60,   121, 121),
    "a10g":    ("NVIDIA A10G",           86,  23_836_098_560, 600.096,   80,  1.71,     6,   35,    35,    70, 70),
    "t4":      ("Tesla T4",              75,  15_828_320_256, 320.064,   40,  1.59,     4,  8.1,  None,    65, None),
    "v100":    ("Tesla V100-SXM2-16GB",  70,  16_935_682_048, 898.048,   80,  1.53,     6, 15.7,  None,   125, None),
}
# fmt: on


def _of_row(
    name: str, sm: int, memory_bytes: int, gb_s: float, cores: int, ghz: float, l2_mib: float, *peaks: float | None
) -> Gpu:
    capability = divmod(sm, 10)
    float32_units, shared_bytes, shared_bytes_block = _CORES[capability]
    return Gpu(
        name=name,
        compute_capability=capability,
        memory_bytes=memory_bytes,
        bandwidth=round(gb_s * 1e9),
        cores=cores,
        float32_units=float32_units,
        clock_ghz=ghz,
        l2_bytes=int(l2_mib * 2**20),
        shared_bytes=shared_bytes,
        shared_bytes_block=shared_bytes_block,
        flops={dtype: float(round(peak * 1e12)) for dtype, peak in zip(_DTYPES, peaks, strict=True) if peak},
    )


GPUS: dict[str, Gpu] = {called: _of_row(*row) for called, row in _ROWS.items()}
"""What a person calls a GPU -> its description."""

_FIELDS = tuple(one.name for one in dataclasses.fields(Gpu))
# The most that XLA's description can hold, of whole numbers.
_MOST = dict.fromkeys(("memory_bytes", "bandwidth", "l2_bytes"), 2**63 - 1) | dict.fromkeys(
    ("cores", "float32_units", "shared_bytes", "shared_bytes_block"), 2**31 - 1
)


def gpu(name: str) -> Gpu:
    """Finds a GPU by name, whose case does not matter, or reads it from a file.

    Args:
        name: One of `GPUS`, or the path of a file: a JSON object with the fields of `Gpu`, where the compute capability
            is `"8.6"` or `[8, 6]`, and `"like": "a100-80"` takes all that is not given from one of `GPUS`.

    Raises:
        UsageError: There is no description of it, or the file's is wrong; all its mistakes are named.
    """
    found = GPUS.get(name.lower())
    if found is not None:
        return found
    if name.lower().endswith(".json") or os.path.isfile(name):
        return _from_file(name)
    raise UsageError(f"there is no description of a GPU {name!r}{_hint(name)}")


def _hint(name: str) -> str:
    longer = [known for known in GPUS if known.startswith(name.lower())]  # a100: there are two
    if longer:
        return f"; did you mean {' or '.join(longer)}?"
    known = f"; described are {', '.join(GPUS)}, and a JSON file can describe others"
    return did_you_mean(name.lower(), GPUS) or known


def _from_file(path: str) -> Gpu:
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: this description of a GPU cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: this description of a GPU is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f"{path}: a description of a GPU is one JSON object, {{...}}; this is {json.dumps(given)}")
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    like = given.pop("like", None)
    if isinstance(like, str) and like.lower() in GPUS:
        values = {name: getattr(GPUS[like.lower()], name) for name in _FIELDS}
    elif like is not None:
        mistakes.append(f"like is {json.dumps(like)}, which is no described GPU{_hint(str(like))}")
    elif missing := [name for name in _FIELDS if name not in given]:
        mistakes.append(f'missing: {", ".join(missing)}; give them, or "like": "a100-80" to take them from that one')
    for name, value in given.items():
        if name in _FIELDS:
            values[name] = _read(name, value, mistakes)
        else:
            hint = did_you_mean(name, (*_FIELDS, "like")) or f"; the fields are {', '.join(_FIELDS)}"
            mistakes.append(f"{name} is no field of a GPU{hint}")
    if len(mistakes) == 1:
        raise UsageError(f"{path}: {mistakes[0]}")
    if mistakes:
        raise UsageError("\n  - ".join([f"{path}: {len(mistakes)} mistakes in this description of a GPU:", *mistakes]))
    return Gpu(**values)


def _read(name: str, value: Any, mistakes: list[str]) -> Any:
    """A field's value, from JSON; what is wrong with it is added to the mistakes."""
    found: Any
    if name == "name":
        found, expected = _text(value), "text, on one line"
    elif name == "compute_capability":
        found, expected = _capability(value), 'text such as "8.6", or [8, 6]'
    elif name == "flops":
        found = _flops(value, mistakes)
        expected = 'an object such as {"float32": 19.5e12, "bfloat16": 312e12}, with "float32" in it'
    elif name in _MOST:
        found, expected = _number(value, _MOST[name], is_whole=True), f"a whole number from 1 to {_MOST[name]:,}"
    else:
        found, expected = _number(value, sys.float_info.max, is_whole=False), "a number above 0"
    if found is None:
        mistakes.append(f"{name} is {json.dumps(value)}, and must be {expected}")
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() and value.isprintable() else None


def _capability(value: Any) -> tuple[int, int] | None:
    parts = value.split(".") if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) == 2 and all(str(part).isdecimal() for part in parts):
        return int(parts[0]), int(parts[1])
    return None


def _flops(value: Any, mistakes: list[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict) or "float32" not in value:
        return None
    for dtype in [dtype for dtype in value if dtype not in _DTYPES]:
        hint = did_you_mean(dtype, _DTYPES) or f"; there are {', '.join(_DTYPES)}"
        mistakes.append(f"flops.{dtype} is not known{hint}")
    return {dtype: _read(f"flops.{dtype}", value[dtype], mistakes) for dtype in _DTYPES if dtype in value}


def _number(value: Any, most: float, is_whole: bool) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
    if not is_number or (is_whole and value != int(value)):
        return None
    return int(value) if is_whole else float(value)
