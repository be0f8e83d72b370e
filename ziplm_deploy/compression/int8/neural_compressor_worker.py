"""The process that runs Intel's neural-compressor 2.6: one ONNX file in, one INT8 ONNX file out.

One self-contained file that needs only what its own interpreter has: neural-compressor, onnx.

``python neural_compressor_worker.py request.json`` reads its request (:class:`Request`) from a file. While it tunes, it
prints ``{"evaluate": PATH}`` and waits for a line ``{"score": number}`` on stdin; the higher, the better. It ends with
``{"ok": true, "scores": […], "fp32_nodes": […], "met": …}`` or ``{"ok": false, "error": …}``. neural-compressor writes
into the current folder; start it in an empty one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

WORKSPACE = "workspace"
FLOAT32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}


@dataclass(frozen=True)
class Request:
    """What to quantize and how."""

    source: str
    target: str
    nodes: tuple[str, ...]  # MatMul nodes that may be quantized; everything else stays float32
    approach: str  # static or dynamic
    ranges: dict[str, tuple[float, float]]  # node: smallest and largest value that enters it (static)
    per_channel: bool
    reduce_range: bool
    tune: bool  # whether candidates are to be scored; otherwise all nodes are quantized
    max_loss: float  # relative to the score of the source
    max_fp32_share: float  # of the nodes
    max_trials: int
    tuning_seconds: float  # after them no further candidate is tried


class TuningEndedError(Exception):
    """The time for tuning is over."""


class NoBatches:
    """Calibration data as neural-compressor asks for them; ranges are known, so there are none."""

    batch_size = 1

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int]]:
        return iter(())


class Errors(logging.Handler):
    """neural-compressor logs an exception and answers None, as it does when no candidate is good enough."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Unexpected exception") and TuningEndedError.__name__ not in message:
            self.found.append(message)


class Tuning:
    """Asks the parent for the scores of candidates and keeps the best of them on disk."""

    def __init__(self, request: Request, replies: Any) -> None:
        self.request, self.replies = request, replies
        self.scores: dict[tuple[str, ...], float] = {}  # by the nodes that are float32; in the order of trials
        self.best: tuple[bool, float, int] | None = None
        self.best_fp32: list[str] = []
        self.path = Path("candidate.onnx").resolve()
        self.best_path = Path("best.onnx").resolve()
        self.deadline = time.monotonic() + request.tuning_seconds
        self.baseline = self.ask(request.source)
        self.tolerance = request.max_loss * abs(self.baseline)

    def ask(self, path: str) -> float:
        """Score of a file by the parent's metric."""
        answer(self.replies, {"evaluate": path})
        line = sys.stdin.readline()
        if not line:
            raise EOFError("the parent process is gone")
        return float(json.loads(line)["score"])

    def score(self, model: onnx.ModelProto) -> float:
        """neural-compressor's ``eval_func``: called with the float32 model first, then with every candidate."""
        left = float32_nodes(model, self.request.nodes)
        if len(left) == len(self.request.nodes):
            return self.baseline
        key = tuple(left)
        if key in self.scores:
            return self.scores[key]
        if len(left) > self.request.max_fp32_share * len(self.request.nodes):
            return -math.inf  # not worth the parent's time
        if self.scores and time.monotonic() > self.deadline:
            raise TuningEndedError
        onnx.save(cleaned(model), str(self.path))
        score = self.scores[key] = self.ask(str(self.path))
        rank = (score >= self.baseline - self.tolerance, score, -len(left))
        if self.best is None or rank > self.best:
            self.best, self.best_fp32 = rank, left
            self.path.replace(self.best_path)
        return score


def quantize(request: Request, replies: Any) -> dict[str, Any]:
    """Write ``request.target``; returns the reply."""
    from neural_compressor import quantization, set_workspace  # type: ignore[import-not-found]

    set_workspace(WORKSPACE)
    adapt(request)
    errors = Errors()
    logging.getLogger("neural_compressor").addHandler(errors)
    tuning = Tuning(request, replies) if request.tune else None
    model = quantization.fit(
        request.source,
        configuration(request, tuning.tolerance if tuning else 0.0),
        calib_dataloader=NoBatches() if request.approach == "static" else None,
        eval_func=tuning.score if tuning else None,
    )
    if errors.found:
        raise RuntimeError(errors.found[0])
    if tuning is not None and tuning.best is not None:
        shutil.copyfile(tuning.best_path, request.target)
        return {"scores": list(tuning.scores.values()), "fp32_nodes": tuning.best_fp32, "met": tuning.best[0]}
    if tuning is not None or model is None:
        raise RuntimeError("neural-compressor made no candidate")
    onnx.save(cleaned(model.model), request.target)
    return {"scores": [], "fp32_nodes": float32_nodes(model.model, request.nodes), "met": None}


def configuration(request: Request, tolerance: float) -> Any:
    """neural-compressor's settings: only the nodes asked for, and the graph otherwise as it is."""
    from neural_compressor import PostTrainingQuantConfig
    from neural_compressor.config import AccuracyCriterion, TuningCriterion  # type: ignore[import-not-found]

    graph = onnx.load(request.source, load_external_data=False).graph
    linear = {
        "weight": {"dtype": ["int8"], "scheme": ["sym"], "algorithm": ["minmax"]},
        "activation": {"dtype": ["uint8"], "scheme": ["asym"], "algorithm": ["minmax"]},
    }
    linear["weight"]["granularity"] = ["per_channel" if request.per_channel else "per_tensor"]
    linear["activation"]["granularity"] = ["per_tensor"]
    chosen = set(request.nodes)
    return PostTrainingQuantConfig(
        approach=request.approach,
        quant_format="QDQ" if request.approach == "static" else "default",
        domain="nlp",
        recipes={
            # Its optimized graph has contrib operators that only ONNX Runtime knows, and slow ones among them.
            "graph_optimization_level": "DISABLE_ALL",
            "gemm_to_matmul": False,
            "optypes_to_exclude_output_quant": ["MatMul"],
        },
        op_type_dict={kind: FLOAT32 for kind in {node.op_type for node in graph.node} - {"MatMul"}},
        op_name_dict={
            re.escape(node.name): linear if node.name in chosen else FLOAT32
            for node in graph.node
            if node.op_type == "MatMul"
        },
        reduce_range=request.reduce_range,
        calibration_sampling_size=[1],
        quant_level=1,  # fall back step by step from everything quantized
        # timeout=0: the first candidate within the budget ends the tuning.
        tuning_criterion=TuningCriterion(strategy="basic", timeout=0, max_trials=request.max_trials),
        accuracy_criterion=AccuracyCriterion(criterion="absolute", tolerable_loss=float(tolerance)),
    )


def adapt(request: Request) -> None:
    """Make neural-compressor take the ranges of the request instead of calibrating.

    By itself it counts padding like any token, keeps all activations of all batches, collects them again for every
    candidate although ranges do not depend on what is quantized, and looks a tensor's method up at the node that makes
    it: a linear's input comes from a LayerNorm, which is not quantized, and so always got minmax.
    """
    from neural_compressor.adaptor.ox_utils.calibration import ONNXRTAugment  # type: ignore[import-not-found]

    def given(self: Any, q_config: Any = None) -> dict[str, list[tuple[float, float]]]:
        graph = self.augmented_model.graph
        known = {node.input[0]: request.ranges[node.name] for node in graph.node if node.name in request.ranges}
        self.reduce_range = False  # 7-bit weights alone do not saturate; it would take a bit of activations, too
        self._dataloder_for_next_split_model = []  # spelt so by neural-compressor, which wants it set
        # It wants a range of every output; only what enters a linear is rounded by it.
        return {output.name: [known.get(output.name, (0.0, 1.0))] for output in graph.output}

    ONNXRTAugment.get_activation_tensors_calib_range = given


def float32_nodes(model: onnx.ModelProto, nodes: tuple[str, ...]) -> list[str]:
    """Nodes, of ``nodes``, that a candidate leaves as they were; neural-compressor renames the others."""
    present = {node.name for node in model.graph.node if node.op_type == "MatMul"}
    return [name for name in nodes if name in present]


def cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that other engines take, too: quantized linears called as before, and only the operator sets in use.

    neural-compressor lets *every* reader of a linear's input read its 8-bit form, so the residual stream would be
    rounded; here only linears do.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    made_by = {output: node for node in graph.node for output in node.output}
    exact = {  # dequantized tensor: the tensor before
        node.output[0]: made_by[node.input[0]].input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in made_by
    }
    products = set()
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.endswith("_quant"):
            node.name = node.name[: -len("_quant")]
            products.add(node.output[0])
        else:
            node.input[:] = [exact.get(name, name) for name in node.input]
    widen_biases(graph, products)
    used = {node.domain for node in graph.node} | {""}
    sets = [entry for entry in copy.opset_import if entry.domain in used]
    kept = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in sets]
    del copy.opset_import[:]
    copy.opset_import.extend(kept)
    return copy


def widen_biases(graph: onnx.GraphProto, products: set[str]) -> None:
    """Give the biases that are added to ``products`` the shape ``[1, 1, out]``.

    With ``[out]`` ONNX Runtime merges MatMul and Add to a Gemm before it looks for integers, and computes in float32.
    """
    biases = {item.name: item for item in graph.initializer if len(item.dims) == 1}
    for node in graph.node:
        for product, place in ((0, 1), (1, 0)):
            if node.op_type == "Add" and node.input[product] in products and node.input[place] in biases:
                bias = onnx.numpy_helper.to_array(biases[node.input[place]]).reshape(1, 1, -1)
                # A copy: equal biases are stored once, and other nodes read them, too.
                stored = onnx.numpy_helper.from_array(bias, f"{node.name}_bias")
                graph.initializer.append(stored)
                node.input[place] = stored.name
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def answer(replies: Any, reply: dict[str, Any]) -> None:
    """Write one line of JSON to the parent."""
    print(json.dumps(reply), file=replies, flush=True)


def main(arguments: list[str]) -> int:
    """Quantize as the request in a JSON file says; returns the exit status."""
    with open(arguments[0], encoding="utf-8") as stream:
        request = Request(**json.load(stream))
    # Libraries print to stdout as they please; replies go to a private copy of it.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer(replies, {"ok": True, **quantize(request, replies)})
    except Exception as error:  # everything becomes a reply: the parent decides
        traceback.print_exc()
        answer(replies, {"ok": False, "error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    # Python put this file's folder first on the path, where neural_compressor.py is our module and not the package.
    sys.path = [entry for entry in sys.path if os.path.realpath(entry) != os.path.dirname(os.path.realpath(__file__))]
    sys.exit(main(sys.argv[1:]))
