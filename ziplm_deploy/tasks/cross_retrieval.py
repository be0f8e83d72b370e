"""Two towers judged by search: do captions find their images, and images their captions?

One tower is the run's, and each of its files embeds one side. The other side is embedded by the dense other tower, so
that an index that exists stays valid. Recall@k is that of retrieval from captions: whether one of the k nearest belongs
to the query (Radford et al., "Learning transferable visual models from natural language supervision", 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, Similarity
from ziplm_deploy.tasks.data import Row, cell, find_columns, read_rows, sample_rows
from ziplm_deploy.tasks.embeddings import EmbeddingTask, similarity_matrix
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.images import IMAGE_COLUMNS, identity, linked_images_hash, locate
from ziplm_deploy.tasks.metrics import Metric, ratio_of_sums
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.ranking import NDCG, ndcg, ranked_gains
from ziplm_deploy.tasks.retrieval import TEXT_PAIRS, relevance_column, relevance_of
from ziplm_deploy.tasks.search import Embedded, Search, Vectors

Side = Literal["texts", "images"]
Numbers = npt.NDArray[np.int64]
TO_IMAGES, TO_TEXTS = "text_to_image_", "image_to_text_"  # before the name of a metric
RECALLS = {f"recall_at_{k}": k for k in (1, 5, 10)}
QUERIES_AT_ONCE = 256  # rows of the matrix of similarities in memory
_CAPTIONS = "captions"  # outcome: how many captions an image stands for
# By caption or by image: text_to_image_ndcg_at_10, text_to_image_recall_at_1 and so on, and the same from images.
PAIR_METRICS: Mapping[str, Metric] = {
    **{f"{TO_IMAGES}{name}": ratio_of_sums(f"{TO_IMAGES}{name}", _CAPTIONS) for name in (NDCG, *RECALLS)},
    **{f"{TO_TEXTS}{name}": ratio_of_sums(f"{TO_TEXTS}{name}") for name in (NDCG, *RECALLS)},
}
_COLUMNS = tuple((caption, image) for caption in ("caption", "text", "sentence", "query") for image in IMAGE_COLUMNS)


@dataclass(frozen=True)
class PairSet:
    """Distinct captions and images, and which of them belong together."""

    captions: list[str]
    images: list[Any]  # paths, bytes or PIL images
    pairs: list[tuple[int, int]]  # numbers of a caption and of an image
    drawn: list[int]  # numbers of the images that count, each with its captions


def has_images(data: DataConfig) -> bool:
    """Whether ``data.retrieval`` pairs captions with images, by the names of its columns; raises as reading it.

    Where there are a query and a passage, too, these are meant.
    """
    raw = _raw(data)
    if data.retrieval_columns is not None:
        return len(data.retrieval_columns) in (2, 3) and data.retrieval_columns[1] in IMAGE_COLUMNS
    texts, pairs = (any(set(pair) <= set(raw[0]) for pair in usual) for usual in (TEXT_PAIRS, _COLUMNS))
    return pairs and not texts


def pairs_hash(data: DataConfig) -> str:
    """Stands for the images that the rows of ``data.retrieval`` name."""
    return linked_images_hash(str(data.retrieval), lambda raw: _columns(raw, data)[1])


def read_pairs(data: DataConfig, seed: int) -> PairSet:
    """Captions and images of ``data.retrieval``; of ``data.n_retrieval`` images, drawn with ``seed``, queries count.

    Each row is a caption with an image that it is of; where there is a column ``relevance`` or ``score``, or
    a third is named, if that is above 0. Paths are relative to the file.

    Raises:
        DataError: missing, damaged, columns that do not fit, an image that is none, or no two images with captions.
    """
    raw, source = _raw(data), str(data.retrieval)
    try:
        return _collected(raw, data, Path(source).parent, seed)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _raw(data: DataConfig) -> list[Row]:
    assert data.retrieval is not None  # the callers ask first
    return read_rows(data.retrieval, split=data.retrieval_split, config_name=data.config_name, revision=data.revision)


def _columns(raw: list[Row], data: DataConfig) -> tuple[str, ...]:
    what, field = "caption and image", "retrieval_columns"
    return find_columns(raw, data.retrieval_columns, _COLUMNS, what=what, field=field)


def _collected(raw: list[Row], data: DataConfig, folder: Path, seed: int) -> PairSet:
    columns = _columns(raw, data)
    relevance = relevance_column(raw, columns, "caption and image")
    captions: dict[str, int] = {}
    images: dict[str | bytes, int] = {}
    contents: list[Any] = []
    pairs: dict[tuple[int, int], None] = {}  # an ordered set
    for number, row in enumerate(raw, 1):
        caption = cell(row, columns[0], str, number, "a caption").strip()
        if not caption:
            raise DataError(f"expected a caption, found a blank text in row {number}; remove that row")
        image = locate(cell(row, columns[1], object, number, "an image"), folder, number)
        if (known := identity(image)) not in images:
            images[known] = len(contents)
            contents.append(image)
        pair = (captions.setdefault(caption, len(captions)), images[known])
        if relevance is None or relevance_of(row, relevance, number) > 0:
            pairs[pair] = None
    captioned = [{"image": number} for number in sorted({image for _, image in pairs})]
    if len(captioned) < 2 or len(captions) < 2:
        raise DataError(
            f"expected two or more images with captions of their own, found {len(captioned)} with {len(captions)}; "
            "give more rows"
        )
    drawn = sample_rows(captioned, data.n_retrieval, seed, field="n_retrieval", shuffle=False)
    return PairSet([*captions], contents, [*pairs], [row["image"] for row in drawn])


class CrossRetrieval(Search):
    """Captions and images, and how a tower's embeddings of one side are compared with the dense ones of the other.

    Examples are images, each with its captions, since those of one image are much alike; scores are means over all
    captions, or over all images. A caption of several images counts with the first of them.

    Args:
        task: of the tower whose files are judged.
        embed_others: dense embeddings of the other side, from rows as its task has them.
        prompt: put before every caption.
    """

    def __init__(
        self, task: EmbeddingTask, data: PairSet, embed_others: Callable[[list[Row]], Vectors], prompt: str = ""
    ) -> None:
        self.task, self.data = task, data
        self._embed_others = embed_others
        self._rows: dict[Side, list[Row]] = {
            "texts": [{"text": prompt + caption} for caption in data.captions],
            "images": [{"image": image} for image in data.images],
        }
        self.own: Side = "images" if task.input_kind == "image" else "texts"
        self.other: Side = "texts" if self.own == "images" else "images"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return PAIR_METRICS

    @property
    def n_queries(self) -> int:
        return len(self.data.drawn)

    @property
    def n_passages(self) -> int:
        return len(self.data.captions)

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return right_and_wrong_image(outcomes)

    def embed_own(self, function: ModelFunction, how: EvaluationSet) -> Embedded:
        embedded = self.task.embed(function, how.with_rows(self._rows[self.own]))
        return {self.own: np.asarray(embedded, dtype=np.float32)}

    def embed_fixed(self) -> Embedded:
        """The other side, with the numbers that say what belongs together and what counts: all that scores need."""
        numbers = {"pairs": np.array(self.data.pairs), "drawn": np.array(self.data.drawn)}
        return {self.other: self._embed_others(self._rows[self.other]), **numbers}

    def found(self, own: Embedded, dense: Embedded) -> Outcomes:
        """Every metric of every drawn image: what its captions found, in sum, and what it did."""
        sides = {self.own: own[self.own], self.other: dense[self.other]}
        pairs, drawn = np.array(self.data.pairs), np.array(self.data.drawn)
        return pair_outcomes(sides["texts"], sides["images"], pairs, drawn, self.task.similarity)


class PairJudge:
    """What scores of captions and images are computed by, whoever embedded them."""

    metrics = PAIR_METRICS

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        """Two made-up images for intervals, see :func:`right_and_wrong_image`."""
        return right_and_wrong_image(outcomes)


def right_and_wrong_image(outcomes: Outcomes) -> Outcomes:
    """An image with one caption that all is found for, and one that nothing is; see ``Task.right_and_wrong``."""
    made_up = {name: np.array([1.0, 0.0]) for name in outcomes.arrays}
    return Outcomes({**made_up, _CAPTIONS: np.ones(2)})


def pair_outcomes(texts: Vectors, images: Vectors, pairs: Numbers, drawn: Numbers, similarity: Similarity) -> Outcomes:
    """What captions ``[n, size]`` and images ``[m, size]`` find of each other, for every image that counts.

    Args:
        pairs: numbers ``[k, 2]`` of a caption and of an image that belong together.
        drawn: numbers of the images that count.
    """
    belongs = np.zeros((len(texts), len(images)), dtype=bool)
    belongs[pairs[:, 0], pairs[:, 1]] = True
    home = belongs.argmax(axis=1)  # [captions], the first image of each
    queries = np.flatnonzero(np.isin(home, drawn) & belongs.any(axis=1))
    place = {int(image): position for position, image in enumerate(drawn)}
    owners = np.array([place[int(home[text])] for text in queries], dtype=np.int64)  # [queries]
    to_images = _scores(texts, images, belongs, queries, similarity)
    to_texts = _scores(images, texts, belongs.T, drawn, similarity)
    sums = {name: np.bincount(owners, values, minlength=len(drawn)) for name, values in to_images.items()}
    return Outcomes(
        {
            **{f"{TO_IMAGES}{name}": values for name, values in sums.items()},
            **{f"{TO_TEXTS}{name}": values for name, values in to_texts.items()},
            _CAPTIONS: np.bincount(owners, minlength=len(drawn)).astype(np.float64),
        }
    )


def _scores(
    queries: Vectors, index: Vectors, belongs: npt.NDArray[np.bool_], numbers: Numbers, similarity: Similarity
) -> dict[str, npt.NDArray[np.float64]]:
    """Scores [numbers] of the queries of these numbers by name; ``belongs`` [queries, index]."""
    found: dict[str, list[float]] = {name: [] for name in (NDCG, *RECALLS)}
    for first in range(0, len(numbers), QUERIES_AT_ONCE):
        part = numbers[first : first + QUERIES_AT_ONCE]
        nearness = similarity_matrix(queries[part], index, similarity)  # [part, index]
        for scores, relevant in zip(nearness, belongs[part], strict=True):
            gains = relevant.astype(np.float64)
            found[NDCG].append(ndcg(scores, gains))
            ranked = ranked_gains(scores, gains)
            for name, k in RECALLS.items():
                found[name].append(float(ranked[:k].any()))
    return {name: np.array(values) for name, values in found.items()}
