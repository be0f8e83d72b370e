"""Milliseconds of the linears of a causal language model in each form, on the calls of a workload.

Timed is, for each part of a layer (``attention.qkv``, ``feed_forward.down`` …) and for the head, a graph of many such
linears: so many that their 4-bit weights are :data:`CACHES` times the last-level cache, and come from memory as those
of a large model do; no more than the model has in all, and than a file holds::

    x ─┬─ Add(1) ─ MatMul(W₁) ─┐
       ├─ Add(2) ─ MatMul(W₂) ─ Add ─┐
       …                             …      every product has an input of its own, which INT8 rounds

The additions are the same in every form. A linear of another width takes its share of the milliseconds; so does a head
that is wider than a file holds.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel

from exporters.names import HEAD
from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.compression.int8.forms import BITS, BYTES, FORMS, Form
from ziplm_deploy.compression.int8.quantize import chosen_linears, quantize
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.onnx_graphs import load_onnx
from ziplm_deploy.engines import TURN_WARMUP_MS, WorkerOptions, get_engine
from ziplm_deploy.latency.request import USUAL_CACHE_BYTES
from ziplm_deploy.latency.statistics import Milliseconds
from ziplm_deploy.machine.info import last_level_cache_bytes
from ziplm_deploy.machine.locks import timing_alone
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.progress import Note, StepProgress
from ziplm_deploy.recipe import Environment

ROUNDS = 5
CACHES = 4
MOST_WEIGHTS = 450_000_000  # of a graph: files above 2 GB need others beside them
OPSET = 17


class PartTimes(BaseModel):
    """Milliseconds of one part's linear in every form."""

    n_inputs: int
    n_outputs: int
    copies: int  # in the graph that was timed
    ms: dict[Form, Milliseconds]  # of one of them, on the workload


class LinearTimes(Artifact):
    """What the linears of a causal language model cost in each form."""

    KIND: ClassVar[str] = "linear_times"

    environment: Environment
    engine_version: str
    parts: dict[str, PartTimes]  # "attention.qkv", "head" …

    def ms(self, name: str, n_weights: int, form: Form) -> float:
        """Milliseconds of a linear by its name in a file, and the number of its weights.

        A part that the timed model does not have costs as much a weight as its layers do on average.
        """
        part = part_of(name)
        alike = [self.parts[part]] if part in self.parts else [t for p, t in self.parts.items() if p != HEAD]
        weights = sum(times.n_inputs * times.n_outputs for times in alike)
        return n_weights * sum(times.ms[form] for times in alike) / weights


def part_of(name: str) -> str:
    """Which part of its layer a linear is: ``attention.qkv`` of ``layers.3.attention.qkv``; the head is one."""
    return name if name == HEAD else name.split(".", 2)[2]


def linear_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear of a float32 file that can be quantized, by its name.

    Raises:
        UsageError: it has none.  CorruptArtifactError: no ONNX file.
    """
    model = load_onnx(path)
    sizes = {item.name: list(item.dims) for item in model.graph.initializer}
    shapes = {}
    for name, node in chosen_linears(model, path).items():
        first, second = sizes[node.input[1]]
        # A tied head is a Gemm with the transpose of the embedding, [outputs, inputs].
        shapes[name] = (second, first) if node.op_type == "Gemm" else (first, second)
    return shapes


def time_linears(
    shapes: Mapping[str, tuple[int, int]],
    environment: Environment,
    settings: Int8Settings,
    *,
    progress: StepProgress | None = None,
    note: Note | None = None,
) -> LinearTimes:
    """Time the linears of a model in all forms, a process for each part; parts of one shape share theirs.

    Args:
        shapes: inputs and outputs of every linear of the dense model, by its name in the file.
        progress: called with (parts done, parts in all).
        note: told of another measurement that is waited for.

    Raises:
        EngineError: ONNX Runtime cannot run a form.
    """
    widest: dict[str, tuple[int, int]] = {}
    for name, (n_inputs, n_outputs) in shapes.items():
        shape = n_inputs, min(n_outputs, MOST_WEIGHTS // n_inputs)
        widest[part_of(name)] = max(shape, widest.get(part_of(name), (0, 0)), key=math.prod)
    wanted = CACHES * (last_level_cache_bytes() or USUAL_CACHE_BYTES) / BYTES["weight-only-4"]
    total = min(MOST_WEIGHTS, wanted, sum(map(math.prod, shapes.values())))
    alike: dict[tuple[tuple[int, int], bool], PartTimes] = {}
    for done, (part, shape) in enumerate(widest.items(), start=1):
        only_last = part == HEAD
        if (shape, only_last) not in alike:
            copies = max(1, int(total // math.prod(shape)))
            with tempfile.TemporaryDirectory(prefix="linears-", dir=scratch_root()) as folder:
                paths = _write_forms(Path(folder), shape, copies, settings, only_last=only_last)
                with timing_alone(note):
                    ms = _time_forms(paths, environment)
            of_one = {form: value / copies for form, value in ms.items()}
            alike[shape, only_last] = PartTimes(n_inputs=shape[0], n_outputs=shape[1], copies=copies, ms=of_one)
        if progress is not None:
            progress(done, len(widest))
    parts = {part: alike[shape, part == HEAD] for part, shape in widest.items()}
    version = get_engine(environment.engine).version()
    return LinearTimes(environment=environment, engine_version=version, parts=parts)


def _time_forms(paths: Mapping[Form, Path], environment: Environment) -> dict[Form, float]:
    """Expected milliseconds of a request of each file: median over rounds, in which the files take turns."""
    weights = environment.workload.weights
    samples_ms: dict[Form, list[list[float]]] = {form: [] for form in paths}
    generator = np.random.default_rng(0)
    with get_engine(environment.engine).start_worker(WorkerOptions.from_environment(environment)) as worker:
        for form, path in paths.items():
            worker.load(form, path)
        for _ in range(ROUNDS):
            for place in generator.permutation(len(paths)):
                form = list(paths)[place]
                samples_ms[form].append(
                    [
                        float(np.median(worker.time(form, n=1, warmup_ms=TURN_WARMUP_MS, call=call)))
                        for call in range(len(weights))
                    ]
                )
    return {form: float(np.asarray(weights) @ np.median(rounds, axis=0)) for form, rounds in samples_ms.items()}


def _write_forms(
    folder: Path, shape: tuple[int, int], copies: int, settings: Int8Settings, *, only_last: bool
) -> dict[Form, Path]:
    """A file of each form, with the same linears."""
    paths: dict[Form, Path] = {form: folder / f"{form}.onnx" for form in FORMS}
    onnx.save(_stack(*shape, copies, only_last=only_last), str(paths["float32"]))
    plain = settings.without_embeddings
    names = [f"layers.{copy}.part" for copy in range(copies)]
    for form in FORMS:
        if form != "float32":
            weight_only = dict.fromkeys(names, BITS[form]) if form in BITS else {}
            quantize(paths["float32"], paths[form], plain, weight_only=weight_only)
    return paths


def _stack(n_inputs: int, n_outputs: int, copies: int, *, only_last: bool) -> onnx.ModelProto:
    """Linears side by side, each with its own input, and the sum of what they give; ``only_last``: of the last token,
    as the head of a causal model computes."""
    generator = np.random.default_rng(0)
    tensors, nodes, given = [], [], "x"
    if only_last:
        last = {"starts": -1, "ends": np.iinfo(np.int64).max, "axes": 1}
        tensors += [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in last.items()]
        nodes.append(helper.make_node("Slice", ["x", *last], ["last"]))
        given = "last"
    n_tokens = 1 if only_last else "sequence_length"
    total = ""
    for copy in range(copies):
        weight = generator.standard_normal((n_inputs, n_outputs), np.float32) / np.float32(np.sqrt(n_inputs))
        tensors.append(numpy_helper.from_array(weight, f"weight.{copy}"))
        tensors.append(numpy_helper.from_array(np.array([copy / copies], np.float32), f"shift.{copy}"))
        nodes.append(helper.make_node("Add", [given, f"shift.{copy}"], [f"input.{copy}"]))
        product = helper.make_node(
            "MatMul", [f"input.{copy}", f"weight.{copy}"], [f"product.{copy}"], name=f"/layers.{copy}/part/MatMul"
        )
        nodes.append(product)
        if total:
            nodes.append(helper.make_node("Add", [total, f"product.{copy}"], [f"total.{copy}"]))
        total = f"total.{copy}" if total else f"product.{copy}"
    graph = helper.make_graph(
        nodes,
        "linears",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", "sequence_length", n_inputs])],
        [helper.make_tensor_value_info(total, TensorProto.FLOAT, ["batch_size", n_tokens, n_outputs])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
