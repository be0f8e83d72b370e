"""The recipe: one frozen model per stage, every field with its unit, default and reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TaskName = Literal[
    "sentence-similarity",
    "text-classification",
    "text-regression",
    "question-answering",
    "token-classification",
    "fill-mask",
    "image-classification",
]
EngineName = Literal["onnxruntime", "openvino", "deepsparse"]
Variant = Literal["fp32", "int8", "sparse", "sparse-int8"]
MethodName = Literal["ziplm", "magnitude", "random", "uniform", "layer-drop", "flap"]


class Frozen(BaseModel):
    """Base of all recipe sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Frozen):
    path: str = Field(
        description="Local folder, hub id, or `package:NAME` for a model that an installed Python package ships."
    )
    task: TaskName = Field(description="What the model does; decides head, data columns, metric and ONNX outputs.")
    revision: str | None = Field(None, description="Hub revision; only used with a hub id.")
    pooling: Literal["mean", "cls"] = Field(
        "mean", description="How sentence-similarity models turn token vectors into one embedding."
    )
    normalize: bool = Field(True, description="Scale embeddings to length 1 (sentence-similarity).")


class DataConfig(Frozen):
    calibration: str | None = Field(
        None, description="Data for Hessians and search: CSV/JSONL/Parquet file (`.gz` allowed) or a `datasets` name."
    )
    evaluation: str | None = Field(
        None, description="Labelled data for the metric of the ONNX files; without it accuracy is not reported."
    )
    train: str | None = Field(
        None, description="Training data of `recover` and `dense`; may be unlabelled text. Default: `calibration`."
    )
    calibration_split: str = Field("train", description="Split, when `calibration` is a `datasets` name.")
    train_split: str = Field("train", description="Split, when `train` is a `datasets` name.")
    evaluation_split: str = Field("validation", description="Split, when `evaluation` is a `datasets` name.")
    config_name: str | None = Field(None, description="Configuration of a `datasets` name, e.g. `sst2` of `glue`.")
    text_columns: tuple[str, ...] | None = Field(
        None, description="Columns with the text (or image); default: found from the task's usual names."
    )
    label_column: str | None = Field(None, description="Column with the label; default: the task's usual name.")
    n_calibration: int = Field(
        512, ge=8, description="Calibration examples for the Hessians; accuracy saturates near 512 (see one_shot)."
    )
    n_evaluation: int | None = Field(None, ge=1, description="Evaluation examples; default: all of them.")
    n_train: int | None = Field(None, ge=1, description="Training examples; default: all of them.")


class Environment(Frozen):
    engine: EngineName = Field(
        "onnxruntime", description="Engine that will serve; `openvino` is an extra, `deepsparse` needs a set-up."
    )
    batch_size: int = Field(1, ge=1, le=4096, description="Requests in one call: 1 for latency, 16+ for throughput.")
    seq_len: int = Field(128, ge=4, le=8192, description="Tokens a request (ignored for image models).")
    threads: int = Field(1, ge=1, description="Intra-op threads; never more than the process is granted.")

    @property
    def scenario(self) -> str:
        """MLPerf name of the serving pattern."""
        return "SingleStream" if self.batch_size == 1 else "Offline"

    def describe(self) -> str:
        return f"{self.engine}, batch {self.batch_size}, {self.seq_len} tokens, {self.threads} thread(s)"


class ProfileConfig(Frozen):
    table: Path | None = Field(None, description="Use this latency table instead of measuring one.")
    allow_foreign_table: bool = Field(
        False, description="Accept a table of another machine or engine version; predictions may then be far off."
    )
    stack_depth: int = Field(4, ge=1, le=32, description="Identical sub-blocks a cell; 1 is biased by warm caches.")
    width_ratio: float = Field(0.9, gt=0.3, lt=1.0, description="FFN widths shrink by this factor a level.")
    width_align: int = Field(8, ge=1, description="FFN widths are multiples of this: one AVX register of floats.")
    min_rounds: int = Field(15, ge=3, description="Interleaved rounds before any cell may be called stable.")
    max_rounds: int = Field(120, ge=3, description="Interleaved rounds after which measuring stops.")
    precision: float = Field(
        0.01, gt=0, lt=0.5, description="Stop when every cell's standard error of the median is below this fraction."
    )
    max_seconds: float = Field(180.0, gt=0, description="Time limit of the measuring loop (export not included).")


class SearchConfig(Frozen):
    n_sequences: int = Field(96, ge=8, description="Calibration examples on which candidate plans are compared.")
    n_rerank: int = Field(256, ge=8, description="Examples on which the best candidates are compared again.")
    sensitivity_levels: int = Field(
        4, ge=1, le=16, description="Levels a module at which the loss is measured before the search; decides most."
    )
    coefficient_steps: int = Field(20, ge=0, description="Plans proposed by the surrogate, its weights perturbed.")
    swap_evaluations: int = Field(100, ge=0, description="Plans tried by swaps of levels around the best plan.")


class PruneConfig(Frozen):
    method: MethodName = Field("ziplm", description="`ziplm`, or a baseline behind the same interface.")
    damping: float = Field(
        0.01, gt=0, le=1.0, description="Hessian damping, relative to its mean diagonal; more when tokens are few."
    )
    centred: bool = Field(True, description="Centred Hessian: weights and bias are compensated jointly.")
    reconstruct: bool = Field(
        True, description="After the search, refit kept weights to the dense residual stream, layer by layer."
    )
    memory_limit_gb: float = Field(8.0, gt=0, description="Limit for Hessians and database; layers stream under it.")
    search: SearchConfig = Field(default_factory=SearchConfig, description="Search over level assignments.")


class TrainConfig(Frozen):
    """What every training has in common; between two targets the learning rate falls linearly to 0."""

    epochs: float = Field(3.0, gt=0, description="Passes over the training data, for each member.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps for each member, instead of `epochs`.")
    batch_size: int = Field(32, ge=1, description="Examples a step and process.")
    learning_rate: float = Field(
        2e-4, gt=0, le=1.0, description="Peak of AdamW's learning rate; small models take more: MiniLM 5e-4."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Mixed precision, also of a teacher; bf16 pays on CPUs with AMX or AVX-512 BF16, fp16 needs a GPU.",
    )
    report_to: str = Field("none", description="Logger of Trainer, e.g. `tensorboard`; by default nothing is logged.")
    save_steps: int = Field(200, ge=1, description="Steps between checkpoints; a killed run goes on from the last.")


class DenseConfig(TrainConfig):
    train: bool = Field(
        False, description="Fine-tune `model.path` for the task first, with a new head if it has none; needs labels."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps, instead of `epochs`.")


class RecoverConfig(TrainConfig):
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
    teacher_cache_gb: float = Field(
        2.0, ge=0, description="Teacher outputs are kept (fp16) and serve every epoch and member if they fit in this."
    )

    @model_validator(mode="after")
    def _some_loss(self) -> RecoverConfig:
        if self.task_weight + self.logit_weight + self.token_weight == 0:
            raise ValueError("one of task_weight, logit_weight and token_weight must be above 0")
        return self


class SparsityConfig(Frozen):
    sparsity: float = Field(0.8, gt=0, lt=1, description="Share of the weights of the layers' linears that is zeroed.")
    pattern: Literal["unstructured", "block4"] = Field(
        "unstructured",
        description="`block4`: four neighbouring inputs together, as INT8 kernels of DeepSparse like it.",
    )
    distribution: Literal["uniform", "sensitivity"] = Field(
        "uniform", description="Every linear equally sparse, or those less whose zeroing changes the answers more."
    )
    passes: int = Field(
        1, ge=1, le=64, description="Steps towards the sparsity; before each the Hessians are collected anew."
    )
    damping: float = Field(0.01, gt=0, le=1.0, description="Hessian damping, relative to its mean diagonal.")


class Int8Config(Frozen):
    method: Literal["dynamic", "static", "qat"] = Field(
        "dynamic",
        description="Activation scales at run time (ONNX Runtime only), from calibration, or trained with the weights.",
    )
    backend: Literal["onnxruntime", "neural-compressor"] = Field(
        "onnxruntime", description="Who quantises; `neural-compressor` tunes by itself and needs a set-up."
    )
    ranges: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="How calibrated activations become ranges (static)."
    )
    percentile: float = Field(99.99, gt=50, le=100, description="Of the activations inside the range (percentile).")
    n_calibration: int = Field(128, ge=1, description="Calibration examples for the ranges; memory does not grow.")
    per_channel: bool = Field(True, description="A weight scale for each output; DeepSparse takes one for each tensor.")
    reduce_range: bool | None = Field(
        None, description="7-bit weights, which do not saturate without VNNI; default: by the CPU's flags."
    )
    embeddings: bool = Field(
        True, description="Word embeddings in 8 bits, too: files of small models halve, and are up to 2 % slower."
    )
    max_loss: float = Field(
        0.01, ge=0, lt=1, description="Accuracy budget: largest loss of the metric, relative to the model before INT8."
    )
    max_fp32_share: float = Field(
        0.5, ge=0, le=1, description="At most this share of the linears stays float32 to hold `max_loss`."
    )


class CompressTrainConfig(TrainConfig):
    mode: Literal["none", "distil", "gradual"] = Field(
        "none",
        description="`distil`: train with zeros held, by the losses of `recover`; `gradual`: after each sparsity pass.",
    )


class CompressConfig(Frozen):
    variants: tuple[Literal["int8", "sparse", "sparse-int8"], ...] = Field(
        (), description="Further files of every member: `model_int8.onnx`, `model_sparse.onnx`, …"
    )
    target: Variant = Field(
        "fp32", description="The file that must reach `speedups`; the table is measured in its form."
    )
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig, description="Zeros in the weights.")
    int8: Int8Config = Field(default_factory=Int8Config, description="8-bit integers.")
    train: CompressTrainConfig = Field(default_factory=CompressTrainConfig, description="Training with zeros or INT8.")

    @model_validator(mode="after")
    def _target_is_made(self) -> CompressConfig:
        if self.target != "fp32" and self.target not in self.variants:
            raise ValueError(f"the target {self.target!r} must be one of compress.variants, found {self.variants}")
        return self

    @property
    def makes_int8(self) -> bool:
        return any(variant.endswith("int8") for variant in self.variants)

    @property
    def trains(self) -> bool:
        """Whether anything is trained with its zeros or its rounding."""
        return bool(self.variants) and self.train.mode != "none"

    @model_validator(mode="after")
    def _somebody_trains_the_scales(self) -> CompressConfig:
        if not self.makes_int8 or self.int8.method != "qat":
            return self
        if self.train.mode == "none":
            raise ValueError("int8.method qat trains the scales: set compress.train.mode: distil (and its max_steps)")
        if self.int8.backend != "onnxruntime":
            raise ValueError("int8.method qat needs int8.backend: onnxruntime; neural-compressor only calibrates here")
        return self

    @model_validator(mode="after")
    def _there_is_something_to_train(self) -> CompressConfig:
        if self.trains and set(self.variants) == {"int8"} and self.int8.method != "qat":
            raise ValueError(
                f"compress.train.mode {self.train.mode} trains zeros, or the scales of int8.method qat; variants "
                f"['int8'] with int8.method {self.int8.method} have neither: set train.mode: none or int8.method: qat"
            )
        return self


class ExportConfig(Frozen):
    shapes: Literal["dynamic", "static"] = Field(
        "dynamic", description="`dynamic` accepts any batch and length; `static` fixes those of the environment."
    )
    opset: int = Field(17, ge=14, le=20, description="ONNX opset; 17 is the first with LayerNormalization.")
    embed_in_graph: bool = Field(
        True, description="Sentence-similarity: add pooling and normalisation as output `sentence_embedding`."
    )


class BenchmarkConfig(Frozen):
    rounds: int = Field(60, ge=5, description="Interleaved rounds (A B C A B C …).")
    processes: int = Field(
        3,
        ge=1,
        description="Processes a file, one after the other: where one lies in memory shifts latency by 1 to 3 %.",
    )
    runs_per_round: int = Field(3, ge=1, description="Timed runs of a variant a round, after 10 ms of untimed ones.")
    max_seconds: float = Field(
        180.0, gt=0, description="Time limit of the rounds for ten files; more files get proportionally more."
    )
    tolerance: float = Field(0.02, ge=0, lt=0.5, description="A member may miss its target by this fraction.")
    overshoot: float = Field(0.10, gt=0, description="A member more than this above its target gets a looser budget.")
    baseline_engine: EngineName | None = Field(
        None, description="Engine of the dense baseline; default: that of `environment`, where the members serve."
    )
    max_corrections: int = Field(3, ge=0, description="How often the closed loop may solve again a target.")
    parity_atol: float = Field(1e-4, gt=0, description="Largest difference between torch and ONNX outputs at export.")


Speedup = Annotated[float, Field(gt=1.0, le=1000.0)]


class Recipe(Frozen):
    """A whole run. Load it with :func:`ziplm_deploy.recipes.load_recipe`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")
    output_dir: Path = Field(Path("runs"), description="The run's folder is made in here.")
    seed: int = Field(0, ge=0, description="Seed of sampling and search.")
    model: ModelConfig = Field(description="What to prune.")
    data: DataConfig = Field(default_factory=DataConfig, description="Calibration and evaluation data.")
    environment: Environment = Field(default_factory=Environment, description="Where it will serve.")
    speedups: tuple[Speedup, ...] = Field(min_length=1, description="Targets over the dense model, each > 1.")
    dense: DenseConfig = Field(default_factory=DenseConfig, description="Training of the dense model, if it is a base.")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="Latency table.")
    prune: PruneConfig = Field(default_factory=PruneConfig, description="OBS and search.")
    recover: RecoverConfig = Field(default_factory=RecoverConfig, description="Training after pruning.")
    export: ExportConfig = Field(default_factory=ExportConfig, description="ONNX files.")
    compress: CompressConfig = Field(default_factory=CompressConfig, description="Sparsity and INT8 on top.")
    benchmark: BenchmarkConfig = Field(default_factory=BenchmarkConfig, description="Measurement and closed loop.")

    @field_validator("speedups")
    @classmethod
    def _ascending(cls, speedups: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(speedups)))

    @model_validator(mode="after")
    def _engine_takes_the_export(self) -> Recipe:
        slow = self.export.shapes != "static" or self.export.opset > 16
        if slow and "deepsparse" in (self.environment.engine, self.baseline_engine):
            raise ValueError(
                "DeepSparse (environment.engine or benchmark.baseline_engine) runs dynamic axes and opsets above 16 in "
                "a slow fallback: set export.shapes: static and export.opset: 16, found "
                f"{self.export.shapes} and {self.export.opset}"
            )
        return self

    @model_validator(mode="after")
    def _engine_takes_the_integers(self) -> Recipe:
        engine, int8 = self.environment.engine, self.compress.int8
        if engine != "onnxruntime" and int8.method == "dynamic" and self.compress.makes_int8:
            raise ValueError(
                f"{engine} does not run dynamically quantised graphs well: set compress.int8.method: static or qat"
            )
        return self

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Files of every member: the exported one, then those made from it."""
        return ("fp32", *self.compress.variants)

    @property
    def baseline_engine(self) -> EngineName:
        """Engine of the dense model that speedups are over."""
        return self.benchmark.baseline_engine or self.environment.engine

    @property
    def finishes_after_pruning(self) -> bool:
        """Whether members change after the closed loop has measured them, by training or compression."""
        return self.recover.mode != "none" or bool(self.compress.variants)

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name
