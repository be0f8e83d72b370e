"""``manifest.json``: which stages ran with which inputs, and what a resumed run must remember."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field

from ziplm_deploy.artifacts import Artifact


@dataclass(frozen=True)
class Correction:
    """State of the closed loop for one member: the predicted speedup to aim for, and what earlier aims measured."""

    predicted_target: float
    corrections: int = 0  # how often the loop has solved the target again because of what it measured
    history: list[tuple[float, float]] = field(default_factory=list)  # (aim, measured speedup)
    float32_slowdown: float = 1.0  # of the last file against the one measured, since linears stayed in float32
    float32_restarts: int = 0  # how often the loop has begun again for that
    refused_plans: int = 0  # how often it aimed a little higher because the engine could not run the member's file
    refused_speedup: float = 0.0  # predicted speedup of the last such plan


class Manifest(Artifact):
    """What a run folder remembers."""

    KIND: ClassVar[str] = "manifest"

    name: str = ""
    seed: int = 0
    argv: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    model_hash: str = ""
    calibration_hash: str = ""
    evaluation_hash: str = ""
    train_hash: str = ""
    stages: dict[str, str] = Field(default_factory=dict)  # name -> content key, of those that ran to their end
    seconds: dict[str, float] = Field(default_factory=dict)  # wall time of every stage, when it last ran
    corrections: dict[str, Correction] = Field(default_factory=dict)  # by member
    correction_keys: dict[str, str] = Field(default_factory=dict)  # inputs that a member's correction belongs to
    notes: dict[str, str] = Field(default_factory=dict)  # topic -> warning that the report repeats
    gzip_bytes: dict[str, int] = Field(default_factory=dict)  # file hash -> size

    @classmethod
    def migrated(cls, raw: dict[str, Any], version: Any) -> dict[str, Any] | None:
        """Fields of a manifest from before it had a kind: corrections held their key, under other names."""
        if version is not None:
            return None
        entries = raw.get("corrections", {})
        keys = {name: entry["key"] for name, entry in entries.items()}
        renamed = {
            "count": "corrections",
            "slowdown": "float32_slowdown",
            "rooms": "float32_restarts",
            "sidesteps": "refused_plans",
            "floor": "refused_speedup",
        }
        corrections = {
            name: {
                renamed.get(field_name, field_name): value for field_name, value in entry.items() if field_name != "key"
            }
            for name, entry in entries.items()
        }
        return {**raw, "corrections": corrections, "correction_keys": keys}
