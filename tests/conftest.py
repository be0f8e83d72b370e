"""One torch thread and no network for every test."""

from __future__ import annotations

import os
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

from ziplm_deploy.machine.locks import TIMING_VARIABLE  # noqa: E402
from ziplm_deploy.run import run  # noqa: E402 (after the threads of torch are set)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Runs keep to one torch thread, too: on models this small several only wait for each other."""
    run.usable_cores = lambda: 1


@pytest.fixture(autouse=True, scope="session")
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Locks and scratch folders of these tests are their own: they wait for no measurement beside them."""
    os.environ[TIMING_VARIABLE] = str(tmp_path_factory.mktemp("runtime") / "timing.lock")
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("scratch"))
    tempfile.tempdir = None  # read again
