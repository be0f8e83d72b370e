"""INT8 by Intel's neural-compressor 2.6, which keeps single linears in float32 until an accuracy budget holds.

It runs in an environment of its own (``ziplm-deploy setup neural-compressor``), driven through
``neural_compressor_worker.py``. The ranges of activations are ours, so that both back ends quantize by the same real
tokens, and the scores of its candidates are measured here, where task and data are.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziplm_deploy.artifacts import atomic_path
from ziplm_deploy.compression.int8.quantize import check_weights, chosen_linears
from ziplm_deploy.compression.int8.scales import ActivationRange
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.onnx_graphs import load_onnx
from ziplm_deploy.errors import EngineError, NumericalError, UsageError
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.machine.side_environments import NEURAL_COMPRESSOR, quiet_environment
from ziplm_deploy.machine.worker_process import WorkerGoneError, WorkerProcess

WORKER = Path(__file__).with_name("neural_compressor_worker.py")


@dataclass(frozen=True)
class TuningLimits:
    """When tuning ends, if no candidate holds the budget before."""

    max_trials: int = 150  # enough to try every linear of twelve layers alone, then a good half of them together
    tuning_seconds: float = 3600.0  # no further candidate is tried after them
    timeout_seconds: float = 1800.0  # for the worker to make the next candidate; then it is killed


DEFAULT_LIMITS = TuningLimits()


@dataclass(frozen=True)
class NeuralCompressorResult:
    """What the tuning came to. Linears are module paths of the model."""

    scores: tuple[float, ...]  # of candidates, in the order in which they were tried; none without ``evaluate``
    fp32_linears: tuple[str, ...]  # that stayed float32, in graph order
    met: bool | None  # whether the written file holds ``max_loss``; None: nothing was scored


def quantize_with_neural_compressor(
    source: Path,
    destination: Path,
    settings: Int8Settings,
    *,
    ranges: Mapping[str, ActivationRange] | None = None,
    evaluate: Callable[[Path], float] | None,
    limits: TuningLimits = DEFAULT_LIMITS,
) -> NeuralCompressorResult:
    """Write ``source`` with INT8 linears to ``destination``; whole or not at all.

    Static files are in QuantizeLinear/DequantizeLinear form, dynamic ones have DynamicQuantizeLinear and MatMulInteger.
    Linears outside of layers, embeddings, normalization, Softmax and the residual stream stay float32.

    Args:
        source: float32 file of ``exporters.export_encoder``.
        ranges: by module path, for ``static``: what ``linear_ranges`` found.
        settings: their engine decides nothing here; the form is neural-compressor's.
        evaluate: score of an ONNX file, the higher, the better. It is called for ``source``, then for candidates until
            one loses at most ``max_loss`` of it (relative to its magnitude) with at most ``max_fp32_share`` of the
            linears in float32. If none does, the best is written and ``met`` is False. A candidate's file is gone after
            the call. None: all linears are quantized, unscored.

    Raises:
        UsageError: ``int8.method`` is qat, there are no linears inside layers, or ``static`` without the range of one.
        NumericalError: NaN or infinite weights or scores.
        EngineError: neural-compressor is not set up, refuses the model, dies or hangs.
        CorruptArtifactError: ``source`` is no ONNX file.  StorageError: ``destination`` cannot be written.
    """
    config = settings.config
    if config.method == "qat":
        raise UsageError("expected int8.method static or dynamic for neural-compressor, found qat; change it")
    nodes = _nodes(source)
    node_ranges = _node_ranges(nodes, ranges or {}) if config.method == "static" else {}
    interpreter = NEURAL_COMPRESSOR.interpreter()
    with _folder() as folder:
        request = {
            "source": str(_alone(source, folder / "source")),
            "target": str(folder / "result.onnx"),
            "nodes": list(nodes),
            "ranges": node_ranges,
            "tune": evaluate is not None,
            "max_trials": limits.max_trials,
            "tuning_seconds": limits.tuning_seconds,
            **_request_of(settings),
        }
        (folder / "request.json").write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
        with _Worker(interpreter, folder, limits.timeout_seconds) as worker:
            reply = worker.run(evaluate)
        with atomic_path(destination) as temporary:
            shutil.copyfile(folder / "result.onnx", temporary)
    return NeuralCompressorResult(
        scores=tuple(reply["scores"]),
        fp32_linears=tuple(nodes[name] for name in reply["fp32_nodes"]),
        met=reply["met"],
    )


def _alone(source: Path, folder: Path) -> Path:
    """A copy in a folder of its own: beside a config.json, neural-compressor would import transformers."""
    folder.mkdir()
    return Path(shutil.copyfile(source, folder / source.name))


def _request_of(settings: Int8Settings) -> dict[str, Any]:
    """The settings' part of a request."""
    config = settings.config
    return {
        "reduce_range": settings.reduce_range,
        "approach": config.method,
        "per_channel": config.per_channel,
        "max_loss": config.max_loss,
        "max_fp32_share": config.max_fp32_share,
    }


def _nodes(source: Path) -> dict[str, str]:
    """The MatMul nodes of linears inside layers, and the module path of each."""
    model = load_onnx(source)
    linears = chosen_linears(model, source)
    check_weights(model, linears)
    return {node.name: name for name, node in linears.items()}


def _node_ranges(nodes: Mapping[str, str], ranges: Mapping[str, ActivationRange]) -> dict[str, list[float]]:
    """(low, high) of what enters each node."""
    missing = [name for name in nodes.values() if name not in ranges]
    if missing:
        raise UsageError(f"expected a range for {missing[0]} for static INT8, found none; measure it first")
    return {node: [ranges[name].low, ranges[name].high] for node, name in nodes.items()}


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where the worker runs; after its failure the request and its model stay there, to reproduce it."""
    with tempfile.TemporaryDirectory(prefix="neural-compressor-", dir=scratch_root()) as scratch:
        folder = Path(scratch)
        try:
            yield folder
        except EngineError as error:
            kept = Path(tempfile.mkdtemp(prefix="ziplm-neural-compressor-"))
            left_out = shutil.ignore_patterns("workspace", "*.onnx")
            shutil.copytree(folder, kept, ignore=left_out, symlinks=True, dirs_exist_ok=True)
            raise EngineError(str(error).replace(str(folder), str(kept))) from error


class _Worker:
    """The running process; every failure of it is an :class:`EngineError`."""

    def __init__(self, interpreter: str, folder: Path, timeout_seconds: float) -> None:
        self._command = [interpreter, str(WORKER), "request.json"]
        self._folder, self._timeout_seconds = folder, timeout_seconds
        try:
            # It writes its history into the current folder.
            self._process = WorkerProcess(
                self._command, folder / "log.txt", environment=quiet_environment(), cwd=folder
            )
        except OSError as error:
            raise self._failure(str(error)) from error

    def run(self, evaluate: Callable[[Path], float] | None) -> dict[str, Any]:
        """Answer the worker's questions until it is done; returns its reply."""
        while True:
            try:
                reply = self._process.receive(self._timeout_seconds)
            except WorkerGoneError as error:
                raise self._failure(str(error), self._process.last_words()) from error
            if "evaluate" in reply and evaluate is not None:
                self._process.send({"score": _score(evaluate, Path(reply["evaluate"]))})
            elif reply.get("ok"):
                return reply
            else:
                raise self._failure(str(reply.get("error", reply)), self._process.last_words())

    def _failure(self, found: str, last_words: str = "") -> EngineError:
        return EngineError(
            f"expected neural-compressor to quantize the model, found: {found}; reproduce with: "
            f"cd {shlex.quote(str(self._folder))} && {shlex.join(self._command)}{last_words}"
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()  # at the end of its reply it has nothing left to do


def _score(evaluate: Callable[[Path], float], path: Path) -> float:
    score = float(evaluate(path))
    if not math.isfinite(score):
        raise NumericalError(f"expected a finite score of {path.name}, found {score}; check the metric and its data")
    return score
