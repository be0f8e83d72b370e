"""The section ``data``: examples for calibration, training and evaluation."""

from __future__ import annotations

from pydantic import Field

from ziplm_deploy.recipe.base import Frozen


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
        None, description="Columns with query and passage, or caption and image; default: found from the usual names."
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
        "share are scored in the first of them only. Default: `context`.",
    )
    n_calibration: int = Field(
        512, ge=8, description="Calibration examples for the Hessians; accuracy saturates near 512 (see one_shot)."
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
    n_train: int | None = Field(None, ge=1, description="Training examples; default: all of them.")
