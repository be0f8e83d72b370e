"""Members of the family and their files: what they are called and where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ziplm_deploy.models.member_files import WEIGHTS_FILE
from ziplm_deploy.recipe import Variant, file_label

DENSE = "dense"


@dataclass(frozen=True)
class Member:
    """One model of the family, the dense one or a :class:`PrunedMember`, and its places in the run folder."""

    name: str
    run_folder: Path
    trained: bool  # whether members are trained after pruning: then they lie elsewhere before
    exported: Variant = field(default=Variant.FP32, kw_only=True)  # what it is exported as

    @property
    def is_dense(self) -> bool:
        return self.name == DENSE

    @property
    def folder(self) -> Path:
        """Where the member lies as it serves."""
        return self.run_folder / self.name

    @property
    def pruned_folder(self) -> Path:
        """Where the member lies before it is trained; its own folder if it never is."""
        return self.run_folder / "pruning" / self.name if self.trained else self.folder

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE

    @property
    def pruned_weights(self) -> Path:
        return self.pruned_folder / WEIGHTS_FILE

    @property
    def plan(self) -> Path:
        return self.run_folder / "pruning" / f"{self.name}.json"

    @property
    def training_record(self) -> Path:
        return self.folder / "training.json"

    @property
    def continuations(self) -> Path:
        """Texts that a causal language model wrote."""
        return self.folder / "continuations.json"

    @property
    def compressed_folder(self) -> Path:
        """Sparse checkpoint and records of how the member's variants were made."""
        return self.run_folder / "compression" / self.name

    @property
    def sparse_folder(self) -> Path:
        return self.compressed_folder / "sparse"

    @property
    def sparsity_record(self) -> Path:
        return self.compressed_folder / "sparsity.json"

    @property
    def linear_ranking(self) -> Path:
        return self.compressed_folder / "linears.json"

    def stand_in(self, variant: Variant) -> Path:
        """ONNX file as fast as a variant of this member will be, with other weights: what the closed loop measures."""
        return self.run_folder / "pruning" / f"{self.name}-{variant}.onnx"

    def file(self, variant: Variant) -> ModelFile:
        return ModelFile(self, variant, self.folder)

    @property
    def as_exported(self) -> ModelFile:
        """``model.onnx`` of the member as it serves, or ``model.gguf`` where llama.cpp runs it."""
        return self.file(self.exported)

    @property
    def as_pruned(self) -> ModelFile:
        """The exported file as it was before training."""
        return ModelFile(self, self.exported, self.pruned_folder)


@dataclass(frozen=True)
class PrunedMember(Member):
    """The member of a target: what is pruned until it is ``target`` times as fast as the dense model."""

    target: float


@dataclass(frozen=True)
class ModelFile:
    """One file of a member: the member in one variant, in its own folder or in that of the untrained model."""

    member: Member
    variant: Variant
    folder: Path

    @property
    def label(self) -> str:
        """Name in benchmarks and tables: ``2x``, ``2x int8`` …"""
        return file_label(self.member.name, self.variant)

    @property
    def path(self) -> Path:
        return self.folder / self.variant.file_name

    @property
    def scores(self) -> Path:
        return self.folder / self.variant.accuracy_file

    @property
    def outcomes(self) -> Path:
        return self.folder / self.variant.outcomes_file

    @property
    def is_before_training(self) -> bool:
        return self.folder != self.member.folder

    @property
    def int8_record(self) -> Path:
        return self.member.compressed_folder / f"{self.variant}.json"
