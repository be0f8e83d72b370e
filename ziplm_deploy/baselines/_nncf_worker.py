"""The process that runs NNCF: one ONNX file in, one INT8 file of OpenVINO out.

``python _nncf_worker.py request.json`` with ``{"source": ONNX, "target": XML, "batches": [npz, …]}``. It ends with
``{"ok": true}`` or ``{"ok": false, "error": …}`` on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

# A script's own folder comes first, and has a torch.py.
sys.path[:] = [place for place in sys.path if os.path.abspath(place) != os.path.dirname(os.path.abspath(__file__))]
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would fork a process that calls out


def quantize(request: dict[str, Any]) -> None:
    """Write the file as ``OVQuantizationConfig().to_nncf_dict()`` of optimum-intel asks for it."""
    import nncf
    import numpy as np
    import openvino

    model = openvino.Core().read_model(request["source"])
    names = [port.get_any_name() for port in model.inputs]

    def inputs_of(path: str) -> dict[str, Any]:
        with np.load(path) as archive:
            return {name: archive[name] for name in names}

    quantized = nncf.quantize(
        model,
        calibration_dataset=nncf.Dataset(request["batches"], inputs_of),
        mode=None,
        preset=nncf.QuantizationPreset("mixed"),
        subset_size=128,
        fast_bias_correction=True,
        model_type=nncf.ModelType("transformer"),
        ignored_scope=nncf.IgnoredScope(),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix("disable")),
    )
    openvino.save_model(quantized, request["target"], compress_to_fp16=False)


def main(path: str) -> dict[str, Any]:
    """Answer the request in a file."""
    try:
        with open(path, encoding="utf-8") as stream:
            quantize(json.load(stream))
        return {"ok": True}
    except Exception as error:  # whatever it is, the parent says it
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # NNCF prints to stdout as it pleases
    print(json.dumps(main(sys.argv[1])), file=replies, flush=True)
