"""Images: reading them from files and tables, and classes of them, judged by accuracy."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks.base import Task, Which, class_logits
from ziplm_deploy.tasks.batching import Arrays, Batch, batch_indices, with_labels
from ziplm_deploy.tasks.classification import (
    CLASS_METRICS,
    FURTHER_CLASS_METRICS,
    check_classes,
    class_label_scores,
    class_outcomes,
    right_and_wrong_class,
)
from ziplm_deploy.tasks.data import Row, cell, read_rows
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.label_reading import LabelReading, read_labels
from ziplm_deploy.tasks.labels import class_head, class_numbers, labels_in, labels_of, require_labels
from ziplm_deploy.tasks.outcomes import Outcomes

IMAGE_COLUMNS = ("image", "img", "image_path", "file_name")  # usual names, paths relative to the data file


class ImageTask(Task):
    """One answer an image. Rows: ``{"image": file path, bytes or PIL image, "label" (if the data have one)}``.

    Images are decoded batch by batch.
    """

    input_kind = "image"
    reading_version = 2  # 1 left photos as the camera stored them
    text_columns = tuple((name,) for name in IMAGE_COLUMNS)
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels")

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        (column, *more) = self.columns(raw, data)
        if more:
            raise DataError(f"expected one image column, found data.text_columns {data.text_columns}; name one")
        folder = Path(self.source(data, which)[0] or ".").parent
        label = self.find_label_column(raw, data, which)
        rows: list[Row] = []
        for number, item in enumerate(raw, 1):
            row: Row = {"image": locate(cell(item, column, object, number, "an image"), folder, number)}
            if label is not None:
                row["label"] = cell(item, label, (int, float, str), number, "a label")
            rows.append(row)
        return rows

    def linked_files_hash(self, source: str, data: DataConfig) -> str:
        """Hash over name and content of every image that a data file names."""
        return linked_images_hash(source, lambda raw: self.columns(raw, data)[0])

    def inputs(self, rows: list[Row]) -> list[Any]:
        return [identity(row["image"]) for row in rows]

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        """``pixel_values`` [batch, channels, height, width]; lengths and ``sort`` mean nothing here."""
        return [
            {"pixel_values": _pixels([data.rows[index] for index in group], data.processor)} for group in _groups(data)
        ]

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """``pixel_values`` [1, channels, height, width]; all images are decoded into memory."""
        return [{"pixel_values": _pixels([row], processor)} for row in rows]


class ImageClassification(ImageTask):
    """Classes of images; labels are class numbers or names."""

    name = "image-classification"
    metric_name = "accuracy"
    metrics = CLASS_METRICS
    further_metrics = FURTHER_CLASS_METRICS
    auto_class = "AutoModelForImageClassification"
    ort_class = "ORTModelForImageClassification"
    output_names = ("logits",)
    has_classes = True

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        return check_classes(rows, config, self.metric_name)

    def label_reading(self, rows: list[Row], config: Any) -> LabelReading:
        return read_labels(labels_in(rows), config)

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        return class_head(require_labels(rows))

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """``pixel_values`` and ``labels`` [1]; all images are decoded into memory."""
        labels = None if labels_of(rows) is None else class_numbers(rows)
        examples = super().examples(rows, processor, max_length)
        return examples if labels is None else with_labels(examples, labels)

    def label_scores(self, outcomes: Outcomes, config: Any) -> dict[str, float]:
        return class_label_scores(outcomes, config)

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return right_and_wrong_class(outcomes, self.metric_name)

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        return class_outcomes(class_logits(function, image_batches(data), len(data.rows)), data.rows)

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        return outputs["logits"]


def linked_images_hash(source: str, column_of: Callable[[list[Row]], str]) -> str:
    """Hash over name and content of every image that a data file names; empty where rows hold all themselves.

    ``column_of``: finds the column with the images.
    """
    path = Path(source)
    if not os.path.isfile(path):
        return ""
    try:
        raw = read_rows(source, split="train")
        column = column_of(raw)
    except DataError:  # refused with its reason when the rows are loaded
        return ""
    named = [name for name in (_held(row.get(column)) for row in raw) if isinstance(name, str)]
    if not named:
        return ""
    digest = hashlib.sha256()
    for name in dict.fromkeys(named):
        digest.update(f"{name}\n".encode())
        with contextlib.suppress(OSError):
            digest.update(file_hash(path.parent / name).encode())
    return digest.hexdigest()


def _groups(data: EvaluationSet) -> list[list[int]]:
    """Positions of the rows of every batch, in their order: images are all of one size."""
    return batch_indices([1] * len(data.rows), data.batch_size, sort=False)


def image_batches(data: EvaluationSet) -> Iterator[tuple[list[int], Arrays]]:
    """Batches in the rows' order, filled up where all have one shape: (indices of the rows, numpy inputs)."""
    for group in _groups(data):
        members = data.fill_up([data.rows[index] for index in group])
        yield group, {"pixel_values": _pixels(members, data.processor).numpy()}


def locate(value: Any, folder: Path, number: int) -> Any:
    """Bytes, an existing path or a PIL image, from what data files and `datasets` hold."""
    value = _held(value)
    if isinstance(value, str):
        path = folder / value
        if not os.path.isfile(path):
            raise DataError(f"expected an image file at {path} (row {number}), found none; check the path")
        with _opened(path):  # its header alone, so that what is no image is named before any work
            return path
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return value
    raise DataError(
        f"expected an image path, bytes or image in row {number}, found {type(value).__name__}; see: "
        "ziplm-deploy guide recipe"
    )


def _held(value: Any) -> Any:
    """What a cell of `datasets` holds of an image: its bytes, or else its path."""
    return value.get("bytes") or value.get("path") if isinstance(value, dict) else value


def identity(image: Any) -> str | bytes:
    """Something that two rows share if they hold the same image."""
    if isinstance(image, Path):
        return str(image.resolve())
    return hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).digest()


def _pixels(rows: list[Row], processor: Any) -> Tensor:
    images = [_decode(row["image"]) for row in rows]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(pixels, dtype=torch.float32)


def _decode(value: Any) -> Any:
    if hasattr(value, "convert"):
        return _upright(value)
    with _opened(value) as image:
        return _upright(image)


def _upright(image: Any) -> Any:
    """An image of pillow in RGB, turned as the camera was held."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


@contextlib.contextmanager
def _opened(value: bytes | Path) -> Iterator[Any]:
    """An image of pillow, decoded when it is used; raises :class:`DataError` for what is none."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            'expected the package pillow for image data, found none; run: pip install "ziplm-deploy[image]"'
        ) from error
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            yield image
    except OSError as error:
        what = "bytes" if isinstance(value, bytes) else value
        raise DataError(f"expected an image in {what}, found: {error}; replace or remove it") from error
