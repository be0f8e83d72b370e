"""What the machine grants: affinity, cgroup quotas of both versions, CPU facts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ziplm_deploy.errors import EnvironmentMismatchError
from ziplm_deploy.machine.info import (
    allowed_cpus,
    cgroup_memory,
    cgroup_quota,
    check_threads,
    cpu_model,
    last_level_cache_bytes,
    machine_info,
    memory_bytes,
    usable_cores,
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_machine_info_is_filled_and_its_fingerprint_leaves_out_what_latency_does_not_depend_on() -> None:
    info = machine_info()
    assert info.cpu_model
    assert 1 <= info.usable_cores <= info.logical_cores
    assert info.memory_bytes > 2**27
    other = info.model_copy(update={"memory_bytes": 1, "operating_system": "other", "logical_cores": 999})
    assert other.fingerprint == info.fingerprint
    assert info.model_copy(update={"cpu_model": "another"}).fingerprint != info.fingerprint


def test_affinity_limits_usable_cores() -> None:
    before = set(allowed_cpus())
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
        with pytest.raises(EnvironmentMismatchError, match="found threads=2"):
            check_threads(2)
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() <= len(before)


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("200000 100000", 2.0),
        ("150000 100000", 1.5),
        ("max 100000", None),
        ("", None),
        ("garbage", None),
        ("5 0", None),
    ],
)
def test_cgroup_v2_quota(tmp_path: Path, content: str, cores: float | None) -> None:
    write(tmp_path / "pod" / "cpu.max", content)
    assert cgroup_quota("0::/pod\n", tmp_path) == cores


def test_tightest_parent_counts(tmp_path: Path) -> None:
    write(tmp_path / "cpu.max", "max 100000")
    write(tmp_path / "pod" / "cpu.max", "100000 100000")
    write(tmp_path / "pod" / "box" / "cpu.max", "400000 100000")
    assert cgroup_quota("0::/pod/box", tmp_path) == 1.0


def test_own_group_mounted_as_root_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "cpu.max", "300000 100000")
    assert cgroup_quota("0::/not/visible/in/here", tmp_path) == 3.0


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2.5), ("-1", None), ("x", None)])
def test_cgroup_v1_quota(tmp_path: Path, quota: str, cores: float | None) -> None:
    write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", quota)
    write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000")
    assert cgroup_quota("4:cpu,cpuacct:/job\n3:memory:/job\n", tmp_path) == cores


@pytest.mark.parametrize(("content", "limit"), [("4294967296\n", 2.0**32), ("max\n", None), ("", None)])
def test_cgroup_memory_is_the_tightest_limit(tmp_path: Path, content: str, limit: float | None) -> None:
    write(tmp_path / "pod" / "box" / "memory.max", content)
    assert cgroup_memory("0::/pod/box\n", tmp_path) == limit
    write(tmp_path / "pod" / "memory.max", "1000")
    assert cgroup_memory("0::/pod/box\n", tmp_path) == 1000.0
    write(tmp_path / "memory" / "job" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", "2000\n")
    assert cgroup_memory("4:cpu,cpuacct:/job\n3:memory:/job\n", tmp_path) == 2000.0


def test_a_container_has_no_more_memory_than_it_is_granted(tmp_path: Path) -> None:
    write(tmp_path / "proc" / "self" / "cgroup", "0::/\n")
    assert memory_bytes(tmp_path / "proc", tmp_path / "groups") == memory_bytes(tmp_path, tmp_path) > 2**20
    write(tmp_path / "groups" / "memory.max", str(2**20))
    assert memory_bytes(tmp_path / "proc", tmp_path / "groups") == 2**20


def test_quota_of_part_of_a_core_counts_as_one(tmp_path: Path) -> None:
    write(tmp_path / "proc" / "self" / "cgroup", "0::/\n")
    write(tmp_path / "group" / "cpu.max", "50000 100000")
    assert usable_cores(tmp_path / "proc", tmp_path / "group") == 1


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "32K", "512K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20
    (tmp_path / "index3" / "size").write_text("odd\n")
    assert last_level_cache_bytes(tmp_path) == 512 * 2**10
    assert last_level_cache_bytes(tmp_path / "missing") == 0


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    assert cgroup_quota("", tmp_path) is None
    assert usable_cores(tmp_path, tmp_path) == (os.cpu_count() or 1)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_out_of_range_are_refused_with_what_is_granted(threads: int) -> None:
    with pytest.raises(EnvironmentMismatchError, match=rf"between 1 and {usable_cores()} thread.*threads={threads}"):
        check_threads(threads)


def cpuinfo_of_arm(*parts: str) -> str:
    cores = [
        f"processor\t: {i}\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: {p}\n" for i, p in enumerate(parts)
    ]
    return "\n".join(cores)


def test_cpus_without_a_name_are_told_apart_by_maker_and_part() -> None:
    n1, v1, mixed = (cpu_model(cpuinfo_of_arm(*parts)) for parts in (["0xd0c"] * 2, ["0xd40"] * 2, ["0xd0c", "0xd40"]))
    assert n1.endswith("implementer 0x41 part 0xd0c")
    assert len({n1, v1, mixed}) == 3
    assert cpu_model("processor: 0\nmodel name: A CPU\nCPU part: 1\n") == "A CPU"
    assert cpu_model("processor: 0\n") == ""
