"""Places of a member's GGUF file, which llama.cpp runs, and of its scores there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ziplm_deploy.recipe import GgufType
from ziplm_deploy.run.member import Member

ENGINE = "llamacpp"


@dataclass(frozen=True)
class GgufFile:
    """``model.gguf`` of a member, with weights of one type."""

    member: Member
    file_type: GgufType

    @property
    def label(self) -> str:
        """Name in benchmarks and tables: ``2x Q8_0`` …"""
        return f"{self.member.name} {self.file_type}"

    @property
    def path(self) -> Path:
        return self.member.folder / "model.gguf"

    @property
    def scores(self) -> Path:
        return self.member.folder / "accuracy_gguf.json"

    @property
    def outcomes(self) -> Path:
        return self.member.folder / "outcomes_gguf.json"
