"""Embeddings judged by search: does a query find its passage among all of a set, by nDCG@10?

Symmetric: queries and passages are embedded by the same model. Asymmetric: passages by the dense model, so that an
index that exists stays valid, and queries by a faster one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, Similarity
from ziplm_deploy.tasks.batching import token_lengths
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.data import Row, cell, find_columns, read_rows, sample_rows
from ziplm_deploy.tasks.embeddings import similarity_matrix
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.metrics import Metric, ratio_of_sums
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.ranking import ASYMMETRIC, NDCG, ndcg, right_and_wrong_query
from ziplm_deploy.tasks.reranking import PAIRS
from ziplm_deploy.tasks.scores import parse_score
from ziplm_deploy.tasks.search import Embedded, Search, Vectors
from ziplm_deploy.tasks.similarity import SentenceSimilarity

# Usual names of query and passage. Not all of rerankers: label 0 is the right answer in QNLI, which has the last.
TEXT_PAIRS = (*PAIRS, ("anchor", "positive"), ("question", "sentence"))
RELEVANCE_COLUMNS = ("relevance", "score")
QUERIES_AT_ONCE = 256  # rows of the matrix of similarities in memory


@dataclass(frozen=True)
class RetrievalSet:
    """Distinct queries and passages, as the data have them: without prompts."""

    queries: list[str]
    passages: list[str]
    relevant: list[dict[int, float]]  # by query: number of a passage -> relevance above 0; any other has 0


def read_retrieval_set(data: DataConfig, seed: int) -> RetrievalSet:
    """Queries of ``data.retrieval`` (``data.n_retrieval`` of them, drawn with ``seed``), and every passage there is.

    Each row is a query with a passage that answers it; where there is a column ``relevance`` or ``score``, or a third
    one is named, with one that answers it if that is above 0.

    Raises:
        DataError: missing, damaged, columns or numbers that do not fit, or no two passages and a query that has one.
    """
    source = data.retrieval
    assert source is not None  # the callers ask first
    raw = read_rows(source, split=data.retrieval_split, config_name=data.config_name, revision=data.revision)
    try:
        found = _collected(raw, data)
        queries = [{"text": query, "relevant": known} for query, known in found.relevant.items() if known]
        drawn = sample_rows(queries, data.n_retrieval, seed, field="n_retrieval", shuffle=False)
        if len(found.numbers) < 2 or not drawn:
            raise DataError(
                f"expected a query with a passage to find among two or more, found {len(drawn)} queries and "
                f"{len(found.numbers)} passages; give more rows"
            )
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return RetrievalSet([row["text"] for row in drawn], list(found.numbers), [row["relevant"] for row in drawn])


@dataclass(frozen=True)
class _Collected:
    numbers: dict[str, int]  # of the passages
    relevant: dict[str, dict[int, float]]  # by query


def _collected(raw: list[Row], data: DataConfig) -> _Collected:
    what, field = "query and passage", "retrieval_columns"
    columns = find_columns(raw, data.retrieval_columns, TEXT_PAIRS, what=what, field=field)
    relevance = relevance_column(raw, columns, what)
    found = _Collected({}, {})
    for number, row in enumerate(raw, 1):
        query, passage = (
            cell(row, column, str, number, what).strip()
            for column, what in zip(columns[:2], ("a query", "a passage"), strict=True)
        )
        if not query or not passage:
            raise DataError(f"expected a query and a passage, found a blank text in row {number}; remove that row")
        index = found.numbers.setdefault(passage, len(found.numbers))
        gain = 1.0 if relevance is None else relevance_of(row, relevance, number)
        known = found.relevant.setdefault(query, {})
        if gain > 0:
            known[index] = max(gain, known.get(index, 0.0))
    return found


def relevance_column(raw: list[Row], columns: tuple[str, ...], what: str) -> str | None:
    """Column that says how well the two of a row belong together; None where all of them do.

    Args:
        columns: of the two, and perhaps of the relevance.
        what: the two, in words.

    Raises:
        DataError: another number of columns, or a column ``label`` that nobody named.
    """
    if len(columns) not in (2, 3):
        raise DataError(
            f"expected the columns of {what} in data.retrieval_columns, and perhaps one of relevance, found {columns}"
        )
    if len(columns) == 3:
        return columns[2]
    known = next((name for name in RELEVANCE_COLUMNS if name in raw[0] and name not in columns), None)
    if known is None and "label" in raw[0] and "label" not in columns:
        raise DataError(
            "expected to know what the column 'label' means, for 0 is the right answer in some data (QNLI) and a wrong "
            f"one in others, found it unnamed; where above 0 is right, name it as third (data.retrieval_columns: "
            f"[{', '.join(columns)}, label]), else keep the rows that are right, without that column"
        )
    return known


def relevance_of(row: Row, column: str, number: int) -> float:
    """Relevance of a row, from 1; raises :class:`DataError` for what is no number."""
    value = cell(row, column, (int, float, str), number, "a relevance")
    if isinstance(value, NamedClass) and value.name is not None:
        raise DataError(
            f"expected a number as relevance in column {column!r}, found the class {value.name!r} in row {number}; "
            "give rows of relevant pairs only, without that column"
        )
    return parse_score(value, number, "relevance")


class Retrieval(Search):
    """A set of texts with the way that one family's embeddings are compared on it.

    ``dimensions``: how many numbers of each embedding are kept, beside all of them, where a model was trained for that
    (Kusupati et al., "Matryoshka representation learning", 2022); ``similarity`` is of what is left, not scaled again.
    ``passage_length``: tokens that passages are cut at; None: as queries are.
    """

    def __init__(
        self,
        task: SentenceSimilarity,
        data: RetrievalSet,
        dimensions: tuple[int, ...] = (),
        passage_length: int | None = None,
    ) -> None:
        self.task, self.data, self.passage_length = task, data, passage_length
        self._similarity: Similarity = task.model.similarity or "cosine"
        self._cuts: dict[str, int | None] = {"": None, **{f"_first_{size}": size for size in dimensions}}

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """nDCG@10 by name: ``ndcg_at_10``, ``asymmetric_ndcg_at_10``, and ``ndcg_at_10_first_64`` and so on."""
        return {
            f"{kind}{NDCG}{cut}": ratio_of_sums(f"{kind}{NDCG}{cut}") for cut in self._cuts for kind in ("", ASYMMETRIC)
        }

    @property
    def n_queries(self) -> int:
        return len(self.data.queries)

    @property
    def n_passages(self) -> int:
        return len(self.data.passages)

    def embed_own(self, function: ModelFunction, how: EvaluationSet) -> Embedded:
        return {"queries": self.embed_queries(function, how), "passages": self.embed_passages(function, how)}

    def found(self, own: Embedded, dense: Embedded) -> Outcomes:
        return self.outcomes(own["queries"], own["passages"], dense["passages"])

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return right_and_wrong_query(outcomes)

    def embed(self, function: ModelFunction, how: EvaluationSet, texts: list[str], prompt: str) -> Vectors:
        """Embeddings [texts, size]; ``how`` says in which batches they go through the model, its rows do not count."""
        rows: list[Row] = [{"text": prompt + text} for text in texts]
        return np.asarray(self.task.embed(function, how.with_rows(rows)), dtype=np.float32)

    def embed_queries(self, function: ModelFunction, how: EvaluationSet) -> Vectors:
        """Embeddings [queries, size], with the prompt that queries have."""
        return self.embed(function, how, self.data.queries, self.task.model.prompt_of_queries)

    def embed_passages(self, function: ModelFunction, how: EvaluationSet) -> Vectors:
        """Embeddings [passages, size], with the prompt that passages have."""
        if self.passage_length is not None:
            how = dataclasses.replace(how, max_length=self.passage_length)
        return self.embed(function, how, self.data.passages, self.task.model.prompt_of_passages)

    def passage_lengths(self, processor: Any) -> list[int]:
        """Tokens of every passage with its prompt, before any is cut."""
        prompt = self.task.model.prompt_of_passages
        return token_lengths(processor, [{"text": prompt + text} for text in self.data.passages])

    def outcomes(self, queries: Vectors, passages: Vectors, dense_passages: Vectors) -> Outcomes:
        """Every metric of every query, from embeddings of one model and of passages by the dense one, too."""
        against = {"": passages, ASYMMETRIC: dense_passages}
        return Outcomes(
            {
                f"{kind}{NDCG}{cut}": self._found(queries[:, :size], index[:, :size])
                for cut, size in self._cuts.items()
                for kind, index in against.items()
            }
        )

    def _found(self, queries: Vectors, passages: Vectors) -> npt.NDArray[np.float64]:
        """nDCG [queries]. A query that is a passage, too, does not find itself, unless a row says that it should."""
        values: list[float] = []
        places = {text: place for place, text in enumerate(self.data.passages)}
        own = [places.get(query) for query in self.data.queries]
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            nearness = similarity_matrix(queries[part], passages, self._similarity)  # [part, passages]
            for scores, relevant, itself in zip(nearness, self.data.relevant[part], own[part], strict=True):
                gains = np.zeros(len(passages))
                gains[list(relevant)] = list(relevant.values())
                if itself is not None and itself not in relevant:
                    scores, gains = (np.delete(each, itself) for each in (scores, gains))
                values.append(ndcg(scores, gains))
        return np.array(values)
