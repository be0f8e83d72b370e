"""The dense model in torch as transformers' ``from_pretrained`` gives it: eager mode, default attention, float32.

Its answers are those that the dense ONNX file was checked against, so it is timed and not scored. Pooling and
normalization of sentence embeddings, microseconds of it, are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

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
        weights = stock_weights(model) if is_language_model(model) else None
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=weights, max_shard_size="100GB")  # one file


BASELINE = Torch()
