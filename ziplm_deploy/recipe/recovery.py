"""The sections ``dense`` and ``recover``: training before and after pruning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.recipe.base import Frozen

WINDOWS_A_STEP = 4  # every token of them has logits of the whole vocabulary


class TrainConfig(Frozen):
    """What every training has in common; between two targets the learning rate falls linearly to 0."""

    epochs: float = Field(3.0, gt=0, description="Passes over the training data, for each member.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps for each member, instead of `epochs`.")
    batch_size: int = Field(32, ge=1, description="Examples a step and process.")
    learning_rate: float = Field(
        2e-4, gt=0, le=1.0, description="Peak of AdamW's learning rate; small models take more: MiniLM 5e-4."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="Mixed precision, also of a teacher; bf16 pays on CPUs with AMX or AVX-512 BF16, fp16 needs a GPU. "
        "`auto`: bf16 on such a CPU, else fp32.",
    )
    report_to: str = Field("none", description="Logger of Trainer, e.g. `tensorboard`; by default nothing is logged.")
    save_steps: int = Field(200, ge=1, description="Steps between checkpoints; a killed run goes on from the last.")

    @property
    def arithmetic(self) -> Literal["fp32", "bf16", "fp16"]:
        """The precision that a training has on this machine."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if {"amx_bf16", "avx512_bf16"} & set(machine_info().isa_flags) else "fp32"


class DenseConfig(TrainConfig):
    """Training of the dense model for its task, before anything is pruned."""

    train: bool = Field(
        False, description="Fine-tune `model.path` for the task first, with a new head if it has none; needs labels."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of `epochs`.")


class LoraConfig(Frozen):
    """Low-rank adapters, trained in place of the weights of the layers' linears, and added to them in the end."""

    rank: int = Field(
        8, ge=1, description="Rank of the change of each linear; narrower ones get their own. Below the hidden size."
    )
    alpha: float = Field(16.0, gt=0, description="The change counts `alpha / rank` times, so that rates suit any rank.")


class RecoverConfig(TrainConfig):
    """Training of pruned members towards their teacher."""

    batch_size: int = Field(
        32,
        ge=1,
        description="Examples a step and process; text-generation, whose examples are windows of text: "
        f"{WINDOWS_A_STEP} unless named.",
    )

    mode: Literal["none", "one-shot", "gradual"] = Field(
        "none",
        description="`one-shot`: prune each target from dense, then train; `gradual`: from the one trained before.",
    )
    learning_rate: float = Field(
        1e-4, gt=0, le=1.0, description="Peak of AdamW's learning rate; a high one undoes what pruning got right."
    )
    task_weight: float = Field(0.0, ge=0, description="Weight of the task's own loss; needs labels.")
    logit_weight: float = Field(0.5, ge=0, description="Weight of the distance to the teacher's outputs (KL, cosine).")
    token_weight: float = Field(
        0.5, ge=0, description="Weight of the layer-wise distance to the teacher's hidden states, over real tokens."
    )
    temperature: float = Field(2.0, gt=0, description="Softens both sides of the KL; as published.")
    teacher: str | None = Field(
        None, description="Checkpoint with the same hidden size, layers and vocabulary. Default: the dense model."
    )
    dropout: bool = Field(False, description="The student's own dropout; it blurs what it should imitate.")
    rebuild_hessians: bool = Field(
        True, description="Gradual: collect Hessians anew from the model trained before, not from the dense one."
    )
    freeze_embeddings: bool = Field(
        True, description="Embeddings are never pruned; left as they are, a step is faster and takes less memory."
    )
    lora: LoraConfig | None = Field(
        None,
        exclude_if=lambda lora: lora is None,
        description="`{rank: 8, alpha: 16}`: train adapters in place of weights, for models whose full training does "
        "not fit into memory; merged before export.",
    )
    teacher_cache_gb: float = Field(
        2.0,
        ge=0,
        description="Teacher answers are kept (hidden states in fp16) and serve every epoch and member if they fit in "
        "this.",
    )

    @property
    def teaches_more_than_dense(self) -> bool:
        """Whether the dense model would learn something, too: it would not from its own answers alone."""
        return self.mode != "none" and (self.task_weight > 0 or self.teacher is not None)

    @model_validator(mode="after")
    def _some_loss(self) -> RecoverConfig:
        if self.task_weight + self.logit_weight + self.token_weight == 0:
            raise ValueError("one of task_weight, logit_weight and token_weight must be above 0")
        return self

    @model_validator(mode="after")
    def _adapters_alone_are_trained(self) -> RecoverConfig:
        if self.lora is not None and not self.freeze_embeddings:
            raise ValueError(
                "expected freeze_embeddings: true with lora, which trains adapters of the layers' linears and nothing "
                "else, found false; leave one of them out"
            )
        return self
