"""Two plans, one budget: which member of each tower, where one request calls both.

Two finished runs, one of a tower that reads texts and one of a tower that reads images, of one checkpoint and with the
same captions and images in ``data.retrieval``. Every file of one tower is put together with every file of the other:
what a request costs is the sum of measured latencies, each as often as it is called, and what the pair finds is scored
from embeddings by both files.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.errors import CorruptArtifactError, IncompatibleArtifactError, UsageError
from ziplm_deploy.recipe import Recipe, file_label, load_recipe
from ziplm_deploy.reporting.embeddings import embeddings_file, load_embeddings
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.reporting.table import percent_text
from ziplm_deploy.tasks.cross_retrieval import PAIR_METRICS, PairJudge, pair_outcomes
from ziplm_deploy.tasks.embeddings import similarities
from ziplm_deploy.tasks.outcomes import halves
from ziplm_deploy.tasks.resampling import Comparison, ResampledScores
from ziplm_deploy.tasks.search import Embedded

MIN_COSINE = 0.999  # of a dense tower's embeddings in torch and in ONNX, or on two engines
Fits = Literal["yes", "undecided", "no"]


class TowerPair(BaseModel):
    """One file of each tower, and what they cost and find together."""

    text: str  # labels: "dense", "2x", "2x int8" …
    image: str
    latency_ms: float  # of a request: calls of each tower times its median
    latency_high_ms: float  # the same with the lower ends of both speedups' 95 % intervals
    speedup: float  # over both dense towers
    fits: Fits  # into the budget; undecided where the interval does not, or noise was too large to tell
    scores: dict[str, float]
    interval: tuple[float, float]  # 95 %, of the metric that is chosen by
    of_dense: Comparison | None = None  # by that metric; None for the dense pair


class UnseenScore(BaseModel):
    """What the chosen pair finds on the images that did not choose it."""

    n_images: int
    score: float
    interval: tuple[float, float]  # 95 %
    of_dense: Comparison | None = None  # None for the dense pair


class TowerPairs(Artifact):
    """Every pair of files of two towers, the fastest first, and the one to take."""

    KIND: ClassVar[str] = "tower_pairs"

    text_run: str
    image_run: str
    text_calls: float  # a request
    image_calls: float
    budget_ms: float
    metric: str
    n_images: int
    pairs: list[TowerPair]
    chosen: int | None = Field(None, description="Place in the list, by one half of the images; None: no pair fits.")
    unseen: UnseenScore | None = None  # of the chosen one, on the other half


@dataclass(frozen=True)
class _Timed:
    """What is known of one file."""

    p50_ms: float
    high_ms: float  # at the lower end of its speedup's interval
    embedded: Embedded


@dataclass(frozen=True)
class _Tower:
    """What a finished run says of its tower."""

    folder: Path
    recipe: Recipe
    report: FamilyReport
    dense: Embedded

    def files(self) -> dict[str, _Timed]:
        """Files that were timed and searched with, by label, that of the dense model first."""
        baseline_ms = self.report.members[0].served.p50_ms
        found: dict[str, _Timed] = {}
        for member in self.report.members:
            for file in member.files:
                label = file_label(member.name, file.variant)
                path = embeddings_file(self.folder, label)
                if label in found or not path.exists():  # dense once more on another engine, or not searched with
                    continue
                is_dense = label == self.report.members[0].name
                high_ms = file.p50_ms if is_dense else max(file.p50_ms, baseline_ms / file.measured_low)
                found[label] = _Timed(file.p50_ms, high_ms, self.dense if is_dense else load_embeddings(path))
        return found


def pair_towers(
    text_run: Path, image_run: Path, budget_ms: float, text_calls: float = 1, image_calls: float = 1
) -> TowerPairs:
    """The pair that finds most within a budget, and all others, from two run folders; measures no latency.

    Args:
        budget_ms: of one request, for all its calls of both towers.
        text_calls, image_calls: how often a request calls each tower; less than 1 where answers are kept.

    Raises:
        UsageError: a budget or calls that are not above 0, or a run of another kind of model.
        IncompatibleArtifactError: runs of different checkpoints, searches, machines or settings of serving.
        CorruptArtifactError: a run is not finished, or has no embeddings of captions and images.
    """
    asked = {"budget_ms": budget_ms, "text_calls": text_calls, "image_calls": image_calls}
    wrong = [f"{name} {value:g}" for name, value in asked.items() if not 0 < value < float("inf")]
    if wrong:
        raise UsageError(f"expected a budget and calls above 0, found {', '.join(wrong)}; correct them")
    text, image = _opened(Path(text_run), "texts"), _opened(Path(image_run), "images")
    _check_same(text, image)
    found = _pairs(text, image, budget_ms, text_calls, image_calls)
    _, dense_scores = found[0]
    found.sort(key=lambda each: each[0].latency_ms)
    pairs, resampled = [pair for pair, _ in found], [scores for _, scores in found]
    metric = next(iter(PAIR_METRICS))
    chooses, reports = halves(len(text.dense["drawn"]), text.recipe.seed)
    fitting = [number for number, pair in enumerate(pairs) if pair.fits == "yes"]
    if not len(chooses):  # a single image
        chooses = reports
    scores = {number: resampled[number].on(chooses).score(metric) for number in fitting}
    chosen = max(fitting, key=lambda number: (scores[number], -number), default=None)
    return TowerPairs(
        text_run=str(text_run),
        image_run=str(image_run),
        **asked,
        metric=metric,
        n_images=len(text.dense["drawn"]),
        pairs=pairs,
        chosen=chosen,
        unseen=None if chosen is None else _unseen(resampled[chosen], dense_scores, reports, metric),
    )


def _unseen(chosen: ResampledScores, dense: ResampledScores, images: npt.NDArray[np.int64], metric: str) -> UnseenScore:
    own = chosen.on(images)
    return UnseenScore(
        n_images=len(images),
        score=own.score(metric),
        interval=own.interval(metric),
        of_dense=None if chosen is dense else own.beside(dense.on(images), metric),
    )


def _pairs(
    text: _Tower, image: _Tower, budget_ms: float, text_calls: float, image_calls: float
) -> list[tuple[TowerPair, ResampledScores]]:
    """Every pair of files with its scores, that of the two dense towers first."""
    texts, images = text.files(), image.files()
    numbers, similarity = text.dense, text.recipe.model.similarity or "cosine"
    floors = [
        tower.report.itself.floor for tower in (text, image) if tower.report.itself.floor > tower.report.tolerance
    ]
    noise = max(floors, default=0.0)
    metric = next(iter(PAIR_METRICS))
    found: list[tuple[TowerPair, ResampledScores]] = []
    reference: ResampledScores | None = None
    for (text_label, one), (image_label, other) in itertools.product(texts.items(), images.items()):
        vectors = one.embedded["texts"], other.embedded["images"]
        outcomes = pair_outcomes(*vectors, numbers["pairs"], numbers["drawn"], similarity)
        resampled = ResampledScores(PairJudge(), outcomes, text.recipe.seed)
        latency_ms = text_calls * one.p50_ms + image_calls * other.p50_ms
        high_ms = text_calls * one.high_ms + image_calls * other.high_ms
        pair = TowerPair(
            text=text_label,
            image=image_label,
            latency_ms=latency_ms,
            latency_high_ms=high_ms,
            speedup=(found[0][0].latency_ms if found else latency_ms) / latency_ms,
            fits=_fits(latency_ms, (1 + noise) * high_ms, budget_ms),
            scores={name: resampled.score(name) for name in PAIR_METRICS},
            interval=resampled.interval(metric),
            of_dense=None if reference is None else resampled.beside(reference, metric),
        )
        found.append((pair, resampled))
        reference = reference or resampled
    return found


def _fits(latency_ms: float, high_ms: float, budget_ms: float) -> Fits:
    """Whether a request fits, of which ``high_ms`` is the most that it may take.

    That has noise in it where the dense model differed from itself by more than is allowed.
    """
    if latency_ms > budget_ms:
        return "no"
    return "yes" if high_ms <= budget_ms else "undecided"


def _opened(folder: Path, side: Literal["texts", "images"]) -> _Tower:
    """What a run folder holds; raises as :func:`pair_towers`."""
    if not (folder / "report.json").is_file():
        raise CorruptArtifactError(
            f"expected the folder of a finished run with report.json at {folder}, found none; run: ziplm-deploy run "
            "RECIPE"
        )
    report = FamilyReport.load(folder / "report.json")
    task = "sentence-similarity" if side == "texts" else "image-feature-extraction"
    if report.task != task:
        raise UsageError(
            f"expected a run of {task} in {folder}, found one of {report.task}; name the run of the text tower first, "
            "then that of the image tower"
        )
    path = embeddings_file(folder, report.members[0].name)
    if report.retrieval is None or not path.exists():  # embeddings of an earlier recipe are of other members
        raise CorruptArtifactError(f"expected what {_asked_for(folder)} leaves, found none; {_HOW}")
    dense = load_embeddings(path)
    missing = {"texts", "images", "pairs", "drawn"} - dense.keys()
    if missing:
        raise CorruptArtifactError(
            f"expected what {_asked_for(folder)} leaves in {path}, found no {', '.join(sorted(missing))}; {_HOW}"
        )
    return _Tower(folder, load_recipe(folder / "recipe.yaml"), report, dense)


_HOW = "give data.retrieval with captions and images, and run the recipe again"


def _asked_for(folder: Path) -> str:
    return f"a search of captions and images in {folder}"


def _check_same(text: _Tower, image: _Tower) -> None:
    """Raise :class:`IncompatibleArtifactError` unless both are of one checkpoint, one search and one machine."""
    ours, theirs = text.dense, image.dense
    differing = [
        what
        for what, same in {
            "captions and images": all(np.array_equal(ours[name], theirs[name]) for name in ("pairs", "drawn")),
            "texts by the dense tower": _are_alike(ours["texts"], theirs["texts"]),
            "images by the dense tower": _are_alike(ours["images"], theirs["images"]),
            "model.similarity": text.recipe.model.similarity == image.recipe.model.similarity,
            "machine": text.report.machine.fingerprint == image.report.machine.fingerprint,
            "threads or huge pages of environment": _served(text.report) == _served(image.report),
        }.items()
        if not same
    ]
    if differing:
        raise IncompatibleArtifactError(
            f"expected runs of the two towers of one checkpoint, with the same data.retrieval, n_retrieval and seed, "
            f"on one machine, found others in {text.folder} and {image.folder}: {', '.join(differing)} differ; run "
            "both again (where texts alone differ, with a workload.seq_len that cuts no caption)"
        )


def _served(report: FamilyReport) -> tuple[object, ...]:
    """What milliseconds of two runs must share to be added: all but batches and lengths, which are the towers' own."""
    environment = report.environment
    return environment.threads, environment.huge_pages


def _are_alike(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> bool:
    return one.shape == other.shape and bool(similarities(one, other, "cosine").min() > MIN_COSINE)


TITLES = ["", "text tower", "image tower", "ms a request [95 %]", "speedup", "fits", "caption to image", "of dense"]


def pair_rows(found: TowerPairs) -> list[list[str]]:
    """One row a pair, as long as :data:`TITLES`, the chosen one marked."""
    return [
        [
            "take this" if number == found.chosen else "",
            pair.text,
            pair.image,
            f"{pair.latency_ms:.2f} [up to {pair.latency_high_ms:.2f}]",
            f"{pair.speedup:.2f}x",
            pair.fits,
            f"{pair.scores[found.metric]:.4f} [{pair.interval[0]:.4f}, {pair.interval[1]:.4f}]",
            percent_text(pair.of_dense),
        ]
        for number, pair in enumerate(found.pairs)
    ]
