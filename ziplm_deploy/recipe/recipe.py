"""A recipe as a whole: its sections, and the rules that span several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.benchmark import BenchmarkConfig
from ziplm_deploy.recipe.compression import CompressConfig
from ziplm_deploy.recipe.data import DataConfig
from ziplm_deploy.recipe.export import ExportConfig
from ziplm_deploy.recipe.latency import ProfileConfig
from ziplm_deploy.recipe.model import ModelConfig
from ziplm_deploy.recipe.pruning import PruneConfig
from ziplm_deploy.recipe.recovery import WINDOWS_A_STEP, DenseConfig, RecoverConfig
from ziplm_deploy.recipe.variants import Variant, member_name
from ziplm_deploy.recipe.workload import EngineName, Environment

Speedup = Annotated[float, Field(gt=1.0, le=1000.0)]


class Recipe(Frozen):
    """A whole run. Load it with :func:`ziplm_deploy.recipe.loading.load_recipe`."""

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

    @field_validator("speedups")
    @classmethod
    def _of_different_names(cls, speedups: tuple[float, ...]) -> tuple[float, ...]:
        names = [member_name(target) for target in speedups]
        shared = sorted({name for name in names if names.count(name) > 1})
        if shared:
            raise ValueError(
                f"expected targets whose names differ, found several that are called {', '.join(shared)}; six digits "
                "make a name: leave one of them out"
            )
        return speedups

    @model_validator(mode="after")
    def _steps_take_few_windows(self) -> Recipe:
        """A step of 32 windows of text has gigabytes of logits: fewer, unless the recipe names a number."""
        if self.model.task == "text-generation" and "batch_size" not in self.recover.model_fields_set:
            self.__dict__["recover"] = self.recover.model_copy(update={"batch_size": WINDOWS_A_STEP})
        return self

    @model_validator(mode="after")
    def _engine_takes_the_export(self) -> Recipe:
        slow = self.export.shapes != "static" or self.export.opset > 16
        is_causal = self.model.task == "text-generation"  # DeepSparse runs none, and says so when the run begins
        if slow and not is_causal and "deepsparse" in (self.environment.engine, self.baseline_engine):
            raise ValueError(
                "DeepSparse (environment.engine or benchmark.baseline_engine) runs dynamic axes and opsets above 16 in "
                "a slow fallback: set export.shapes: static and export.opset: 16, found "
                f"{self.export.shapes} and {self.export.opset}"
            )
        return self

    @model_validator(mode="after")
    def _llama_cpp_runs_gguf(self) -> Recipe:
        if (self.baseline_engine == "llamacpp") != self.environment.runs_gguf:
            raise ValueError(
                "expected llamacpp as environment.engine and as benchmark.baseline_engine, or as neither, found "
                f"{self.environment.engine} and {self.baseline_engine}: it runs GGUF files, and the others ONNX files; "
                "leave benchmark.baseline_engine out"
            )
        if not self.environment.runs_gguf and "llamacpp" not in self.benchmark.engines:
            return self
        asked = "environment.engine: llamacpp" if self.environment.runs_gguf else "benchmark.engines: [llamacpp]"
        if self.export.gguf is None:
            raise ValueError(
                f"expected export.gguf for {asked}, found none: llama.cpp runs GGUF files only; say which (Q8_0, Q4_0, "
                "F16), or leave the engine out"
            )
        if self.environment.workload.batch_size != 1:
            raise ValueError(
                f"expected environment.workload.batch_size: 1 for {asked}, found "
                f"{self.environment.workload.batch_size}: its calls are timed one request at a time; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _llama_cpp_has_no_onnx_files(self) -> Recipe:
        if not self.environment.runs_gguf:
            return self
        if self.model.task != "text-generation":
            raise ValueError(
                f"expected model.task text-generation for environment.engine: llamacpp, found {self.model.task}: the "
                "GGUF files that are written here are those of causal language models; choose another engine"
            )
        of_onnx = {
            "compress.variants": self.compress.variants,
            "export.genai": self.export.genai,
            "export.stock_optimum": self.export.stock_optimum,
            "export.cache_form": self.export.cache_form,
            "export.shapes: static": self.export.shapes == "static",
            "benchmark.engines": self.benchmark.engines,
        }
        found = [name for name, asked in of_onnx.items() if asked]
        if found:
            raise ValueError(
                f"expected nothing about ONNX files for environment.engine: llamacpp, found {', '.join(found)}: its "
                "members are GGUF files with the weights that export.gguf names; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _workload_is_of_the_task(self) -> Recipe:
        generates = self.model.task == "text-generation"
        if generates == self.environment.workload.generates:
            return self
        if generates:
            raise ValueError(
                "expected environment.workload {prefill: tokens, decode: tokens} for text-generation, found none; say "
                "how long prompts and answers are"
            )
        raise ValueError(
            f"expected environment.workload.seq_len or lengths for {self.model.task}, found prefill and decode, which "
            "only text-generation has"
        )

    @model_validator(mode="after")
    def _shapes_take_the_lengths(self) -> Recipe:
        workload = self.environment.workload
        if workload.lengths is None:
            return self
        if self.model.task.startswith("image-"):
            raise ValueError("images have no lengths: leave out environment.workload.lengths")
        if self.export.shapes == "static" and (isinstance(workload.lengths, Path) or workload.has_several):
            raise ValueError(
                "files with static shapes fill every request up to one length, so that all take the same time: set "
                "export.shapes: dynamic, or environment.workload.seq_len instead of lengths"
            )
        return self

    @model_validator(mode="after")
    def _search_is_of_embeddings(self) -> Recipe:
        if self.data.retrieval is not None and not self.model.makes_embeddings:
            raise ValueError(
                "expected model.task image-feature-extraction or sentence-similarity for data.retrieval, which is "
                f"searched by embeddings, found {self.model.task}; leave the field out"
            )
        if self.data.passage_length is not None and (self.data.retrieval is None or self.export.shapes == "static"):
            raise ValueError(
                "expected data.retrieval and export.shapes: dynamic beside data.passage_length, found "
                f"{self.data.retrieval} and {self.export.shapes}; leave data.passage_length out"
            )
        return self

    @model_validator(mode="after")
    def _sampled_text_is_of_use(self) -> Recipe:
        if self.data.generated is None:
            return self
        if self.model.task != "text-generation":
            raise ValueError(
                f"expected model.task text-generation for data.generated, found {self.model.task}, whose models write "
                "no text: give some in data.calibration; recover needs no labels in it"
            )
        if self.data.calibration is not None and self.recover.mode == "none":
            raise ValueError(
                "expected training for data.generated beside data.calibration, found recover.mode: none, so that "
                "nothing would read the sampled text: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _adapters_leave_zeros_and_integers_alone(self) -> Recipe:
        if self.recover.lora is not None and self.compress.trains:
            raise ValueError(
                f"expected compress.train.mode: none with recover.lora, found {self.compress.train.mode}: adapters "
                "would fill the zeros of weights, and INT8's scales are trained with all weights, which takes the "
                "memory that adapters are there to spare; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _engine_takes_the_integers(self) -> Recipe:
        engine, int8 = self.environment.engine, self.compress.int8
        if engine != "onnxruntime" and int8.method == "dynamic" and self.compress.makes_int8:
            raise ValueError(
                f"{engine} does not run dynamically quantized graphs well: set compress.int8.method: static or qat"
            )
        return self

    @property
    def exported(self) -> Variant:
        """What every member is exported as: what its engine runs."""
        return Variant.GGUF if self.environment.runs_gguf else Variant.FP32

    @property
    def target(self) -> Variant:
        """The variant that must reach ``speedups``, in whose form the table is measured."""
        return self.exported if self.compress.target is Variant.FP32 else self.compress.target

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Files of every member: the exported one, then those made from it."""
        return (self.exported, *self.compress.variants)

    @property
    def baseline_engine(self) -> EngineName:
        """Engine of the dense model that speedups are over."""
        return self.benchmark.baseline_engine or self.environment.engine

    @property
    def parity_atol(self) -> float:
        """Largest difference that an exported file may have to torch."""
        return self.benchmark.parity_atol or (1e-3 if self.model.task == "text-generation" else 1e-4)

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name
