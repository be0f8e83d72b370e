"""Search by embeddings: what is read, what is found, and data that nothing can be found in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.search_data import write_lines
from tests.tasks.test_reranking import by_hand
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig, Similarity
from ziplm_deploy.tasks import EvaluationSet, get_task
from ziplm_deploy.tasks.embeddings import similarities, similarity_matrix
from ziplm_deploy.tasks.retrieval import Retrieval, RetrievalSet, read_retrieval_set
from ziplm_deploy.tasks.similarity import SentenceSimilarity

PAIRS = [
    {"query": "who sat ?", "passage": "the cat sat"},
    {"query": "who ran ?", "passage": "a dog ran"},
    {"query": "who sat ?", "passage": "a dog sat"},
    {"query": " who ran ?", "passage": "a dog ran "},
]


def read(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> RetrievalSet:
    return read_retrieval_set(DataConfig(retrieval=write_lines(folder / "search.jsonl", rows), **changes), 0)


def task(**changes: Any) -> SentenceSimilarity:
    found = get_task(ModelConfig.model_validate({"path": "", "task": "sentence-similarity", **changes}))
    assert isinstance(found, SentenceSimilarity)
    return found


# what is read


def test_queries_and_passages_are_distinct_and_belong_together(tmp_path: Path) -> None:
    found = read(tmp_path, PAIRS)
    assert found.queries == ["who sat ?", "who ran ?"]
    assert found.passages == ["the cat sat", "a dog ran", "a dog sat"]
    assert found.relevant == [{0: 1.0, 2: 1.0}, {1: 1.0}]


def test_a_column_of_relevance_adds_passages_that_answer_nothing(tmp_path: Path) -> None:
    rows = [{**row, "score": score} for row, score in zip(PAIRS, (2, 0, 0, 0), strict=True)]
    found = read(tmp_path, rows)
    assert (found.queries, len(found.passages), found.relevant) == (["who sat ?"], 3, [{0: 2.0}])


def test_a_column_of_labels_is_read_where_it_is_named(tmp_path: Path) -> None:
    rows = [{**row, "label": label} for row, label in zip(PAIRS, (1, 0, 0, 0), strict=True)]
    found = read(tmp_path, rows, retrieval_columns=["query", "passage", "label"])
    assert (found.queries, len(found.passages), found.relevant) == (["who sat ?"], 3, [{0: 1.0}])


def test_fewer_queries_search_all_passages(tmp_path: Path) -> None:
    found = read(tmp_path, PAIRS, n_retrieval=1)
    assert (len(found.queries), len(found.passages)) == (1, 3)
    with pytest.raises(DataError, match=r"search\.jsonl: .*at least 3 examples for data\.n_retrieval, found 2"):
        read(tmp_path, PAIRS, n_retrieval=3)


def test_other_columns_are_found_or_named(tmp_path: Path) -> None:
    squad = [{"question": row["query"], "context": row["passage"], "answers": {"text": []}} for row in PAIRS]
    assert read(tmp_path, squad).passages == read(tmp_path, PAIRS).passages
    qnli = [{"question": row["query"], "sentence": row["passage"], "idx": n} for n, row in enumerate(PAIRS)]
    assert read(tmp_path, qnli).relevant == read(tmp_path, PAIRS).relevant
    named = [{"q": row["query"], "p": row["passage"]} for row in PAIRS]
    assert read(tmp_path, named, retrieval_columns=["q", "p"]).relevant == read(tmp_path, PAIRS).relevant


@pytest.mark.parametrize(
    ("rows", "changes", "match"),
    [
        (PAIRS[:1], {}, "among two or more, found 1 queries and 1 passages"),
        ([{**row, "score": 0} for row in PAIRS], {}, "found 0 queries and 3 passages"),
        ([{**row, "label": 0} for row in PAIRS], {}, r"label' means, .*QNLI.*\[query, passage, label\]\), else keep"),
        ([{"text": "a"}], {}, r"query and passage in column.*found columns 'text'.*data\.retrieval_columns"),
        (
            PAIRS,
            {"retrieval_columns": ["query"]},
            r"query and passage in data\.retrieval_columns, .*found \('query',\)",
        ),
        ([*PAIRS, {"query": " ", "passage": "a"}], {}, "blank text in row 5"),
        ([*PAIRS, {"query": "a", "passage": ["b"]}], {}, r"a passage in column 'passage', found \['b'\] in row 5"),
        ([{**row, "score": "yes"} for row in PAIRS], {}, "number as relevance, found 'yes' in row 1"),
    ],
)
def test_data_that_nothing_is_found_in_are_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=match):
        read(tmp_path, rows, **changes)


# what is found


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_a_matrix_of_similarities_is_that_of_pairs(kind: Similarity) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    found = similarity_matrix(left, right, kind)
    for row, vector in zip(found, left, strict=True):
        np.testing.assert_allclose(row, similarities(np.tile(vector, (4, 1)), right, kind))


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
def test_queries_find_what_their_definition_says(kind: Similarity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ziplm_deploy.tasks.retrieval.QUERIES_AT_ONCE", 3)  # of 7
    rng = np.random.default_rng(2)
    relevant = [{int(number): float(1 + number % 2)} for number in rng.integers(0, 25, 7)]
    data = RetrievalSet([f"which {n}" for n in range(7)], [str(n) for n in range(25)], relevant)
    retrieval = Retrieval(task(similarity=kind), data, (4,))
    queries, passages, dense = (rng.normal(size=(n, 8)).astype(np.float32) for n in (7, 25, 25))
    outcomes = retrieval.outcomes(queries, passages, dense)
    assert set(outcomes.arrays) == set(retrieval.metrics)
    for name, index, size in (
        ("ndcg_at_10", passages, 8),
        ("asymmetric_ndcg_at_10", dense, 8),
        ("ndcg_at_10_first_4", passages, 4),
        ("asymmetric_ndcg_at_10_first_4", dense, 4),
    ):
        for number, gains in enumerate(relevant):
            scores = similarities(np.tile(queries[number, :size], (25, 1)), index[:, :size], kind)
            expected, _ = by_hand(scores.tolist(), [gains.get(n, 0.0) for n in range(25)])
            assert outcomes[name][number] == pytest.approx(expected), name
    assert not np.allclose(outcomes["ndcg_at_10"], outcomes["asymmetric_ndcg_at_10"])


def test_a_query_that_is_a_passage_too_does_not_find_itself() -> None:
    """As in data of duplicate questions; a row may say that it should."""
    texts = np.eye(3, dtype=np.float32)
    near = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]], dtype=np.float32)  # what "a" is nearest to: "a", then "b"
    for relevant, expected in (({1: 1.0}, 1.0), ({0: 1.0, 1: 1.0}, 1.0), ({2: 1.0}, 1 / np.log2(3))):
        data = RetrievalSet(["a", "which"], ["a", "b", "c"], [relevant, {1: 1.0}])
        found = Retrieval(task(similarity="dot"), data, ()).outcomes(near, texts, texts)
        assert found["ndcg_at_10"].tolist() == pytest.approx([expected, 1.0])


def test_prompts_stand_before_queries_and_passages(tokenizer: Any) -> None:
    data = RetrievalSet(["who ?"], ["a dog ran", "the cat"], [{0: 1.0}])
    seen: list[str] = []

    def function(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.extend(tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True))
        return {"sentence_embedding": np.ones((len(inputs["input_ids"]), 4), np.float32)}

    how = EvaluationSet([], tokenizer, 36, 4)
    for changes, expected in (
        ({"prompt": "the "}, ["the who?", "the the cat", "the a dog ran"]),
        ({"prompt": "the ", "query_prompt": "on "}, ["on who?", "the the cat", "the a dog ran"]),
        ({"passage_prompt": "mat "}, ["who?", "mat the cat", "mat a dog ran"]),
        ({"prompt": "the ", "query_prompt": "", "passage_prompt": ""}, ["who?", "the cat", "a dog ran"]),
    ):
        seen.clear()
        retrieval = Retrieval(task(**changes), data)
        retrieval.embed_queries(function, how)
        retrieval.embed_passages(function, how)
        assert seen == expected
