"""What is done to a causal model's weights before they become integers: inputs smoothed, 4-bit weights by GPTQ."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from exporters.nbits_matmul import BlockWeights
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.gptq import rounded_by_gptq
from ziplm_deploy.compression.int8.quantize import chosen_linears
from ziplm_deploy.compression.int8.smoothing import smooth_as_chosen
from ziplm_deploy.compression.onnx_graphs import load_onnx
from ziplm_deploy.errors import ParityError
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import export_checked
from ziplm_deploy.tasks.batching import Batch
from ziplm_deploy.tasks.evaluation_set import TOKENS_AT_ONCE

JUDGED = 8  # windows of text that linears are ranked by: others than those that maxima and moments are of
WINDOWS = 16


def watched_batches(run: Run) -> list[Batch]:
    """Whole windows that maxima and second moments of inputs are of; of few windows the same that judge."""
    rows = run.data.calibration_rows[JUDGED : JUDGED + WINDOWS] or run.data.calibration_rows[:WINDOWS]
    return run.data.encode(rows, max(1, TOKENS_AT_ONCE // run.data.seq_len))


def smoothed_file(run: Run, model: nn.Module, path: Path, strengths: Mapping[str, float], title: str) -> float | None:
    """Smooth a model in place and export it to ``path``: the largest difference to torch, None where that is too much.

    A model whose own file is within the limit may be beyond it then, by rounding; the caller goes on with that file.
    """
    smooth_as_chosen(model, watched_batches(run), strengths)
    try:
        return export_checked(run, model, path, f"{title}, smoothed")
    except ParityError as error:
        run.progress.note(f"{title}: inputs are not smoothed: {error}")
        return None


def can_be_smoothed(run: Run, model: nn.Module, strengths: Mapping[str, float], title: str) -> bool:
    """Whether a model's file still answers like torch once its inputs are smoothed, as the model's then are."""
    with tempfile.TemporaryDirectory(prefix="smoothed-", dir=scratch_root()) as folder:
        return smoothed_file(run, model, Path(folder) / Variant.FP32.file_name, strengths, title) is not None


def rounded_linears(run: Run, model: nn.Module, paths: Collection[str]) -> dict[str, BlockWeights]:
    """4-bit integers of linears of a torch model, by module path."""

    def weight_of(path: str) -> NDArray[np.float32]:
        weight: NDArray[np.float32] = model.get_submodule(path).weight.detach().float().cpu().numpy()  # type: ignore[operator]
        return weight

    return _rounded(run, model, weight_of, {path: path for path in paths})


def rounded_in_file(run: Run, model: nn.Module, onnx: Path, names: Collection[str]) -> dict[str, BlockWeights]:
    """4-bit integers of linears of a float32 file, by name there; ``model`` has the same weights in torch."""
    if not names:
        return {}
    graph = load_onnx(onnx)
    nodes, constants = chosen_linears(graph, onnx), {item.name: item for item in graph.graph.initializer}

    def weight_of(name: str) -> NDArray[np.float32]:
        weight = numpy_helper.to_array(constants[nodes[name].input[1]])
        # [out, in]: a tied head is a Gemm with the transpose of that already
        return np.ascontiguousarray(weight if nodes[name].op_type == "Gemm" else weight.T)

    return _rounded(
        run, model, weight_of, {name: paths[0] for name, paths in linear_groups(model, list(names)).items()}
    )


def _rounded(
    run: Run, model: nn.Module, weight_of: Callable[[str], NDArray[np.float32]], path_of: Mapping[str, str]
) -> dict[str, BlockWeights]:
    limit = int(run.recipe.prune.memory_limit_gb * 2**30)
    return rounded_by_gptq(model, watched_batches(run), weight_of, path_of, limit)
