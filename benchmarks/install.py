"""What the install weighs and how long it takes: ``python benchmarks/install.py [--torch REQUIREMENT]``.

A fresh virtual environment gets the CPU build of torch and this package with the extra ``quickstart``, by the commands
below and with whatever the package manager has cached. The CPU build comes from uv (``--torch-backend cpu``), as README
says; with ``--torch`` from pip, where it is offered a CPU build of that version.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Figure, write_result


def commands(environment: Path, torch: str | None, extra: str) -> list[list[str]]:
    """The install, command by command."""
    pip, package = [str(environment / "bin" / "pip"), "install", "--quiet"], f"{ROOT}[{extra}]"
    make = [sys.executable, "-m", "venv", str(environment)]
    if torch is not None:
        return [make, [*pip, torch], [*pip, package]]
    uv = [str(environment / "bin" / "uv"), "pip", "install", "--python", str(environment / "bin" / "python")]
    return [make, [*pip, "uv"], [*uv, "--torch-backend", "cpu", package]]


def size_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, each counted once."""
    sizes = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if not path.is_dir():
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", help="requirement that pip installs first, such as torch==2.13.0")
    parser.add_argument("--extra", default="quickstart")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ziplm-install-") as folder:
        environment = Path(folder) / "environment"
        began = time.monotonic()
        for command in commands(environment, options.torch, options.extra):
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        python = [str(environment / "bin" / "python"), "-c", "import torch, transformers as t; print(t.__version__)"]
        transformers = subprocess.run(python, check=True, capture_output=True, text=True).stdout.strip()
        total = size_bytes(environment)
        packages = sorted(
            (
                (size_bytes(path), path.name)
                for path in environment.glob("lib/python*/site-packages/*")
                if path.is_dir()
            ),
            reverse=True,
        )
    figures = {
        "install_gigabytes": Figure(total / 1e9, "GB", "<= 2.5", n=1),
        "install_seconds": Figure(seconds, "s", "", n=1),
    }
    rows = [{"package": name, "bytes": size} for size, name in packages[:12]]
    settings = {
        "torch": options.torch or "uv --torch-backend cpu",
        "extra": options.extra,
        "transformers": transformers,
    }
    write_result("install", figures, rows, settings, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
