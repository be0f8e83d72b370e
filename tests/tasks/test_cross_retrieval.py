"""Captions and images that search each other: what is read, what is found, and data that cannot be searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.image_data import image_rows
from tests.helpers.search_data import write_lines
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import EvaluationSet, get_task
from ziplm_deploy.tasks.cross_retrieval import CrossRetrieval, PairSet, has_images, pairs_hash, read_pairs
from ziplm_deploy.tasks.embeddings import similarities
from ziplm_deploy.tasks.resampling import ResampledScores

PAIRS = [(0, 0), (1, 0), (2, 1), (3, 2), (3, 3), (4, 3)]  # caption, image


def search(data: PairSet, task: str = "image-feature-extraction", **others: Any) -> CrossRetrieval:
    model = ModelConfig.model_validate({"path": "", "task": task})
    embed = others.pop("embed", None)
    return CrossRetrieval(get_task(model), data, embed, **others)  # type: ignore[arg-type]


def pair_set(drawn: list[int], captions: int = 6) -> PairSet:
    return PairSet([f"caption {n}" for n in range(captions)], [b"0", b"1", b"2", b"3", b"4"], PAIRS, drawn)


def config(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DataConfig:
    return DataConfig(retrieval=write_lines(folder / "pairs.jsonl", rows), **changes)


# what is found


@pytest.mark.parametrize("drawn", [[0, 1, 2, 3], [0, 3]])
def test_scores_are_what_their_definition_says(drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ziplm_deploy.tasks.cross_retrieval.QUERIES_AT_ONCE", 2)
    rng = np.random.default_rng(1)
    texts, images = (rng.normal(size=(n, 4)).astype(np.float32) for n in (6, 5))
    retrieval = search(pair_set(drawn))
    outcomes = retrieval.found({"images": images}, {"texts": texts, "images": rng.normal(size=(5, 4))})
    nearness = np.array([similarities(np.tile(text, (5, 1)), images, "cosine") for text in texts])
    owners = {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}  # a caption counts with its first image
    captions = [caption for caption, image in owners.items() if image in drawn]
    for name, k in (("recall_at_1", 1), ("recall_at_5", 5), ("recall_at_10", 10)):
        hits = [any((c, i) in PAIRS for i in np.argsort(-nearness[c])[:k]) for c in captions]
        scores = ResampledScores(retrieval, outcomes)
        assert scores.score(f"text_to_image_{name}") == pytest.approx(np.mean(hits)), name
        back = [any((c, i) in PAIRS for c in np.argsort(-nearness[:, i])[:k]) for i in drawn]
        assert scores.score(f"image_to_text_{name}") == pytest.approx(np.mean(back)), name
    assert set(outcomes.arrays) == {*retrieval.metrics, "captions"}
    assert outcomes["captions"].sum() == len(captions)
    low, high = scores.interval("text_to_image_ndcg_at_10")
    assert 0 <= low <= scores.score("text_to_image_ndcg_at_10") <= high <= 1
    assert retrieval.n_queries == len(drawn)


def test_perfect_embeddings_find_everything() -> None:
    vectors = np.eye(5, dtype=np.float32)
    names = [str(number) for number in range(5)]
    data = PairSet(names, [name.encode() for name in names], [(n, n) for n in range(5)], [*range(5)])
    retrieval = search(data, "sentence-similarity")
    scores = ResampledScores(retrieval, retrieval.found({"texts": vectors}, {"images": vectors}))
    assert {scores.score(name) for name in retrieval.metrics} == {1.0}
    collapsed = ResampledScores(retrieval, retrieval.found({"texts": np.ones((5, 5))}, {"images": vectors}))
    assert collapsed.score("text_to_image_recall_at_1") == 0.0


@pytest.mark.parametrize("task", ["sentence-similarity", "image-feature-extraction"])
def test_each_side_is_embedded_by_its_own_tower(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(rows: list[dict[str, Any]]) -> np.ndarray:
        asked.append(rows)
        return np.ones((len(rows), 2))

    retrieval = search(pair_set([0]), task, embed=answer, prompt="a ")
    own, other = ("texts", "images") if task == "sentence-similarity" else ("images", "texts")
    rows = {"texts": {"text": "a caption 0"}, "images": {"image": b"0"}}
    monkeypatch.setattr(type(retrieval.task), "embed", lambda self, function, how: function(how.rows))
    found = retrieval.embed_own(answer, EvaluationSet([], None, 0))  # type: ignore[arg-type]
    assert set(found) == {own}
    assert set(retrieval.embed_fixed()) == {other, "pairs", "drawn"}
    assert [each[0] for each in asked] == [rows[own], rows[other]]


# what is read


def test_captions_and_images_are_distinct_and_belong_together(tmp_path: Path) -> None:
    first, second, third = image_rows(tmp_path, 3)
    rows = [
        {"caption": "red", "image": first["image"]},
        {"caption": "a colour", "image": first["image"]},
        {"caption": " green ", "image": second["image"]},
        {"caption": "a colour", "image": second["image"]},
        {"caption": "red", "image": first["image"]},
        {"caption": "nothing", "image": third["image"]},
    ]
    data = config(tmp_path, [{**row, "score": int(row["caption"] != "nothing")} for row in rows])
    found = read_pairs(data, 0)
    assert found.captions == ["red", "a colour", "green", "nothing"]
    assert found.images == [tmp_path / each["image"] for each in (first, second, third)]
    assert found.pairs == [(0, 0), (1, 0), (2, 1), (1, 1)]
    assert found.drawn == [0, 1], "the third is searched, and has no caption of its own"
    assert len(read_pairs(data.model_copy(update={"n_retrieval": 1}), 0).drawn) == 1
    before = pairs_hash(data)
    (tmp_path / third["image"]).write_bytes((tmp_path / first["image"]).read_bytes())
    assert pairs_hash(data) != before


def test_columns_say_whether_there_are_images(tmp_path: Path) -> None:
    assert has_images(config(tmp_path, [{"text": "a", "file_name": "b"}]))
    assert not has_images(config(tmp_path, [{"query": "a", "passage": "b"}]))
    assert not has_images(config(tmp_path, [{"query": "a", "passage": "b", "image": "c"}]))
    rows = [{"legend": "a", "image": "b"}]
    assert not has_images(config(tmp_path, rows))
    assert has_images(config(tmp_path, rows, retrieval_columns=("legend", "image")))


def test_pairs_that_cannot_be_searched_are_refused(tmp_path: Path) -> None:
    one, two = ({"caption": row["caption"], "image": row["image"]} for row in image_rows(tmp_path, 2))
    (tmp_path / "text.png").write_text("no image")
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([one], {}, "found 1 with 1; give more rows"),
        ([one, {**two, "caption": " "}], {}, "blank text in row 2"),
        ([one, {**two, "image": "gone.png"}], {}, r"image file at .*gone\.png \(row 2\)"),
        ([one, {**two, "image": "text.png"}], {}, r"expected an image in .*text\.png"),
        ([one, {**two, "caption": 3}], {}, "a caption in column 'caption', found 3"),
        ([{"query": "a", "passage": "b"}], {}, r"caption and image in column.*data\.retrieval_columns"),
        ([one, two], {"retrieval_columns": ("image",)}, r"caption and image in data\.retrieval_columns"),
        ([one, two], {"n_retrieval": 3}, r"at least 3 examples for data\.n_retrieval, found 2"),
    ]
    for rows, changes, said in cases:
        with pytest.raises(DataError, match=rf"pairs\.jsonl: .*{said}"):
            read_pairs(config(tmp_path, rows, **changes), 0)
