"""The dense model in torch as transformers' ``from_pretrained`` gives it: eager mode, default attention, float32.

Its answers are those that the dense ONNX file was checked against, so it is timed and not scored. Pooling and
normalization of sentence embeddings, microseconds of it, are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.baselines.base import Baseline, DenseSource, installed_version
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.models.causal import is_language_model, stock_weights
from ziplm_deploy.models.dense import quiet_transformers


class Torch(Baseline):
    """A checkpoint of transformers, in a worker that loads it by itself."""

    title: ClassVar[str] = "dense float32 in torch"
    engine: ClassVar[str] = "torch"
    files: ClassVar[tuple[str, ...]] = ("model.safetensors", "config.json")
    of_causal: ClassVar[bool] = True
    answers_as_dense: ClassVar[bool] = True

    def tool(self) -> str:
        versions = (f"{name} {installed_version(name, f'pip install {name}')}" for name in ("torch", "transformers"))
        return " with ".join(versions)

    def settings(self, machine: MachineInfo) -> str:
        return "from_pretrained, eager mode"

    def make(self, dense: DenseSource, folder: Path) -> None:
        model: Any = dense.model()
        if is_language_model(model):
            _save_language_model(model, folder)
            return
        with quiet_transformers():
            model.save_pretrained(folder, max_shard_size="100GB")  # one file


def _save_language_model(model: Any, folder: Path) -> None:
    """Write weights and configuration alone: settings of generation, which are not used here, may be refused."""
    weights: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in stock_weights(model).items():
        weights.setdefault(tensor.data_ptr(), (name, tensor))  # what is tied is stored once
    stored = {name: tensor.contiguous() for name, tensor in weights.values()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    write_text(folder / "config.json", json.dumps(config, indent=1, default=str) + "\n")


BASELINE = Torch()
