"""Dense models as their baselines see them: an ONNX file, checked against torch, and calibration inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from tests.helpers.models import tiny_inputs, tiny_model
from ziplm_deploy.baselines import DenseSource
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.tasks import get_task


def dense_source(folder: Path, model_type: str = "bert", task: str = "sentence-similarity") -> DenseSource:
    """A tiny model, exported as a run exports it."""
    model = tiny_model(model_type, task)
    recipe = parse_recipe(
        {
            "name": "x",
            "model": {"path": "some/model", "task": task},
            "speedups": [2],
            "environment": {"workload": {"seq_len": 32}},
        }
    )
    path = folder / "model.onnx"
    OnnxExport.from_recipe(recipe, get_task(recipe.model)).write(model, path, model_type)
    return DenseSource(path, lambda: model, lambda: calibration(model), machine_info(), _no_training)


def calibration(model: nn.Module, n: int = 6) -> list[dict[str, np.ndarray]]:
    """Calls of one example each, by the names of the graph's inputs."""
    made = []
    for seed in range(n):
        inputs = {name: value.numpy() for name, value in tiny_inputs(model, batch_size=1, seed=seed).items()}
        if "input_ids" in inputs:
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
        made.append(inputs)
    return made


def _no_training(path: Path) -> None:
    raise AssertionError("expected no training of the dense model")
