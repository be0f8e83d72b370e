"""TODO recovery.record."""

from __future__ import annotations

from typing import ClassVar

from ziplm_deploy.artifacts import Artifact


class TrainingRecord(Artifact):
    """What one training took, and how its loss fell."""

    KIND: ClassVar[str] = "training_record"

    device: str
    steps: int
    examples_per_step: int  # of all processes together
    seconds: float  # of the steps that the last process ran: less than all where a killed training was resumed
    samples_per_second: float
    losses: list[tuple[int, float]]  # (step, mean training loss since the entry before)
