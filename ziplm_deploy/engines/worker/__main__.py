"""Start of a worker process, by path: its interpreter need not have this package.

By hand, to reproduce a failure: ``python …/engines/worker --probe model.onnx --batch-size 1 --seq-len 128``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))
PACKAGE = "ziplm_worker"


def import_worker() -> None:
    """Make this folder a package, without a path entry in which its files would hide packages of the same name."""
    sys.path = [entry for entry in sys.path if os.path.realpath(entry) != FOLDER]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, os.path.join(FOLDER, "__init__.py"), submodule_search_locations=[FOLDER]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    import_worker()
    sys.exit(importlib.import_module(f"{PACKAGE}.protocol").main(sys.argv[1:]))
