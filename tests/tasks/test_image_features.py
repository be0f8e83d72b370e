"""Image embeddings judged by their neighbours: what is read, what is scored, and data that nothing is found in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import evaluation_set
from tests.helpers.image_data import image_rows
from tests.helpers.models import tiny_model
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function
from ziplm_deploy.tasks.base import Which
from ziplm_deploy.tasks.image_features import ImageFeatureExtraction
from ziplm_deploy.tasks.images import _decode

pytestmark = pytest.mark.transformers


def task(**changes: Any) -> ImageFeatureExtraction:
    found = get_task(ModelConfig.model_validate({"path": "", "task": "image-feature-extraction", **changes}))
    assert isinstance(found, ImageFeatureExtraction)
    return found


def rows_of(folder: Path, raw: list[dict[str, Any]], which: Which = "evaluation") -> list[dict[str, Any]]:
    data = DataConfig.model_validate({which: str(folder / "rows.jsonl")})
    return task().normalize_rows(raw, data, which)


def numbered(embeddings: np.ndarray) -> tuple[Any, Any]:
    """A processor that gives an image its number, and a function that answers these numbers with their embeddings."""

    def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.tensor([[float(image.getpixel((0, 0))[0])] for image in images])}

    return processor, lambda inputs: {"image_embeds": embeddings[inputs["pixel_values"][:, 0].astype(int)]}


def by_hand(embeddings: np.ndarray, labels: list[str]) -> tuple[list[float], list[float]]:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    gains, firsts = [], []
    for query, label in enumerate(labels):
        others = [number for number in range(len(labels)) if number != query]
        if label not in [labels[number] for number in others]:
            continue
        ranked = sorted(others, key=lambda number: -float(unit[query] @ unit[number]))
        hits = [labels[number] == label for number in ranked[:10]]
        best = sum(1 / np.log2(rank + 2) for rank in range(min(10, sum(labels[n] == label for n in others))))
        gains.append(sum(hit / np.log2(rank + 2) for rank, hit in enumerate(hits)) / best)
        firsts.append(float(hits[0]))
    return gains, firsts


@pytest.mark.parametrize("pad_to", [None, 1])
def test_each_image_looks_for_others_of_its_class(pad_to: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    monkeypatch.setattr("ziplm_deploy.tasks.image_features.QUERIES_AT_ONCE", 4)
    embeddings = np.random.default_rng(0).normal(size=(15, 6)).astype(np.float32)
    labels = [*("abcab" * 2), *"aabbd"]
    rows = [
        {"image": image_module.new("RGB", (2, 2), (number, 0, 0)), "label": label}
        for number, label in enumerate(labels)
    ]
    processor, function = numbered(embeddings)
    outcomes = task().outcomes(function, EvaluationSet(rows, processor, 0, 4, pad_to))
    gains, firsts = by_hand(embeddings, labels)
    assert len(outcomes) == 14, "one is alone in its class"
    np.testing.assert_allclose(outcomes["ndcg_at_10"], gains)
    np.testing.assert_allclose(outcomes["recall_at_1"], firsts)
    assert task().scores(outcomes) == pytest.approx({"ndcg_at_10": np.mean(gains), "recall_at_1": np.mean(firsts)})
    assert "1 of 15 evaluation images are the only ones of their class" in str(task().label_note(rows, None))
    alike = lambda inputs: {"image_embeds": np.ones((len(inputs["pixel_values"]), 6))}  # noqa: E731
    collapsed = task().outcomes(alike, EvaluationSet(rows, processor, 0))
    assert collapsed["recall_at_1"].sum() == 0


def test_a_model_is_as_near_to_itself_as_can_be(tmp_path: Path) -> None:
    import transformers

    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    rows = rows_of(tmp_path, image_rows(tmp_path, 13))
    data = evaluation_set(rows, processor)
    own, other = (torch_function(task(), tiny_model("vit", "sentence-similarity", seed=seed)) for seed in (0, 1))
    assert task().fidelity(own, own, data, data) == pytest.approx({"mean_cosine": 1.0, "neighbour_overlap": 1.0})
    assert task().fidelity(other, own, data, data)["mean_cosine"] < 0.99
    assert task().fidelity(other, own, data.with_rows(rows[:10]), data) == {}


def test_calibration_needs_no_labels(tmp_path: Path) -> None:
    raw = [{"image": row["image"]} for row in image_rows(tmp_path, 4)]
    assert [set(row) for row in rows_of(tmp_path, raw, "calibration")] == [{"image"}] * 4
    with pytest.raises(DataError, match="expected the label in column"):
        rows_of(tmp_path, raw)


def test_data_that_nothing_is_found_in_are_refused(tmp_path: Path) -> None:
    raw = [{**row, "label": number} for number, row in enumerate(image_rows(tmp_path, 3))]
    with pytest.raises(DataError, match=r"two images of one class .* found 3 images of as many classes"):
        rows_of(tmp_path, raw)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"expected an image in .*text\.png, found: cannot identify"):
        rows_of(tmp_path, [{"image": "text.png"}], "calibration")
    with pytest.raises(DataError, match="task with a head to fine-tune, found image-feature-extraction"):
        task().head_settings([])
    with pytest.raises(DataError, match="learns from the teacher only"):
        task().task_loss({}, {})


def test_an_image_that_differs_in_its_last_byte_is_another(tmp_path: Path) -> None:
    """Uncompressed ones are all of one size, and may begin alike."""
    (tmp_path / "rows.jsonl").write_text('{"image": "a.bmp", "label": 0}\n', encoding="utf-8")
    hashes = set()
    for last in (b"0", b"1"):
        (tmp_path / "a.bmp").write_bytes(b"BM" + bytes(200_000) + last)
        hashes.add(task().linked_files_hash(str(tmp_path / "rows.jsonl"), DataConfig()))
    assert len(hashes) == 2


def test_photos_stand_upright_whatever_they_come_from() -> None:
    from PIL import Image

    photo, exif, stored = Image.new("RGB", (20, 10)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(stored, "JPEG", exif=exif)
    assert _decode(stored.getvalue()).size == (10, 20)
    assert _decode(Image.open(stored)).size == (10, 20)
    assert _decode(photo).size == (20, 10)
