"""How much memory is free, and that freed memory is used again: counted in page faults of a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ziplm_deploy.machine.memory import available_memory_bytes

FAULTS = """
import resource, sys, torch
from ziplm_deploy.machine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # until small blocks in between have found their places
    torch.ones(2**24).sum()  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    environment = {"THP_MEM_ALLOC_ENABLE": "0", "PATH": "", "OMP_NUM_THREADS": "1"}  # huge pages would hide the faults
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_tensors_are_used_again_without_page_faults() -> None:
    pages_of_one = 2**26 // 4096
    assert faults("default") > 4 * pages_of_one  # what it is for: if this fails, the module can go
    assert faults("keep") < pages_of_one // 10


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 8 << 30),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 8 << 30),
        ({"memory.max": f"{4 << 30}\n", "memory.current": f"{1 << 30}\n"}, 3 << 30),
        ({"memory.max": f"{1 << 30}\n", "memory.current": f"{2 << 30}\n"}, 0),
        ({"memory.max": f"{64 << 30}\n", "memory.current": "0\n"}, 8 << 30),
        ({"memory/memory.limit_in_bytes": f"{2 << 30}\n", "memory/memory.usage_in_bytes": f"{1 << 30}\n"}, 1 << 30),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "0\n"}, 8 << 30),
    ],
)
def test_free_memory_is_at_most_what_a_container_leaves(tmp_path: Path, group: dict[str, str], expected: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:  8388608 kB\n", encoding="utf-8")
    (tmp_path / "memory").mkdir()
    for name, text in group.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert available_memory_bytes(tmp_path / "meminfo", tmp_path) == expected


def test_a_system_that_tells_nothing_has_no_known_memory(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path / "none", tmp_path) == 0
