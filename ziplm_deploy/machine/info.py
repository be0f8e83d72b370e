"""What the machine is, and how much of it this process may use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel

from ziplm_deploy.errors import EnvironmentMismatchError

_Limit = Callable[[Path], "float | None"]  # of a control group's folder

# Only flags that change which kernels an engine picks; the full list differs between kernels of one machine.
INFERENCE_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def machine_info() -> MachineInfo:
    """CPU model, instruction sets, cores and memory of this machine."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    flags = set(_field(cpuinfo, "flags").split()) or set(_field(cpuinfo, "Features").split())
    return MachineInfo(
        cpu_model=cpu_model(cpuinfo) or platform.processor() or platform.machine() or "unknown",
        isa_flags=tuple(flag for flag in INFERENCE_FLAGS if flag in flags),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=memory_bytes(),
        operating_system=f"{platform.system()} {platform.release()}",
    )


def cpu_model(cpuinfo: str) -> str:
    """Name of the CPU in the text of ``/proc/cpuinfo``; empty if it tells nothing.

    ARM kernels give numbers instead of a name, which ``lscpu`` looks up: maker and part of every kind of core.
    """
    named = _field(cpuinfo, "model name")
    if named:
        return named
    cores = {tuple(_field(core, f"CPU {key}") for key in ("implementer", "part")) for core in cpuinfo.split("\n\n")}
    known = sorted(f"implementer {implementer} part {part}" for implementer, part in cores if implementer and part)
    return f"{platform.machine()} {', '.join(known)}" if known else ""


def usable_cores(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process is granted: scheduler affinity ∩ the tightest cgroup (v1 or v2) CPU quota.

    A quota of 1.5 cores counts as 1: a second thread would be throttled half of the time.
    """
    affinity = len(allowed_cpus()) if proc == Path("/proc") else os.cpu_count() or 1
    quota = cgroup_quota(_read(proc / "self" / "cgroup"), cgroup_root)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def allowed_cpus() -> list[int]:
    """CPU numbers of the scheduler affinity, ascending (all CPUs where the system does not tell)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cgroup_quota(membership: str, root: Path) -> float | None:
    """Smallest CPU quota, in cores, of the groups in ``membership`` (text of ``/proc/self/cgroup``) and their parents.

    Returns None where nothing is limited. Inside a container the own group is often mounted as ``root`` itself, so
    ``root`` is looked at too.
    """
    return min(_limits(membership, root, "cpu", _quota_v2, _quota_v1), default=None)


def cgroup_memory(membership: str, root: Path) -> float | None:
    """Smallest limit of memory, in bytes, of the groups in ``membership``, as in :func:`cgroup_quota`."""
    return min(_limits(membership, root, "memory", _memory_v2, _memory_v1), default=None)


def _limits(membership: str, root: Path, controller: str, of_v2: _Limit, of_v1: _Limit) -> list[float]:
    found: list[float] = []
    for line in membership.splitlines() or ["0::/"]:
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            found += _quotas_upwards(root, group, of_v2)
        elif controller in controllers.split(","):
            for mount in (root / controllers, root / controller):
                found += _quotas_upwards(mount, group, of_v1)
    return found


def check_threads(threads: int) -> None:
    """Refuse more threads than the process is granted: they would be throttled and timings meaningless.

    Raises:
        EnvironmentMismatchError: ``threads`` is below 1 or above :func:`usable_cores`.
    """
    granted = usable_cores()
    if not 1 <= threads <= granted:
        raise EnvironmentMismatchError(
            f"expected between 1 and {granted} thread(s), which is what CPU affinity and cgroup quota grant this "
            f"process, found threads={threads}; set environment.threads to at most {granted}, or grant more cores"
        )


def _quotas_upwards(mount: Path, group: str, read_quota: Callable[[Path], float | None]) -> list[float]:
    folder = mount / group.strip("/")
    found = []
    while True:
        quota = read_quota(folder)
        if quota is not None:
            found.append(quota)
        if folder == mount or mount not in folder.parents:
            return found
        folder = folder.parent


def _quota_v2(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split()
    if len(fields) != 2 or not fields[0].isdigit() or not fields[1].isdigit() or int(fields[1]) == 0:
        return None  # absent, or "max": unlimited
    return int(fields[0]) / int(fields[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None  # absent, or -1: unlimited
    return int(quota) / int(period)


def _memory_v2(folder: Path) -> float | None:
    limit = _read(folder / "memory.max").strip()
    return float(limit) if limit.isdigit() else None  # absent, or "max": unlimited


def _memory_v1(folder: Path) -> float | None:
    limit = _read(folder / "memory.limit_in_bytes").strip()
    return float(limit) if limit.isdigit() else None  # unlimited is a number beyond any memory


def last_level_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that the first core reads through; 0 where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [_read(path).strip() for path in caches.glob("index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[:-1].isdigit() and text[-1] in units]
    return max(sizes, default=0)


def memory_bytes(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the machine, or as much of it as the tightest cgroup (v1 or v2) grants; 0 where nobody tells."""
    limit = cgroup_memory(_read(proc / "self" / "cgroup"), cgroup_root)
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    return whole if limit is None else min(whole, int(limit))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


class MachineInfo(BaseModel):
    """What a measurement depends on. ``fingerprint`` compares only what changes latency."""

    cpu_model: str
    isa_flags: tuple[str, ...]  # the ones that matter for inference: avx2, avx512f, avx512_vnni, amx_int8 …
    logical_cores: int
    usable_cores: int  # affinity ∩ cgroup quota
    memory_bytes: int
    operating_system: str

    @property
    def fingerprint(self) -> str:
        return f"{self.cpu_model} | {' '.join(self.isa_flags)}"


VERSIONED = ("ziplm-deploy", "torch", "transformers", "tokenizers", "onnx", "onnxruntime", "numpy")


def versions(packages: Sequence[str] = VERSIONED) -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
