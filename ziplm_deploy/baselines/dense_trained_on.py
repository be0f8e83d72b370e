"""The dense model trained on as the members were: same losses, data and steps, nothing pruned.

Where members learn from labels or from another teacher, this is what percent of dense should be read against: how much
of their score is the training's. Without those the dense model is its own teacher: it has no loss and no gradient, and
training leaves it as it is; then there is no such baseline.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ziplm_deploy.baselines.base import Baseline, DenseSource, installed_version
from ziplm_deploy.machine.info import MachineInfo


class DenseTrainedOn(Baseline):
    """A float32 file of the dense model after the training of the members, in all its rounds."""

    title: ClassVar[str] = "dense float32, trained on as the members"
    engine: ClassVar[str] = "onnxruntime"
    files: ClassVar[tuple[str, ...]] = ("model.onnx",)
    trains: ClassVar[bool] = True
    of_causal: ClassVar[bool] = True

    def tool(self) -> str:
        return f"ziplm-deploy {installed_version('ziplm-deploy', 'pip install ziplm-deploy')}"

    def settings(self, machine: MachineInfo) -> str:
        return "losses, data and steps of recover, as often as the member that was trained most"

    def make(self, dense: DenseSource, folder: Path) -> None:
        dense.export_trained_on(folder / self.files[0])


BASELINE = DenseTrainedOn()
