"""Two finished runs and one budget: sums, choices and runs that do not belong together."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from tests.helpers.reports import family_report, file, machine, member
from ziplm_deploy import pair_towers
from ziplm_deploy.cli.commands import app
from ziplm_deploy.errors import CorruptArtifactError, IncompatibleArtifactError, UsageError
from ziplm_deploy.recipe import Environment, Variant
from ziplm_deploy.reporting.tower_pairs import TITLES, TowerPair, TowerPairs, pair_rows
from ziplm_deploy.tasks.cross_retrieval import PAIR_METRICS, PairJudge, pair_outcomes
from ziplm_deploy.tasks.outcomes import halves
from ziplm_deploy.tasks.resampling import ResampledScores
from ziplm_deploy.tasks.retrieval_scores import RetrievalScores

COUNT = 12
TASKS = {"texts": "sentence-similarity", "images": "image-feature-extraction"}
TEXT_MS, IMAGE_MS = {"dense": 2.0, "2x": 1.0, "2x int8": 0.5}, {"dense": 30.0, "2x": 15.0, "4x": 7.5}


def vectors(side: str, label: str) -> np.ndarray:
    """Dense embeddings of a caption and its image are near; the faster a member, the more noise it has."""
    shared = np.random.default_rng(0).normal(size=(COUNT, 6))
    noise = {"dense": 0.3, "2x": 0.5, "2x int8": 0.6, "4x": 1.2}[label]
    seed = sum(map(ord, side + label))
    return (shared + noise * np.random.default_rng(seed).normal(size=shared.shape)).astype(np.float32)


def reports_of(latencies: dict[str, float]) -> list[Any]:
    found = []
    for name in dict.fromkeys(label.split()[0] for label in latencies):
        files = []
        for label, milliseconds in latencies.items():
            if label.split()[0] == name:
                speedup = latencies["dense"] / milliseconds
                figures = {"measured_speedup": speedup, "measured_low": speedup / 1.1, "measured_high": speedup * 1.1}
                variant = Variant.INT8 if "int8" in label else Variant.FP32
                files.append(file(variant, p50_ms=milliseconds, **figures))
        found.append(member(name, files=files, p50_ms=files[0].p50_ms))
    return found


def finished(folder: Path, side: str, latencies: dict[str, float], **changes: Any) -> Path:
    """A run folder as an evaluation with captions and images leaves it."""
    (folder / "retrieval").mkdir(parents=True)
    searched = RetrievalScores(n_queries=COUNT, n_passages=COUNT, files={})
    fields = {"task": TASKS[side], "retrieval": searched, **changes}
    family_report(*reports_of(latencies), **fields).save(folder / "report.json")
    model = {"path": "some/clip", "task": TASKS[side], "similarity": "cosine"}
    recipe = {"name": "x", "model": model, "speedups": [2]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    numbers = {"pairs": np.array([(n, n) for n in range(COUNT)]), "drawn": np.arange(COUNT)}
    dense = {"texts": vectors("texts", "dense"), "images": vectors("images", "dense")}
    save_file(dense | numbers, folder / "retrieval" / "dense.safetensors")
    for label in set(latencies) - {"dense"}:
        save_file({side: vectors(side, label)}, folder / "retrieval" / f"{label.replace(' ', '-')}.safetensors")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return finished(tmp_path / "text", "texts", TEXT_MS), finished(tmp_path / "image", "images", IMAGE_MS)


def test_every_pair_costs_the_sum_of_its_calls_and_is_scored_by_its_own_embeddings(runs: tuple[Path, Path]) -> None:
    found = pair_towers(*runs, budget_ms=1000, text_calls=4, image_calls=0.5)
    assert len(found.pairs) == 9
    by_name = {(pair.text, pair.image): pair for pair in found.pairs}
    numbers = np.stack([np.arange(COUNT)] * 2, axis=1)
    for text, image in itertools.product(TEXT_MS, IMAGE_MS):
        pair = by_name[text, image]
        assert pair.latency_ms == pytest.approx(4 * TEXT_MS[text] + 0.5 * IMAGE_MS[image])
        assert pair.speedup == pytest.approx((4 * 2 + 0.5 * 30) / pair.latency_ms)
        outcomes = pair_outcomes(vectors("texts", text), vectors("images", image), numbers, np.arange(COUNT), "cosine")
        judged = ResampledScores(PairJudge(), outcomes)
        assert pair.scores == {name: judged.score(name) for name in PAIR_METRICS}
        assert (pair.of_dense is None) == (text == image == "dense")
    slower = {"dense": (2.0, 30.0), "2x": (1.1, 16.5)}
    for name, (text_ms, image_ms) in slower.items():
        assert by_name[name, name].latency_high_ms == pytest.approx(4 * text_ms + 0.5 * image_ms)
    assert [pair.latency_ms for pair in found.pairs] == sorted(pair.latency_ms for pair in found.pairs)
    assert found.chosen is not None


def scores_on(images: np.ndarray, found: TowerPairs, pair: TowerPair) -> ResampledScores:
    numbers = np.stack([np.arange(COUNT)] * 2, axis=1)
    embedded = vectors("texts", pair.text), vectors("images", pair.image)
    outcomes = pair_outcomes(*embedded, numbers, np.arange(COUNT), "cosine")
    return ResampledScores(PairJudge(), outcomes.take(images))


def test_the_choice_keeps_the_budget_beyond_noise(runs: tuple[Path, Path]) -> None:
    for budget in (9, 12, 17, 40):
        found = pair_towers(*runs, budget_ms=budget)
        assert found.chosen is not None
        chosen = found.pairs[found.chosen]
        assert chosen.latency_high_ms <= budget
        fitting = [pair for pair in found.pairs if pair.latency_high_ms <= budget]
        chooses, reports = halves(COUNT, 0)
        on_half = [scores_on(chooses, found, pair).score(found.metric) for pair in fitting]
        assert scores_on(chooses, found, chosen).score(found.metric) == max(on_half)
        assert found.unseen is not None
        unseen = scores_on(reports, found, chosen)
        assert (found.unseen.n_images, found.unseen.score) == (len(reports), unseen.score(found.metric))
        assert found.unseen.interval == unseen.interval(found.metric)
        assert (found.unseen.of_dense is None) == (chosen.text == chosen.image == "dense")
        kinds = {pair.fits: pair for pair in found.pairs}
        assert all(pair.latency_ms > budget for pair in found.pairs if pair.fits == "no"), kinds
    rows = pair_rows(found)
    assert {len(row) for row in rows} == {len(TITLES)}
    assert [row[0] for row in rows].count("take this") == 1


def test_what_fits_does_so_beyond_the_noise_of_a_measurement_that_it_spoilt(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    noisy = finished(tmp_path / "noisy", "images", IMAGE_MS, aa_low=0.7, aa_high=1.3)
    assert "yes" in {pair.fits for pair in pair_towers(*runs, budget_ms=17).pairs}
    found = pair_towers(runs[0], noisy, budget_ms=17)
    for pair in found.pairs:
        within = "yes" if 1.3 * pair.latency_high_ms <= 17 else "undecided"
        assert pair.fits == ("no" if pair.latency_ms > 17 else within)
    tight = pair_towers(runs[0], noisy, budget_ms=1.2 * min(pair.latency_high_ms for pair in found.pairs))
    assert (tight.chosen, tight.unseen) == (None, None)
    assert "undecided" in {pair.fits for pair in tight.pairs}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_figures_that_no_measurement_gives(runs: tuple[Path, Path], value: float) -> None:
    path = runs[1] / "report.json"
    report = json.loads(path.read_text())
    report["members"][1]["files"][0]["measured_low"] = value
    path.write_text(json.dumps(report))
    with pytest.raises(CorruptArtifactError, match=r"report\.json"):
        pair_towers(*runs, budget_ms=17)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pair-towers", *(str(argument) for argument in arguments)])


def test_the_command_prints_what_the_function_gives(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    done = invoke(*runs, "--budget-ms", 17, "-o", file)
    assert done.exit_code == 0, done.stderr
    assert "take this" in done.stdout
    assert "chosen by one half of the images; on the other 6: " in done.stdout
    assert TowerPairs.load(file) == pair_towers(*runs, budget_ms=17)
    assert json.loads(invoke(*runs, "--budget-ms", 17, "--json").stdout)["budget_ms"] == 17
    assert invoke(*runs, "--budget-ms", 1).exit_code == 3
    undecided = invoke(*runs, "--budget-ms", 8.1)  # 0.5 + 7.5 = 8, up to 8.8
    assert (undecided.exit_code, "undecided: no pair" in undecided.stderr) == (4, True)
    assert invoke(*runs, "--budget-ms", -1).exit_code == 2


def test_runs_that_do_not_belong_together_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    text, image = runs
    with pytest.raises(UsageError, match=r"budget and calls above 0, found text_calls 0, image_calls nan"):
        pair_towers(text, image, 10, 0, float("nan"))
    with pytest.raises(UsageError, match=r"expected a run of sentence-similarity .* text tower first"):
        pair_towers(image, text, 10)
    with pytest.raises(CorruptArtifactError, match=r"finished run with report\.json"):
        pair_towers(tmp_path, image, 10)
    elsewhere = machine().model_copy(update={"cpu_model": "another"})
    other = finished(tmp_path / "elsewhere", "images", IMAGE_MS, machine=elsewhere)
    with pytest.raises(IncompatibleArtifactError, match="machine differ"):
        pair_towers(text, other, 10)
    other = finished(tmp_path / "threads", "images", IMAGE_MS, environment=Environment(threads=2))
    with pytest.raises(IncompatibleArtifactError, match="threads or huge pages of environment differ"):
        pair_towers(text, other, 10)
    other = finished(tmp_path / "earlier", "images", IMAGE_MS, retrieval=None)
    with pytest.raises(CorruptArtifactError, match=r"search of captions and images in .*found none; give"):
        pair_towers(text, other, 10)
    dense = image / "retrieval" / "dense.safetensors"
    numbers = {"pairs": np.array([(n, n) for n in range(COUNT)]), "drawn": np.arange(COUNT)}
    changed = {"texts": -vectors("texts", "dense"), "images": vectors("images", "dense"), **numbers}
    save_file(changed, dense)
    with pytest.raises(IncompatibleArtifactError, match=r"one checkpoint.*: texts by the dense tower differ"):
        pair_towers(text, image, 10)
    save_file({**changed, "texts": vectors("texts", "dense"), "drawn": np.arange(3)}, dense)
    with pytest.raises(IncompatibleArtifactError, match="captions and images differ"):
        pair_towers(text, image, 10)
    save_file({"queries": np.ones((2, 2)), "passages": np.ones((2, 2))}, dense)
    with pytest.raises(CorruptArtifactError, match=r"no drawn, images, pairs, texts; give data\.retrieval"):
        pair_towers(text, image, 10)
    dense.unlink()
    with pytest.raises(CorruptArtifactError, match=r"search of captions and images in .*found none"):
        pair_towers(text, image, 10)
