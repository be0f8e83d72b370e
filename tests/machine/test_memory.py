"""Freed memory is used again: counted in page faults of a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
