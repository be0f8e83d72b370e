"""Whole runs of embedding models of images, and of both towers of one checkpoint; their members within one budget."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.image_data import write_image_rows
from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, written_again
from tests.helpers.search_data import write_lines
from tests.helpers.towers import TOWER_TYPES, save_whole, tower
from ziplm_deploy import pair_towers
from ziplm_deploy.errors import DataError, RecipeError, UnsupportedModelError
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_data, check_lengths

pytestmark = pytest.mark.transformers

# Five tokens of 32 numbers take as long as the rest of a file: layers must weigh enough for a target of 1.5x.
LARGE = {"hidden_size": 128, "intermediate_size": 512}


def recipe(folder: Path, name: str = "tiny", **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": name,
        "model": {"task": "image-feature-extraction"},
        "data": {
            "calibration": str(folder / "train.jsonl"),
            "evaluation": str(folder / "test.jsonl"),
            "n_calibration": 24,
        },
    }
    for section, values in changes.items():
        fields[section] = {**fields.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(raw_recipe(folder, **fields))


def write_data(folder: Path) -> None:
    write_image_rows(folder / "train.jsonl", 24, columns=("image",))
    write_image_rows(folder / "test.jsonl", 15, seed=1)
    write_image_rows(folder / "pairs.jsonl", 20, seed=2, columns=("caption", "image"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_whole(folder / "model", **LARGE)
    write_data(folder)
    sentences = [f"the cat sat on mat {number} a dog ran" for number in range(9)]
    parts = itertools.product(("the", "a"), ("cat", "dog", "mat", "tree"), ("sat", "ran", "on", "under", "."))
    write_lines(folder / "words.jsonl", [{"text": text} for text in (*sentences, *map(" ".join, parts))])
    return folder


@pytest.fixture(scope="module")
def images(folder: Path) -> FamilyReport:
    return run_pipeline(image_recipe(folder))


@pytest.fixture(scope="module")
def texts(folder: Path) -> FamilyReport:
    data = {"calibration": str(folder / "words.jsonl"), "n_calibration": 24, "evaluation": None}
    found = {"retrieval": str(folder / "pairs.jsonl")}
    model = {"task": "sentence-similarity"}
    return run_pipeline(recipe(folder, "texts", model=model, data=data | found))


def image_recipe(folder: Path, **data: Any) -> Recipe:
    return recipe(
        folder,
        data={"retrieval": str(folder / "pairs.jsonl"), **data},
        compress={"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}},
        recover={"mode": "one-shot", "max_steps": 3, "batch_size": 8},
    )


@pytest.mark.slow
def test_a_tower_of_images_is_pruned_trained_compressed_and_judged(images: FamilyReport, folder: Path) -> None:
    dense, member = images.members
    assert set(dense.served.accuracy) == {"ndcg_at_10", "recall_at_1"}
    assert set(member.served.accuracy) == {"ndcg_at_10", "recall_at_1", "mean_cosine", "neighbour_overlap"}
    assert {file.variant.value for file in member.files} == {"fp32", "int8"}
    assert all(0.5 < file.accuracy["mean_cosine"] <= 1 for file in member.files)
    place = folder / "runs" / "tiny" / "1.5x"
    assert type(load(place)).__name__ == "CLIPVisionModel"
    card = (place / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert "ORTModelForCustomTasks" in card


@pytest.mark.slow
def test_captions_search_images_and_images_captions(images: FamilyReport, folder: Path) -> None:
    found = images.retrieval
    assert found is not None
    assert (found.n_queries, set(found.files)) == (20, {"dense", "1.5x", "dense int8", "1.5x int8"})
    member = found.files["1.5x"]
    for metric in ("text_to_image_ndcg_at_10", "image_to_text_recall_at_1"):
        low, high = member.intervals[metric]
        assert 0 <= low <= member.scores[metric] <= high <= 1
        assert member.of_dense[metric].n_examples == 20
    for page in (folder / "runs" / "tiny" / "report.md", folder / "runs" / "tiny" / "1.5x" / "README.md"):
        text = page.read_text()
        assert "Recall@10" in text
        assert f"| 1.5x | caption to image | {member.scores['text_to_image_ndcg_at_10']:.4f} [" in text
    assert not [name for name in written_again(folder, image_recipe(folder)) if "retrieval" in name]


@pytest.mark.slow
def test_the_other_side_is_that_of_the_dense_other_tower(
    images: FamilyReport, texts: FamilyReport, folder: Path
) -> None:
    own, other = (load_file(folder / "runs" / name / "retrieval" / "dense.safetensors") for name in ("tiny", "texts"))
    for name in ("texts", "images"):  # each by a file in one run, by torch in the other
        np.testing.assert_allclose(own[name], other[name], atol=1e-4)
    assert images.retrieval is not None
    assert texts.retrieval is not None
    scores = [report.retrieval.files["dense"].scores for report in (images, texts)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05), "equal but for ties"


@pytest.mark.slow
def test_two_runs_are_combined_within_one_budget(images: FamilyReport, texts: FamilyReport, folder: Path) -> None:
    runs = folder / "runs" / "texts", folder / "runs" / "tiny"
    found = pair_towers(*runs, budget_ms=1e6, text_calls=2)
    assert len(found.pairs) == len(texts.retrieval.files) * len(images.retrieval.files)  # type: ignore[union-attr]
    dense = next(pair for pair in found.pairs if (pair.text, pair.image) == ("dense", "dense"))
    expected = 2 * texts.members[0].served.p50_ms + images.members[0].served.p50_ms
    assert dense.latency_ms == pytest.approx(expected)
    assert dense.scores == pytest.approx(images.retrieval.files["dense"].scores, abs=0.05)  # type: ignore[union-attr]
    assert {pair.fits for pair in found.pairs} == {"yes"}, "a budget far beyond any noise"
    assert found.chosen is not None


@pytest.mark.slow
def test_siglip_embeds_images_in_integers(tmp_path: Path) -> None:
    save_whole(tmp_path / "model", "siglip", **LARGE)
    write_data(tmp_path)
    compress = {"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}}
    dense, member = run_pipeline(recipe(tmp_path, compress=compress)).members
    assert all(file.accuracy["mean_cosine"] > 0.5 for file in (*dense.files[1:], *member.files))


@pytest.mark.slow
@pytest.mark.skipif("siglip_text_model" not in TOWER_TYPES, reason="transformers 4 has no such type")
def test_a_tower_of_texts_of_one_length(tmp_path: Path, folder: Path) -> None:
    save_whole(tmp_path / "model", "siglip", **LARGE)
    changes: dict[str, Any] = {
        "model": {"task": "sentence-similarity"},
        "data": {
            "calibration": str(folder / "words.jsonl"),
            "evaluation": None,
            "retrieval": str(folder / "pairs.jsonl"),
        },
        "export": {"shapes": "static"},
        "environment": {"workload": {"seq_len": 40}},
    }
    report = run_pipeline(recipe(tmp_path, **changes))
    assert report.retrieval is not None
    assert set(report.retrieval.files) == {"dense", "1.5x"}
    for name, value in (("export", {"shapes": "dynamic"}), ("environment", {"workload": {"seq_len": 32}})):
        other = recipe(tmp_path, **{**changes, name: value}, output_dir=str(tmp_path / "other"))
        with Run(other) as run, pytest.raises(RecipeError, match=r"static and environment\.workload\.seq_len: 40"):
            check_lengths(run)


def test_searches_that_cannot_be_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    elsewhere: dict[str, Any] = {"output_dir": str(tmp_path / "runs")}
    tower("clip_vision_model").save_pretrained(tmp_path / "alone")  # type: ignore[operator]
    for file in folder.joinpath("model").glob("preprocessor_config.json"):
        (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    save_dense(tmp_path / "vit", "vit", "image-classification")
    data = {"retrieval": str(folder / "pairs.jsonl")}
    for name in ("alone", "vit"):
        with (
            Run(recipe(folder, data=data, model={"path": str(tmp_path / name)}, **elsewhere)) as run,
            pytest.raises(UnsupportedModelError, match="expected a checkpoint of both towers"),
        ):
            check_data(run)
    data = {"retrieval": str(folder / "words.jsonl")}
    with Run(recipe(folder, data=data, **elsewhere)) as run, pytest.raises(DataError, match="caption and image in"):
        check_data(run)
    with pytest.raises(RecipeError, match=r"images have no lengths"):
        recipe(folder, environment={"workload": {"lengths": {16: 1}}})
