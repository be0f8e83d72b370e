"""The section ``data``: examples for calibration, training and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ziplm_deploy.recipe.base import Frozen

CALIBRATION_EXAMPLES, FEWEST_EXAMPLES = 512, 8


class GeneratedConfig(Frozen):
    """Text that the dense model writes itself, where there is none to calibrate or train on (LLM-QAT, section 2.1)."""

    n_windows: int = Field(512, ge=1, description="Windows of `data.context` tokens that the sampled texts fill.")
    first_token: Literal["vocabulary", "model"] = Field(
        "vocabulary",
        description="Every text begins with a token drawn from the whole vocabulary, special ones left out, so that "
        "texts differ; `model`: with one drawn as the model begins texts.",
    )
    greedy_tokens: int = Field(
        4, ge=0, description="Tokens after the first that are the likeliest, so that a subject is found; as published."
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Of the draws of all others; 1: as the model has them.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that have this probability.")
    batch_size: int = Field(32, ge=1, description="Texts sampled at once; a killed run goes on after the last batch.")


class DataConfig(Frozen):
    """Where examples come from, and how many of them are taken."""

    calibration: str | None = Field(
        None, description="Data for Hessians and search: CSV/JSONL/Parquet file (`.gz` allowed) or a `datasets` name."
    )
    evaluation: str | None = Field(
        None, description="Labelled data for the metric of the ONNX files; without it accuracy is not reported."
    )
    train: str | None = Field(
        None, description="Training data of `recover` and `dense`; may be unlabelled text. Default: `calibration`."
    )
    generated: GeneratedConfig | None = Field(
        None,
        exclude_if=lambda generated: generated is None,
        description="`{n_windows: 512}`: text sampled from the dense model (text-generation) stands for `calibration` "
        "and `train`, each where it is not given.",
    )
    retrieval: str | None = Field(
        None,
        description="Queries with passages that answer them, one pair a row (sentence-similarity), or captions with "
        "images (towers of CLIP and SigLIP): embeddings are judged by search among all of these, too.",
    )
    calibration_split: str = Field("train", description="Split, when `calibration` is a `datasets` name.")
    train_split: str = Field("train", description="Split, when `train` is a `datasets` name.")
    evaluation_split: str = Field("validation", description="Split, when `evaluation` is a `datasets` name.")
    retrieval_split: str = Field("test", description="Split, when `retrieval` is a `datasets` name.")
    config_name: str | None = Field(None, description="Configuration of a `datasets` name, e.g. `sst2` of `glue`.")
    revision: str | None = Field(
        None,
        description="Hub revision of the `datasets` names; without it a set that has changed there is not noticed.",
    )
    text_columns: tuple[str, ...] | None = Field(
        None, description="Columns with the text (or image); default: found from the task's usual names."
    )
    label_column: str | None = Field(None, description="Column with the label; default: the task's usual name.")
    retrieval_columns: tuple[str, ...] | None = Field(
        None,
        description="Columns with query and passage, or caption and image, and perhaps their relevance; default: found "
        "from the usual names.",
    )
    context: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="Tokens of a window of text (text-generation), of which each is an example; default: 512, or what "
        "the model takes.",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens from one window to the next of the evaluation data (text-generation); tokens that windows "
        "share are scored in the first of them only. At most, and by default: `context`.",
    )
    n_calibration: int | None = Field(
        None,
        ge=FEWEST_EXAMPLES,
        description=f"Calibration examples for the Hessians; default: {CALIBRATION_EXAMPLES}, near which accuracy "
        "saturates (see one_shot), or all where there are fewer.",
    )
    n_evaluation: int | None = Field(
        None, ge=1, description="Evaluation examples (reranking: queries with all their passages); default: all."
    )
    n_retrieval: int | None = Field(
        None,
        ge=1,
        description="Queries of `retrieval`, or images with their captions, searched for among all that it holds; "
        "default: all of them.",
    )
    passage_length: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda length: length is None,
        description="Tokens that passages of `retrieval` are cut at, for models that serve short queries against an "
        "index of long passages; default: the workload's `seq_len`, as for queries.",
    )
    n_train: int | None = Field(None, ge=1, description="Training examples; default: all of them.")

    def n_examples(self, which: Literal["calibration", "evaluation", "train"], found: int) -> int | None:
        """Examples to draw of a data set that has ``found``; None: all of them."""
        if which == "calibration" and self.n_calibration is None:
            return max(FEWEST_EXAMPLES, min(CALIBRATION_EXAMPLES, found))
        return {"calibration": self.n_calibration, "evaluation": self.n_evaluation, "train": self.n_train}[which]

    def is_generated(self, which: str) -> bool:
        """Whether text sampled from the dense model stands for this data set; never for ``evaluation``."""
        own = {"calibration": self.calibration, "train": self.train}
        return self.generated is not None and which in own and own[which] is None

    @model_validator(mode="after")
    def _sampled_text_is_enough(self) -> DataConfig:
        if self.generated is None:
            return self
        if self.calibration is not None and self.train is not None:
            raise ValueError(
                "generated stands for calibration and train where they are not given, found both of them: leave one out"
            )
        for which, asked in (("calibration", self.n_calibration or FEWEST_EXAMPLES), ("train", self.n_train)):
            if self.is_generated(which) and (asked or 0) > self.generated.n_windows:
                raise ValueError(
                    f"expected n_{which} up to the {self.generated.n_windows} windows of generated.n_windows, found "
                    f"{asked}; change one of them"
                )
        return self
