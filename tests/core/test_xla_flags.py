"""XLA_FLAGS: added to, never overwritten, and read before XLA does."""

import os

import pytest

from trainingcompiler.errors import UsageError
from trainingcompiler.processes import xla_flags


def test_flags_are_added_and_the_persons_own_hold():
    environ: dict[str, str] = {}
    xla_flags.append(environ, ["--xla_a=1"])
    assert environ == {"XLA_FLAGS": "--xla_a=1"}
    xla_flags.append(environ, ["--xla_a=2", "--xla_b"])
    assert environ == {"XLA_FLAGS": "--xla_a=1 --xla_b"}
    xla_flags.append(environ, [])
    assert environ == {"XLA_FLAGS": "--xla_a=1 --xla_b"}


def test_flags_that_the_installed_xla_knows():
    xla_flags.check({})
    xla_flags.check({**os.environ, "XLA_FLAGS": "--xla_cpu_enable_fast_math=false --xla_gpu_autotune_level=0"})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--xla_cpu_enable_fast_math=false --xla_cpu_enable_fast_maths=1",
            "XLA_FLAGS has --xla_cpu_enable_fast_maths=1, which the installed XLA does not know (did you mean "
            "--xla_cpu_enable_fast_math?), and which would end the process: take it out",
        ),
        (
            "--zzzz",
            "XLA_FLAGS has --zzzz, which the installed XLA does not know, and which would end the process: take it out",
        ),
    ],
)
def test_one_that_it_does_not_know(flags, said):
    with pytest.raises(UsageError) as refused:
        xla_flags.check({**os.environ, "XLA_FLAGS": flags})
    assert str(refused.value) == said


def test_a_value_that_it_cannot_read():
    with pytest.raises(UsageError, match="XLA_FLAGS=--xla_gpu_autotune_level=much: the installed XLA does not accept"):
        xla_flags.check({**os.environ, "XLA_FLAGS": "--xla_gpu_autotune_level=much"})
