"""Sessions of ONNX Runtime in this process, for answers and not for timings; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from ziplm_deploy.engines.worker.cache import too_old
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import usable_cores


def cpu_session(model: Path | bytes) -> Any:
    """A session of ONNX Runtime in this process, on all cores that it is granted; warnings are not printed.

    ``model``: a file, or a serialized model. Timings need a worker instead (:meth:`Engine.start_worker`).

    Raises:
        EngineError: ONNX Runtime rejects the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        name = "memory" if isinstance(model, bytes) else model
        raise EngineError(
            f"expected a model that ONNX Runtime runs in {name}, found: {error}; export it again"
        ) from error


def answers_of(session: Any, names: list[str], inputs: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Named outputs of a session of a file.

    Raises:
        EngineError: ONNX Runtime cannot run the graph on these inputs.
    """
    try:
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # as above
        raise EngineError(f"expected ONNX Runtime to run {source}, found: {error}; export it again") from error


def refuse_if_too_old(session: Any) -> None:
    """Raise :class:`EngineError` for a file that this release of ONNX Runtime would answer wrong for."""
    reason = too_old(session, onnxruntime.__version__)
    if reason:
        raise EngineError(reason)
