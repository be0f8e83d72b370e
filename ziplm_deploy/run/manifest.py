"""``manifest.json``: which stages ran with which inputs, and what a resumed run must remember."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from ziplm_deploy.artifacts import Artifact, Fields
from ziplm_deploy.tasks.lengths import TokenLengths


def _from_manifest_without_kind(fields: Fields) -> Fields:
    """Fields of today from those of a manifest of 0.1.0: its corrections held their key, and had other names."""
    entries = fields.get("corrections", {})
    renamed = {
        "count": "corrections",
        "slowdown": "float32_slowdown",
        "rooms": "float32_restarts",
        "sidesteps": "refused_plans",
        "floor": "refused_speedup",
    }
    corrections = {
        member: {renamed.get(name, name): value for name, value in entry.items() if name != "key"}
        for member, entry in entries.items()
    }
    keys = {member: entry["key"] for member, entry in entries.items()}
    return {**fields, "corrections": corrections, "correction_keys": keys}


def _from_schema_1(fields: Fields) -> Fields:
    """Fields of today from those of schema 1: it had one origin for all stages, and members' notes among the others."""
    origin = {"versions": fields.get("versions", {}), "argv": fields.get("argv", [])}
    notes = fields.get("notes", {})
    own = {topic: topic.partition(" of ")[2] for topic in notes if topic.startswith(("sidesteps of ", "refit of "))}
    of_members: dict[str, dict[str, str]] = {}
    for topic, member in own.items():
        of_members.setdefault(member, {})[topic.partition(" of ")[0]] = notes[topic]
    return {
        **fields,
        "origins": dict.fromkeys(fields.get("stages", {}), origin),
        "notes": {topic: text for topic, text in notes.items() if topic not in own},
        "notes_of_members": of_members,
    }


@dataclass(frozen=True)
class Origin:
    """What made a stage's results."""

    versions: dict[str, str]
    argv: list[str]


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
    settled: bool = False  # aimed at by what a draft of the plan measured, see ``stages/settle.py``

    def without_history(self) -> Correction:
        """Aim as before, as if nothing had been measured; what float32 costs and the engine refuses stays known."""
        return replace(self, corrections=0, history=[], float32_restarts=0)


class Settled(BaseModel):
    """What a draft of a plan was promised and measured; neither where it could not be had, or noise hid it."""

    key: str  # everything that it depends on
    promised: float | None = Field(None, gt=0, allow_inf_nan=False)
    measured: float | None = Field(None, gt=0, allow_inf_nan=False)


class Settling(Artifact):
    """Drafts of the plans of all targets, timed before the search."""

    KIND: ClassVar[str] = "settling"

    drafts: dict[str, Settled]  # by member


class Manifest(Artifact):
    """What a run folder remembers."""

    KIND: ClassVar[str] = "manifest"
    SCHEMA_VERSION: ClassVar[int] = 2
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {0: _from_manifest_without_kind, 1: _from_schema_1}

    name: str = ""
    seed: int = 0
    argv: list[str] = Field(default_factory=list)  # of the last command, as the next
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    model_hash: str = ""
    calibration_hash: str = ""
    evaluation_hash: str = ""
    train_hash: str = ""
    stages: dict[str, str] = Field(default_factory=dict)  # name -> content key, of those that ran to their end
    origins: dict[str, Origin] = Field(default_factory=dict)  # of every stage, when it last ran
    outputs: dict[str, dict[str, int]] = Field(default_factory=dict)  # of every stage: path in this folder -> bytes
    differences: dict[str, float] = Field(default_factory=dict)  # of an exporting stage's file to torch, the largest
    seconds: dict[str, float] = Field(default_factory=dict)  # wall time of every stage, all its runs together
    corrections: dict[str, Correction] = Field(default_factory=dict)  # by member
    correction_keys: dict[str, str] = Field(default_factory=dict)  # inputs that a member's correction belongs to
    ended_loop: str | None = None  # key of the benchmark that satisfied the loop around it, and is not reported
    notes: dict[str, str] = Field(default_factory=dict)  # topic -> warning that the report repeats
    lengths: dict[str, TokenLengths] = Field(default_factory=dict)  # of calibration and evaluation texts
    notes_of_members: dict[str, dict[str, str]] = Field(default_factory=dict)  # member -> topic -> warning
    gzip_bytes: dict[str, int] = Field(default_factory=dict)  # file hash -> size
