"""Whether a process asks for huge pages."""

import subprocess
import sys

import pytest

from trainingcompiler.targets import huge_pages


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Writes the kernel's answer; None is a kernel that has none."""

    def says(text: str | None) -> None:
        path = tmp_path / "enabled"
        if text is not None:
            path.write_text(text, encoding="ascii")
        monkeypatch.setattr(huge_pages, "_KERNEL", path)
        monkeypatch.setattr(sys, "platform", "linux")

    return says


ASKS, ALWAYS, NEVER = "always [madvise] never\n", "[always] madvise never\n", "always madvise [never]\n"


@pytest.mark.parametrize(
    ("policy", "given", "expected"),
    [
        (ASKS, {}, "glibc.malloc.hugetlb=1"),
        (ASKS, {"GLIBC_TUNABLES": ""}, "glibc.malloc.hugetlb=1"),
        (ASKS, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        (ASKS, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, None),
        (ALWAYS, {}, None),
        (NEVER, {}, None),
        (None, {}, None),
    ],
)
def test_they_are_asked_for_where_the_kernel_wants_to_be_asked(kernel, policy, given, expected):
    kernel(policy)
    assert huge_pages.variables(given) == ({} if expected is None else {"GLIBC_TUNABLES": expected})


@pytest.mark.parametrize(
    ("policy", "given", "expected"),
    [
        (ASKS, {}, "small pages"),
        (ASKS, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}, "huge pages"),
        (ASKS, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "small pages"),
        (ALWAYS, {}, "huge pages"),
        (NEVER, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "small pages"),
        (None, {}, ""),
    ],
)
def test_the_banner_says_which_they_are(kernel, policy, given, expected):
    kernel(policy)
    assert huge_pages.described(given) == expected


def test_another_system_is_not_asked(kernel, monkeypatch):
    kernel(ASKS)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.variables({}) == {} and huge_pages.described({}) == ""


@pytest.mark.skipif(huge_pages._policy() != "madvise", reason="the kernel gives huge pages to all, or to none")
def test_a_process_that_asks_takes_its_memory_with_fewer_faults():
    program = (
        "import resource; usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; before = usage();"
        "memory = bytearray(256 * 2**20); print(usage() - before)"
    )
    faults = [
        int(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True).stdout)
        for env in ({}, huge_pages.variables({}))
    ]
    assert faults[1] < faults[0]  # unless no huge page is free, which the kernel then makes by moving others
