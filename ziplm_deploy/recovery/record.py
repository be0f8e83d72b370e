"""What a training leaves beside the model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

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
    # None: of none, or from before it was counted
    trained_parameters: int | None = Field(None, exclude_if=lambda count: count is None)
    lora_rank: int | None = Field(None, exclude_if=lambda rank: rank is None)  # of adapters; None: weights were trained

    @classmethod
    def of_none(cls) -> TrainingRecord:
        """Record of a member that had nothing to learn."""
        return cls(device="none", steps=0, examples_per_step=0, seconds=0.0, samples_per_second=0.0, losses=[])
