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
        """Compile a file for this CPU."""
        model = self.core.read_model(path)
        names = [[name_of(port) for port in ports] for ports in (model.inputs, model.outputs)]
        return OpenVinoSession(self.core.compile_model(model, "CPU", self.settings), *names)


def name_of(port: Any) -> str:
    """Name of an input or output in the file; of several, that of its node, which inputs are called by."""
    name: str = port.get_node().get_friendly_name()
    return name if name in port.get_names() else str(port.get_any_name())


class OpenVinoSession:
    """A compiled model behind the methods of an ONNX Runtime session that this file uses.

    Names are those of the file: a compiled input also has those of the nodes that compiling took away behind it.
    """

    def __init__(self, compiled: Any, inputs: list[str], outputs: list[str]) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = [self._entry(*each) for each in zip(inputs, compiled.inputs)]  # noqa: B905 (Python 3.8)
        self.outputs = [self._entry(*each) for each in zip(outputs, compiled.outputs)]  # noqa: B905

    def _entry(self, name: str, port: Any) -> argparse.Namespace:
        kind = port.get_element_type().get_type_name()
        shape = [None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]
        return argparse.Namespace(name=name, type=OPENVINO_TYPES.get(kind, kind), shape=shape)

    def get_inputs(self) -> list[argparse.Namespace]:
        return self.inputs

    def get_outputs(self) -> list[argparse.Namespace]:
        return self.outputs

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by ``names``; all for None."""
        found = self.request.infer(inputs, share_inputs=True)
        return [found[name] for name in (names or [entry.name for entry in self.outputs])]
