"""Several processes under ``accelerate launch`` or ``torchrun``: training takes all, everything else only the first.

Imports nothing heavy unless there is more than one process.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

PATIENCE = datetime.timedelta(days=7)  # while the first process profiles or prunes, the others wait


def n_processes() -> int:
    """Processes of this launch; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def threads_of_this_process(granted: int) -> int:
    """This process's share of the threads that all processes of this launch on this machine have together."""
    return max(1, granted // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_first() -> bool:
    """Whether this process is the one that measures and writes."""
    return n_processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Block until every process of this launch has called this."""
    if n_processes() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE).wait_for_everyone()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process go through the body before the others enter it."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()
