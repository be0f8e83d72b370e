"""ONNX Runtime on the CPU: the default engine. Intra-op threads as asked, no spinning, otherwise a default session."""

from __future__ import annotations

import argparse
from typing import Any

from .facts import EngineFacts

FACTS = EngineFacts("onnxruntime", install="pip install onnxruntime", imports=("onnxruntime",))


class Sessions:
    """Sessions of one process with the same options."""

    def __init__(self, options: argparse.Namespace) -> None:
        import onnxruntime

        self.ort = onnxruntime
        self.version: str = onnxruntime.__version__
        onnxruntime.set_default_logger_severity(3)
        self.session_options = onnxruntime.SessionOptions()
        self.session_options.intra_op_num_threads = options.threads
        self.session_options.inter_op_num_threads = 1
        # Threads that spin after a run disturb whatever is timed next.
        self.session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session_options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if options.shared_arena:  # sixty sessions with an arena each would hold sixty peaks of activations
            memory = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            onnxruntime.create_and_register_allocator(memory, None)
            self.session_options.add_session_config_entry("session.use_env_allocators", "1")

    def load(self, path: str) -> Any:
        return self.ort.InferenceSession(path, self.session_options, providers=["CPUExecutionProvider"])
