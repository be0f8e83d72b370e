"""Stock static INT8 of OpenVINO: what the one-line export of sentence-transformers writes.

``export_static_quantized_openvino_model(model, None, …)`` (sentence-transformers 5.7 and 6.2, ``backend/quantize.py``)
takes ``OVQuantizationConfig()`` of optimum-intel 2.2.0 (``optimum/intel/openvino/configuration.py``), whose
``to_nncf_dict`` are the arguments of ``nncf.quantize``: preset ``mixed`` (symmetric weights, asymmetric activations),
``subset_size`` 128, fast bias correction, model type ``transformer``, overflow fix ``disable``; the file is saved
without rounding to float16. optimum-intel itself takes no transformers that this package runs on, so NNCF, OpenVINO's
own quantizer, is called with these arguments. Calibration examples are the recipe's, one a call as there, padded to the
tokens that are served, where theirs are sentences of SST-2 padded to 384.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from ziplm_deploy.baselines.base import Baseline, DenseSource, installed_version
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.machine.side_environments import quiet_environment
from ziplm_deploy.machine.worker_process import WorkerGoneError, WorkerProcess

WORKER = Path(__file__).with_name("_nncf_worker.py")
INSTALL = 'pip install "ziplm-deploy[openvino]"'
TIMEOUT_SECONDS = 1800.0


class OpenVinoInt8(Baseline):
    """Static INT8 by NNCF, with optimum-intel's settings."""

    title: ClassVar[str] = "stock static INT8 of OpenVINO"
    engine: ClassVar[str] = "openvino"
    files: ClassVar[tuple[str, ...]] = ("model.xml", "model.bin")
    calibrates: ClassVar[bool] = True

    def tool(self) -> str:
        return f"nncf {installed_version('nncf', INSTALL)} with openvino {installed_version('openvino', INSTALL)}"

    def settings(self, machine: MachineInfo) -> str:
        return "arguments of OVQuantizationConfig()"

    def make(self, dense: DenseSource, folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="baseline-", dir=scratch_root()) as scratch:
            paths = []
            for index, batch in enumerate(dense.batches()):
                paths.append(str(Path(scratch) / f"batch{index}.npz"))
                np.savez(paths[-1], **dict(batch))  # type: ignore[arg-type]  # numpy types its keyword allow_pickle only
            # the worker runs in another folder
            source, target = dense.onnx.resolve(), (folder / self.files[0]).resolve()
            request = {"source": str(source), "target": str(target), "batches": paths}
            file = Path(scratch) / "request.json"
            file.write_text(json.dumps(request), encoding="utf-8")
            _run(file)


def _run(request: Path) -> None:
    """Run NNCF in a process of its own: it brings a handler for logs, progress bars and telemetry.

    Raises:
        EngineError: it refuses the model, dies or hangs.
    """
    command = [sys.executable, str(WORKER), str(request)]
    log = request.with_name("log.txt")
    process = WorkerProcess(command, log, environment=quiet_environment(), cwd=request.parent)
    try:
        reply = process.receive(TIMEOUT_SECONDS)
        found, words = "" if reply.get("ok") else str(reply.get("error", reply)), ""
    except WorkerGoneError as error:
        found, words = str(error), process.last_words()
    finally:
        process.close()
    if found:
        raise EngineError(
            f"expected NNCF to quantize the dense model, found: {found}; leave openvino-int8 out of "
            f"benchmark.baselines{words}"
        )


BASELINE = OpenVinoInt8()
