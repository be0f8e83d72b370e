"""What the files of a family find, as rows of text: passages for queries, or images for captions and back."""

from __future__ import annotations

from collections.abc import Sequence

from ziplm_deploy.reporting.table import MISSING, markdown_table, percent_text
from ziplm_deploy.tasks.cross_retrieval import RECALLS, TO_IMAGES, TO_TEXTS
from ziplm_deploy.tasks.ranking import ASYMMETRIC, NDCG
from ziplm_deploy.tasks.retrieval_scores import FileRetrieval, RetrievalScores

PASSAGE_TITLES = ["file", "numbers", "symmetric", "of dense", "asymmetric", "of dense"]
PAIR_TITLES = ["file", "search", "nDCG@10", "of dense", *(name.replace("recall_at_", "Recall@") for name in RECALLS)]
DIRECTIONS = {TO_IMAGES: "caption to image", TO_TEXTS: "image to caption"}


def retrieval_table(found: RetrievalScores, labels: Sequence[str]) -> list[str]:
    """Lines of the table of these files."""
    return markdown_table(*retrieval_cells(found, labels))


def retrieval_cells(found: RetrievalScores, labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table of these files."""
    if _is_of_pairs(found):
        return PAIR_TITLES, _pair_rows(found, labels)
    return PASSAGE_TITLES, _passage_rows(found, labels)


def retrieval_title(found: RetrievalScores) -> str:
    """What was searched, in a line."""
    return _pairs(found) if _is_of_pairs(found) else _passages(found)


def retrieval_text(found: RetrievalScores) -> str:
    """What the table of a family shows."""
    if _is_of_pairs(found):
        return (
            f"{_pairs(found)}, with 95 % intervals (bootstrap over the images). Each file embeds one side, the dense "
            "other tower of the same checkpoint the other one, as in an index that exists."
        )
    return (
        f"{_passages(found)}, with 95 % intervals (bootstrap over the queries). *Symmetric*: each file embeds queries "
        "and passages. *Asymmetric*: it embeds queries, and the dense model the passages, as in an index that exists; "
        "its percent is of dense for both, too."
    )


def card_text(found: RetrievalScores) -> str:
    """What the table of one member shows."""
    if _is_of_pairs(found):
        return (
            f"{_pairs(found)}. This model embeds one side, the dense other tower of the original the other one, so "
            "that an index of it stays valid."
        )
    return (
        f"{_passages(found)}; asymmetric: queries by this model, passages by the dense one, so that its index stays "
        "valid."
    )


def _is_of_pairs(found: RetrievalScores) -> bool:
    return any(name.startswith(TO_IMAGES) for file in found.files.values() for name in file.scores)


def _pairs(found: RetrievalScores) -> str:
    return (
        f"nDCG@10 and Recall@k of {found.n_queries:,} images and their captions, each searched among all images and "
        f"{found.n_passages:,} captions"
    )


def _passages(found: RetrievalScores) -> str:
    return f"nDCG@10 of {found.n_queries:,} queries among {found.n_passages:,} passages"


def _pair_rows(found: RetrievalScores, labels: Sequence[str]) -> list[list[str]]:
    """One row a file and direction."""
    return [
        [
            label,
            title,
            *_cells(found.files[label], f"{direction}{NDCG}"),
            *(f"{found.files[label].scores[f'{direction}{name}']:.4f}" for name in RECALLS),
        ]
        for label in labels
        for direction, title in DIRECTIONS.items()
    ]


def _passage_rows(found: RetrievalScores, labels: Sequence[str]) -> list[list[str]]:
    """One row a file, and one more for each size that embeddings were cut to."""
    cuts = {name.partition(NDCG)[2] for label in labels for name in found.files[label].scores}
    sizes = {int(cut.rpartition("_")[2]) if cut else 0: cut for cut in cuts}  # ndcg_at_10_first_64
    rows = []
    for label in labels:
        file = found.files[label]
        for size in sorted(sizes):
            metrics = (f"{kind}{NDCG}{sizes[size]}" for kind in ("", ASYMMETRIC))
            cells = [text for metric in metrics for text in _cells(file, metric)]
            rows.append([label, f"first {size}" if size else "all", *cells])
    return rows


def _cells(file: FileRetrieval, metric: str) -> list[str]:
    """A score with its interval, and its percent of dense."""
    if not file.of_dense and metric.startswith(ASYMMETRIC):  # the dense model has one index
        return [MISSING, MISSING]
    low, high = file.intervals[metric]
    return [f"{file.scores[metric]:.4f} [{low:.4f}, {high:.4f}]", percent_text(file.of_dense.get(metric))]
