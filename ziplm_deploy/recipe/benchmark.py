"""The section ``benchmark``: end-to-end measurement and the closed loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.choices import page_names
from ziplm_deploy.recipe.workload import EngineName

if TYPE_CHECKING:
    BaselineName = str
else:
    BaselineName = Literal[page_names("baselines")]


class BenchmarkConfig(Frozen):
    rounds: int = Field(
        80,
        ge=5,
        description="Interleaved rounds (A B C A B C …) of the first processes "
        "together; a process takes up to three times its share while noise within it leaves a ratio unsure.",
    )
    processes: int = Field(
        5,
        ge=2,
        description="Processes a file, one after the other: they are the sample that intervals are made of.",
    )
    max_processes: int = Field(
        15,
        ge=2,
        description="Up to so many processes a file while an interval, or the A/A line, reaches beyond `tolerance`.",
    )
    runs_per_round: int = Field(
        1,
        ge=1,
        description="Timed runs of a variant a round, after 10 ms of untimed ones. More rounds of one run each beat "
        "fewer of several: what disturbs a machine for a second then meets all variants alike.",
    )
    max_seconds: float = Field(
        180.0,
        gt=0,
        description="Time limit of the first processes' rounds for ten files; more files get proportionally more. No "
        "further process is started after it.",
    )
    tolerance: float = Field(
        0.02,
        ge=0,
        lt=0.5,
        description="A member may miss its target by this fraction. Also how far intervals and the A/A line may reach "
        "before nothing is decided, and what a benchmark measures on for.",
    )
    overshoot: float = Field(0.10, gt=0, description="A member more than this above its target gets a looser budget.")
    median_length: bool = Field(
        True,
        description="Time all once more on requests of the evaluation texts' median length, where that is much below "
        "`environment.workload.seq_len`.",
    )
    baseline_engine: EngineName | None = Field(
        None, description="Engine of the dense baseline; default: that of `environment`, where the members serve."
    )
    engines: tuple[Literal["llamacpp"], ...] = Field(
        (),
        exclude_if=lambda engines: not engines,
        description="Text-generation: engines whose files are timed and scored beside the members' own: `llamacpp`, "
        "those of `export.gguf`.",
    )
    max_corrections: int = Field(3, ge=0, description="How often the closed loop may solve again a target.")
    parity_atol: float | None = Field(
        None,
        gt=0,
        description="Largest difference between torch and ONNX outputs at export; default: 1e-4, and 1e-3 of the "
        "logits of text-generation, which are tens and which float32 itself rounds by nearly 1e-4.",
    )
    baselines: tuple[BaselineName, ...] | None = Field(
        None,
        description="What users get from the dense model without pruning, measured beside the members: "
        "`onnxruntime-int8`, `openvino-int8`, `torch`, `dense-trained-on`; default: all that can be made here, `[]`: "
        "none.",
    )

    @property
    def measures_baselines(self) -> bool:
        """Whether anything but members may be timed beside the dense model."""
        return self.baselines is None or bool(self.baselines)
