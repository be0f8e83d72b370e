"""Freed memory stays with the process, so that the next training step finds it again.

glibc gives every block above a threshold (at most 32 MiB) back to the kernel when it is freed, and gets new pages,
zeroed one fault at a time, for the next one. Activations are such blocks: without this a training step of MiniLM on
32 x 250 tokens took 6.1 s on two cores, with it 3.7 s; a forward pass on as many 1.7 and 1.3 s.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, until this process ends; False where there is no glibc to tell."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
