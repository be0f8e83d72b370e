"""The section ``compress``: zeros in the weights and 8-bit integers, on top of pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.recovery import TrainConfig
from ziplm_deploy.recipe.variants import Variant


def _not_as_exported(variant: Variant) -> Variant:
    if variant.is_exported:
        raise ValueError(f"every member has its file as exported anyway: leave {variant} out")
    return variant


MadeVariant = Annotated[Variant, AfterValidator(_not_as_exported)]


class SparsityConfig(Frozen):
    """How many weights become zero, in which pattern, and how they are chosen."""

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
    """How weights and activations become 8-bit integers, and the accuracy that this may cost."""

    method: Literal["dynamic", "static", "qat"] = Field(
        "dynamic",
        description="Activation scales at run time (ONNX Runtime only), from calibration, or trained with the weights.",
    )
    backend: Literal["onnxruntime", "neural-compressor"] = Field(
        "onnxruntime", description="Who quantizes; `neural-compressor` tunes by itself and needs a set-up."
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
    fallback: Literal["float32", "weight-only-8"] | None = Field(
        None,
        exclude_if=lambda form: form is None,
        description="Text-generation: what linears are that INT8 hurts too much, up to `max_fp32_share`. "
        "`weight-only-8` reads a quarter of the bytes in each decode step, but is slower in prefill. Default: that one "
        "where requests decode and ONNX Runtime has it, else float32.",
    )
    weight_only_4: tuple[str, ...] = Field(
        (),
        exclude_if=lambda patterns: not patterns,
        description="Text-generation: linears with 4-bit weights in place of INT8, by their names in the file or by "
        "patterns such as `*.feed_forward.up`; those that hurt most still get what `fallback` says.",
    )

    smooth: bool = Field(
        True,
        exclude_if=lambda asked: asked,
        description="Text-generation: divide massive columns of linears' inputs and multiply their weights "
        "(SmoothQuant), as strongly as changes answers least, if that helps at all. It costs nothing when served.",
    )
    mixed: bool = Field(
        False,
        exclude_if=lambda asked: not asked,
        description="Text-generation: every linear gets the form, of INT8, weight-only 8 and 4 bits and float32, that "
        "loses least for the milliseconds it takes here; the fastest such file that `max_loss` allows.",
    )

    @model_validator(mode="after")
    def _mixture_chooses_alone(self) -> Int8Config:
        if self.mixed and (self.weight_only_4 or self.fallback is not None):
            raise ValueError(
                f"expected int8.mixed alone, found {'weight_only_4' if self.weight_only_4 else 'fallback'} beside it: "
                "it chooses the form of every linear; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _weight_only_is_dynamic(self) -> Int8Config:
        asked = "mixed" if self.mixed else "weight_only_4" if self.weight_only_4 else "fallback weight-only-8"
        if (self.mixed or self.weight_only_4 or self.fallback == "weight-only-8") and not self.has_weight_only_forms:
            raise ValueError(
                f"int8.{asked} needs method: dynamic and backend: onnxruntime, found {self.method} and {self.backend}"
            )
        return self

    @property
    def has_weight_only_forms(self) -> bool:
        """Whether linears can have weight-only forms beside INT8."""
        return self.method == "dynamic" and self.backend == "onnxruntime"


class CompressTrainConfig(TrainConfig):
    """Training with zeros held or with INT8's rounding."""

    mode: Literal["none", "distil", "gradual"] = Field(
        "none",
        description="`distil`: train with zeros held, by the losses of `recover`; `gradual`: after each sparsity pass.",
    )


class CompressConfig(Frozen):
    """Which further files every member gets, and how they are made."""

    variants: tuple[MadeVariant, ...] = Field(
        (), description="Further files of every member: `model_int8.onnx`, `model_sparse.onnx`, …"
    )
    target: Variant = Field(
        Variant.FP32,
        description="The file that must reach `speedups`; the table is measured in its form. `fp32`: as exported, in "
        "llama.cpp with the weights of `export.gguf`.",
    )
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig, description="Zeros in the weights.")
    int8: Int8Config = Field(default_factory=Int8Config, description="8-bit integers.")
    train: CompressTrainConfig = Field(default_factory=CompressTrainConfig, description="Training with zeros or INT8.")

    @model_validator(mode="after")
    def _target_is_made(self) -> CompressConfig:
        if self.target is not Variant.FP32 and self.target not in self.variants:
            found = [str(variant) for variant in self.variants]
            raise ValueError(f"the target '{self.target}' must be one of compress.variants, found {found}")
        if self.makes_int8 and self.int8.method == "dynamic" and self.int8.ranges != "minmax":
            raise ValueError(
                f"expected int8.method: static for int8.ranges: {self.int8.ranges}, found dynamic, which finds the "
                "ranges of activations anew in every call; change one of them"
            )
        if self.int8.mixed and self.target.is_int8:
            raise ValueError(
                f"expected another compress.target with int8.mixed, found {self.target}: cells of the latency table "
                "have one form, and which linears get which is known at the end only; leave the target out"
            )
        return self

    @property
    def makes_int8(self) -> bool:
        return any(variant.is_int8 for variant in self.variants)

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
        if self.trains and set(self.variants) == {Variant.INT8} and self.int8.method != "qat":
            raise ValueError(
                f"compress.train.mode {self.train.mode} trains zeros, or the scales of int8.method qat; variants "
                f"['int8'] with int8.method {self.int8.method} have neither: set train.mode: none or int8.method: qat"
            )
        return self
