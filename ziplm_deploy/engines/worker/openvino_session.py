"""OpenVINO on the CPU: a third opinion, in the extra ``openvino``.

One stream, threads as asked, float32 arithmetic: by default it would compute in bfloat16 where the CPU can.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from .facts import EngineFacts

FACTS = EngineFacts("openvino", install='pip install "ziplm-deploy[openvino]"')
OPENVINO_TYPES = {"i64": "tensor(int64)", "i32": "tensor(int32)", "boolean": "tensor(bool)", "f32": "tensor(float)"}


class Sessions:
    """Compiled models of one process with the same options; inference is float32, as the others compute."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would fork a process that calls out
        import openvino

        self.version: str = openvino.__version__.split("-")[0]
        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # the process as a whole is bound to its CPUs
        }

    def load(self, path: str) -> OpenVinoSession:
        return OpenVinoSession(self.core.compile_model(self.core.read_model(path), "CPU", self.settings))


class OpenVinoSession:
    """A compiled model behind the methods of an ONNX Runtime session that this file uses."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = [self._entry(port) for port in compiled.inputs]
        self.outputs = [self._entry(port) for port in compiled.outputs]

    def _entry(self, port: Any) -> argparse.Namespace:
        kind = port.get_element_type().get_type_name()
        shape = [None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]
        return argparse.Namespace(name=port.get_any_name(), type=OPENVINO_TYPES.get(kind, kind), shape=shape)

    def get_inputs(self) -> list[argparse.Namespace]:
        return self.inputs

    def get_outputs(self) -> list[argparse.Namespace]:
        return self.outputs

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by ``names``; all for None."""
        found = self.request.infer(inputs, share_inputs=True)
        return [found[name] for name in (names or [entry.name for entry in self.outputs])]
