"""What ``ziplm-deploy doctor`` finds: machine, engines, and the noise floor: one model against itself."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ziplm_deploy.baselines import BASELINES, get_baseline
from ziplm_deploy.engines import ENGINES, Engine, get_engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.machine.info import machine_info, versions
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.machine.side_environments import NEURAL_COMPRESSOR, SideEnvironment
from ziplm_deploy.progress import Note
from ziplm_deploy.recipe import BenchmarkConfig, Environment

TOOLS = (NEURAL_COMPRESSOR,)
ROUNDS = 100
LAYERS, SHAPE, WIDTH = 4, (1, 128, 384), 384  # a few milliseconds, like the models that are served
NOISY = 0.02  # above the default tolerance of a target, timings cannot decide whether it was reached


def examine(rounds: int = ROUNDS, note: Note | None = None) -> dict[str, Any]:
    """Findings: ``machine, versions, engines, tools, baselines, noise``; ``note`` is told what it waits for."""
    return {
        "machine": machine_info().model_dump(mode="json"),
        "versions": versions(),
        "engines": [_finding(name, get_engine(name)) for name in ENGINES],
        "tools": [_finding(tool.name, tool) for tool in TOOLS],
        "baselines": [_baseline(name) for name in BASELINES],
        "noise": measure_noise(rounds, note),
    }


def _finding(name: str, found: Engine | SideEnvironment) -> dict[str, Any]:
    try:
        if isinstance(found, SideEnvironment):
            found.check()
        return {"name": name, "version": found.version(), "missing": "", "notice": found.notice}
    except EngineError as error:
        return {"name": name, "version": None, "missing": str(error), "notice": found.notice}


def _baseline(name: str) -> dict[str, Any]:
    """Who would make a baseline here, and how."""
    baseline = get_baseline(name)
    found = {"name": name, "title": baseline.title, "tool": None, "settings": "", "missing": ""}
    try:
        get_engine(baseline.engine).version()
        return found | {"tool": baseline.tool(), "settings": baseline.settings(machine_info())}
    except EngineError as error:
        return found | {"missing": str(error)}


def measure_noise(rounds: int = ROUNDS, note: Note | None = None) -> dict[str, Any]:
    """A/A run: a small model against itself in pairs of interleaved processes, one thread each.

    ``floor`` is how far the 95 % interval of their ratio reaches from 1: smaller differences mean nothing.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=scratch_root()) as folder:
        path = Path(folder) / "model.onnx"
        write_probe(path)
        settings = BenchmarkConfig(rounds=rounds, max_processes=BenchmarkConfig().processes, max_seconds=60)
        try:
            record = compare({"probe": path}, Environment(), settings, "probe", note=note)
        except EngineError as error:
            return {"error": str(error)}
    floor = record.itself.floor
    return {
        "aa_ratio": record.aa_ratio,
        "aa_low": record.aa_low,
        "aa_high": record.aa_high,
        "floor": floor,
        "median_ms": record.variants[0].latency.median_ms,
        "verdict": "noisy: close other programs" if floor > NOISY else "good",
    }


def write_probe(path: Path) -> None:
    """A chain of matrix products as an ONNX file."""
    generator = np.random.default_rng(0)
    nodes, weights, current = [], [], "x"
    for layer in range(LAYERS):
        up, down = f"up{layer}", f"down{layer}"
        for name, shape in ((up, (WIDTH, 4 * WIDTH)), (down, (4 * WIDTH, WIDTH))):
            values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0]))
            weights.append(numpy_helper.from_array(values, name))
        nodes += [
            helper.make_node("MatMul", [current, up], [f"wide{layer}"]),  # [1, tokens, width] -> [1, tokens, 4 width]
            helper.make_node("Relu", [f"wide{layer}"], [f"active{layer}"]),
            helper.make_node("MatMul", [f"active{layer}", down], [f"out{layer}"]),  # -> [1, tokens, width]
        ]
        current = f"out{layer}"
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, SHAPE)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
