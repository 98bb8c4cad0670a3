"""The search for a batch, and what is said of it; programs are made up here, and compiled elsewhere."""

import pytest

from trainingcompiler.compiling.compiler import MemoryPlan
from trainingcompiler.planning import report
from trainingcompiler.planning import search as planning
from trainingcompiler.planning.search import MOST_COMPILES, Plan, PlannedBatch, search
from trainingcompiler.targets.gpus import GPUS

GIB = 2**30
FIXED = 2 * GIB


def batch(size: int, row_bytes: int = GIB // 8, flops: float = 1e12, dtype: str = "bfloat16") -> PlannedBatch:
    memory = MemoryPlan(argument_bytes=FIXED, output_bytes=FIXED, alias_bytes=FIXED, temporary_bytes=size * row_bytes)
    return PlannedBatch(
        batch_size=size,
        parameter_bytes=FIXED // 3,
        optimizer_bytes=FIXED - FIXED // 3,
        memory=memory,
        flops=size * flops,
        product_dtype=dtype,
        compile_time_s=1.0,
    )


@pytest.mark.parametrize("start", [1, 7, 8, 100, 1000])
@pytest.mark.parametrize("most", [1, 5, 16, 77, 1000])
def test_the_largest_that_fits_is_found_and_the_next_shown_not_to(start, most):
    usable = FIXED + most * GIB // 8
    found = search(batch, start, usable)
    fits = [one.batch_size for one in found if one.memory.peak_bytes <= usable]
    too_much = [one.batch_size for one in found if one.memory.peak_bytes > usable]
    assert max(fits) <= most < planning.next_size(max(fits)) == min(too_much)
    assert len(found) <= MOST_COMPILES


def test_memory_that_does_not_grow_in_a_straight_line():
    def at(size: int) -> PlannedBatch:  # another algorithm above 40 rows
        return batch(size, GIB // 8 if size <= 40 else GIB // 4)

    found = search(at, 8, FIXED + 8 * GIB)
    fits = max(one.batch_size for one in found if one.memory.peak_bytes <= FIXED + 8 * GIB)
    assert fits == 40 and len(found) <= MOST_COMPILES


def test_memory_that_stands_still_near_the_limit():
    """XLA computes values again where it would otherwise not fit, so that more rows may need no more memory."""

    def at(size: int) -> PlannedBatch:
        kept = min(size, 700) + max(0, size - 1500)
        return batch(size, row_bytes=kept * GIB // 8 // size)

    usable = FIXED + 800 * GIB // 8
    found = search(at, 8, usable)
    fits = max(one.batch_size for one in found if one.memory.peak_bytes <= usable)
    too_much = min(one.batch_size for one in found if one.memory.peak_bytes > usable)
    assert 1280 <= fits <= 1600 < too_much <= 2048 and len(found) <= MOST_COMPILES


def test_nothing_fits():
    found = search(batch, 8, FIXED)
    assert [one.batch_size for one in found][0] == 1
    plan = Plan(device="a GPU", memory_bytes=FIXED, gpu=None, batches=tuple(found))
    assert plan.largest is None and plan.fastest is None
    assert report.advice(plan) == [
        "nothing fits: a batch of 1 needs 2.12 GiB, and there are 1.80 GiB, which leaves 10% of the device free"
    ]


def test_the_bound_is_the_slower_of_arithmetic_and_memory():
    gpu = GPUS["h100"]
    busy = batch(8, row_bytes=1, flops=1e12)
    assert busy.bound_s(gpu) == pytest.approx(8e12 / 989.4e12)
    idle = batch(8, flops=1e6)
    assert idle.moved_bytes == 2 * FIXED + 2 * GIB  # state read and written, 1 GiB of temporaries likewise
    assert idle.bound_s(gpu) == pytest.approx((2 * FIXED + 2 * GIB) / 3.35232e12)
    assert batch(8, row_bytes=1, dtype="tf32").bound_s(GPUS["t4"]) == pytest.approx(
        8e12 / 8.1e12
    )  # it has no such units
    assert idle.bound_s(None) is None


def test_the_fastest_need_not_be_the_largest():
    batches = tuple(batch(size, row_bytes=1, flops=1e12) for size in (64, 128, 256))
    plan = Plan(device="NVIDIA H100", memory_bytes=80 * GIB, gpu=GPUS["h100"], batches=batches)
    assert (plan.largest.batch_size, plan.fastest.batch_size) == (256, 64)  # bound by arithmetic from 64 rows on
    assert report.advice(plan)[1] == "fastest predicted: 64 (at most 989 rows/s; within 2% of the best here)"


def test_the_table_marks_what_does_not_fit():
    plan = Plan(device="a GPU", memory_bytes=4 * GIB, gpu=None, batches=(batch(8), batch(16)))
    lines = report.table(plan).splitlines()
    assert lines[0].split()[:6] == ["batch", "parameters", "optimizer", "temporaries", "total", "of"]
    assert lines[1].split()[:9] == ["8", "682.67", "MiB", "1.33", "GiB", "1.00", "GiB", "3.00", "GiB"]
    assert "75.0%  " in lines[1] and "100.0% too much" in lines[2]
    assert report.advice(plan) == [
        "largest that fits: 8 (3.00 GiB of 3.60 GiB, which leaves 10% of the device free; 16 would need 4.00 GiB)"
    ]


def test_a_plan_survives_json():
    plan = Plan(device="a GPU", memory_bytes=8 * GIB, gpu=GPUS["t4"], batches=(batch(8), batch(16)))
    written = report.as_json(plan)
    assert (written["largest"], written["batches"][0]["peak_bytes"]) == (16, 3 * GIB)
    assert report.from_json(written["batches"][1]) == batch(16)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%4 = stablehlo.dot_general %0, %1, contracting_dims = [1] x [0] : (tensor<8x4xbf16>, t", "bfloat16"),
        ("%4 = stablehlo.dot_general %0, %1, precision = [HIGHEST, HIGHEST] : (tensor<8x4xf32>, t", "float32"),
        ("%4 = stablehlo.dot_general %0, %1, precision = [DEFAULT, DEFAULT] : (tensor<8x4xf32>, t", "tf32"),
        ("%4 = stablehlo.convolution(%0, %1) dim_numbers = [b, f] : (tensor<1x2x3xf16>, tensor<", "float16"),
        ("%4 = stablehlo.add %0, %1 : tensor<8xf32>", "float32"),
    ],
)
def test_what_products_take_is_read_off_the_program(line, expected):
    assert planning.product_dtype(f"module {{\n{line}\n}}") == expected
