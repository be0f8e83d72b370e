"""Check that an ONNX file answers like its torch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from exporters.heads import evaluation_mode


class ParityMismatch(ValueError):
    """An ONNX file gives other answers than its torch model; ``difference`` is the largest absolute one."""

    def __init__(self, message: str, difference: float) -> None:
        super().__init__(message)
        self.difference = difference


Inputs = Mapping[str, torch.Tensor]


def check_parity(model: nn.Module, onnx_path: Path, inputs: Inputs | Sequence[Inputs], atol: float) -> float:
    """Largest absolute difference over all outputs of the file, both run on ``inputs``.

    Vectors of tokens are compared where there is no padding: at padding they mean nothing.

    Args:
        inputs: by name, or several such, for which the file is loaded once.

    Raises:
        ParityMismatch: shapes differ, an output is not finite, or a difference is above ``atol``.
    """
    session = parity_session(onnx_path)
    wanted = [item.name for item in session.get_inputs()]
    names = [item.name for item in session.get_outputs()]
    largest = 0.0
    for each in [inputs] if isinstance(inputs, Mapping) else inputs:
        found = dict(zip(names, session.run(names, {name: each[name].numpy() for name in wanted}), strict=True))
        with evaluation_mode(model), torch.no_grad():
            outputs = model(**each)
        mask = each.get("attention_mask")
        pairs = {name: _at_tokens(outputs[name].numpy(), found[name], mask) for name in names}
        largest = max(largest, *(checked_difference(name, *pair, onnx_path, atol) for name, pair in pairs.items()))
    return largest


def _at_tokens(expected: np.ndarray, found: np.ndarray, mask: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays without their vectors of padding, if they are vectors of tokens ``[batch, tokens, size]``."""
    if mask is None or expected.ndim != 3 or expected.shape != found.shape or expected.shape[:2] != tuple(mask.shape):
        return expected, found
    real = mask.numpy() == 1
    return expected[real], found[real]


def parity_session(onnx_path: Path) -> Any:
    """Session of ONNX Runtime with as many threads as torch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(onnx_path), options, providers=["CPUExecutionProvider"])


def checked_difference(
    name: str,
    expected: np.ndarray,
    found: np.ndarray,
    path: Path,
    atol: float,
    advice: str = "export it again, with another opset or static shapes",
) -> float:
    """Largest absolute difference of an output from torch's.

    Raises:
        ParityMismatch: shapes differ, a value is not finite, or the difference is above ``atol``; ``advice`` ends the
            message of the last.
    """
    if expected.shape != found.shape:
        raise ParityMismatch(
            f"expected {name} of shape {expected.shape} from {path}, found {found.shape}; export it again", float("inf")
        )
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise ParityMismatch(
            f"expected finite {name} from {path}, found NaN or infinity; check the checkpoint", float("nan")
        )
    difference = float(np.abs(expected - found).max(initial=0.0))
    if difference > atol:
        raise ParityMismatch(
            f"expected {name} of {path} within {atol:g} of torch, found a difference of {difference:.3g}; {advice}",
            difference,
        )
    return difference
