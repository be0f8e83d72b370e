"""Huge pages for the memory of worker processes: transparent ones, which glibc asks for when it is told to.

With pages of 4 KiB, what a model's weights cost to read depends on which physical pages a process happened to get; with
2 MiB much less does. glibc asks for them (``madvise``) with the tunable ``glibc.malloc.hugetlb=1`` (glibc manual,
Memory Allocation Tunables, since 2.35) where the kernel grants transparent huge pages (Documentation/admin-guide/mm/
transhuge.rst).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ziplm_deploy.errors import EnvironmentMismatchError

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb=1"
ASSIGNMENT = f"{VARIABLE}={TUNABLE}"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FIRST_GLIBC = (2, 35)


def why_no_huge_pages(setting: Path = SETTING) -> str:
    """Why this system gives a process no huge pages when asked; empty if it does."""
    try:
        text = setting.read_text(encoding="utf-8")
    except OSError:
        return f"no {setting}: not Linux, or a kernel without transparent huge pages"
    if "[never]" in text:
        return f"{setting} says never; as root: echo madvise > {setting}"
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        libc = ""
    name, _, version = libc.partition(" ")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or numbers < FIRST_GLIBC:
        return f"the C library is {libc or 'unknown'}, glibc {'.'.join(map(str, FIRST_GLIBC))} or later is needed"
    return ""


def check_huge_pages(setting: Path = SETTING) -> None:
    """Refuse to go on where a process would be given no huge pages.

    Raises:
        EnvironmentMismatchError: says what is missing.
    """
    reason = why_no_huge_pages(setting)
    if reason:
        raise EnvironmentMismatchError(
            f"expected transparent huge pages for environment.huge_pages, found {reason}; or leave the field out"
        )


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process that asks for huge pages; other tunables are kept."""
    others = [
        part for part in environment.get(VARIABLE, "").split(":") if part and not part.startswith("glibc.malloc.h")
    ]
    return {**environment, VARIABLE: ":".join([*others, TUNABLE])}
