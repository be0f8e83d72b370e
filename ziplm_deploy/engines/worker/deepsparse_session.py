"""DeepSparse on the CPU: the engine that makes zeros fast. It has reached its end of life and pins old packages."""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np

from .facts import EngineFacts
from .inputs import is_fixed, make_inputs, onnx_entry

FACTS = EngineFacts(
    "deepsparse",
    may_abort=True,  # an assertion of its compiler fails at some widths, e.g. an FFN of 904 with AVX-512
    needs_one_of=("avx2", "asimd"),  # it was not built for other CPUs and would only crash
    has_own_environment=True,
)
MAX_OPSET = 16  # of 17 and 18 a part falls back, above them everything


class Sessions:
    """Compiled models of one process. Files that the engine would run in its slow fallback are refused.

    Analytics are off.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ["NM_DISABLE_ANALYTICS"] = "1"
        import importlib.metadata

        import deepsparse

        self.engine_class = deepsparse.Engine
        self.version: str = importlib.metadata.version("deepsparse")
        self.options = options

    def load(self, path: str) -> DeepSparseSession:
        """Compile a file; raises ``ValueError`` for one that would run in the slow fallback."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset > MAX_OPSET:
            raise ValueError(
                f"opset {opset}; DeepSparse runs opsets above {MAX_OPSET} in a slow fallback: export with "
                f"opset {MAX_OPSET}"
            )
        weights = {tensor.name for tensor in model.graph.initializer}  # old files list them among the inputs
        inputs = [onnx_entry(value) for value in model.graph.input if value.name not in weights]
        dynamic = [f"{entry.name} {entry.shape}" for entry in inputs if not is_fixed(entry.shape)]
        if dynamic:
            raise ValueError(
                f"dynamic axes: {', '.join(dynamic)}; DeepSparse runs them in a slow fallback: export with static "
                f"shapes of batch size {self.options.batch_size} and {self.options.seq_len} tokens"
            )
        make_inputs(inputs, self.options.batch_size, self.options.seq_len)  # refuses other shapes before compiling
        engine = self.engine_class(
            model=path,
            batch_size=self.options.batch_size,
            num_cores=self.options.threads,
        )
        return DeepSparseSession(engine, inputs, [onnx_entry(value) for value in model.graph.output])


class DeepSparseSession:
    """A compiled model behind the methods of an ONNX Runtime session that this file uses."""

    def __init__(self, engine: Any, inputs: list[argparse.Namespace], outputs: list[argparse.Namespace]) -> None:
        self.engine, self.inputs, self.outputs = engine, inputs, outputs

    def get_inputs(self) -> list[argparse.Namespace]:
        return self.inputs

    def get_outputs(self) -> list[argparse.Namespace]:
        return self.outputs

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by ``names``, all for None; raises ``ValueError`` for inputs of a shape not compiled for."""
        wrong = [f"{e.name} {inputs[e.name].shape}" for e in self.inputs if list(inputs[e.name].shape) != e.shape]
        if wrong:  # the engine itself would end the process
            expected = ", ".join(f"{entry.name} {tuple(entry.shape)}" for entry in self.inputs)
            raise ValueError(f"inputs {', '.join(wrong)}; the model was compiled for {expected}")
        found = self.engine.run([np.ascontiguousarray(inputs[entry.name]) for entry in self.inputs])
        by_name = {entry.name: value for entry, value in zip(self.outputs, found)}  # noqa: B905 (Python 3.8)
        return [by_name[name] for name in (names or by_name)]
