"""The accuracy budget: the search ends, the chosen file is the one that was judged, and nothing else is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziplm_deploy.compression.int8.budget import Spared, spare_linears, within_budget
from ziplm_deploy.compression.int8.sensitivity import SensitivityRow
from ziplm_deploy.errors import NumericalError, UsageError
from ziplm_deploy.recipe import Int8Config

CONFIG = Int8Config(method="static")


def rows(count: int) -> list[SensitivityRow]:
    return [SensitivityRow(f"linear {index}", 1.0 / (index + 1), 1.0, 1.0) for index in range(count)]


def test_the_list_grows_until_the_budget_holds() -> None:
    asked: list[Spared] = []

    def evaluate(spared: Spared) -> float:
        asked.append(spared)
        return 0.9 if "linear 2" in spared.names else 0.8

    choice = spare_linears(rows(20), evaluate, 0.905, CONFIG)
    assert [len(spared.names) for spared in asked] == [0, 1, 2, 4]
    assert {spared.form for spared in asked} == {"float32"}
    assert choice.spared.names == ("linear 0", "linear 1", "linear 2", "linear 3")
    assert choice.within_budget
    assert choice.tried == ((0, 0.8), (1, 0.8), (2, 0.8), (4, 0.9))


def test_linears_become_weight_only_before_they_stay_in_float32() -> None:
    config = CONFIG.model_copy(update={"method": "dynamic", "fallback": "weight-only-8", "max_fp32_share": 0.25})
    asked: list[tuple[int, str]] = []

    def needing(form: str, count: int) -> Callable[[Spared], float]:
        def evaluate(spared: Spared) -> float:
            asked.append((len(spared.names), spared.form))
            return 0.9 if spared.form == form and len(spared.names) >= count else 0.1 + len(spared.names) / 100

        return evaluate

    enough = spare_linears(rows(20), needing("weight-only-8", 2), 0.9, config)
    assert asked == [(0, "float32"), (1, "weight-only-8"), (2, "weight-only-8")]
    assert enough.spared == Spared(("linear 0", "linear 1"), "weight-only-8")
    asked.clear()
    not_enough = spare_linears(rows(20), needing("float32", 5), 0.9, config)
    assert asked[-2:] == [(5, "weight-only-8"), (5, "float32")]
    assert (not_enough.spared.form, not_enough.within_budget) == ("float32", True)
    never = spare_linears(rows(20), needing("float32", 6), 0.9, config)
    assert (never.spared.form, len(never.spared.names), never.within_budget) == ("weight-only-8", 5, False)


def test_nothing_stays_in_float32_if_nothing_is_lost() -> None:
    choice = spare_linears(rows(20), lambda _: 0.95, 0.9, CONFIG)
    assert (choice.spared.names, choice.score, choice.within_budget) == ((), 0.95, True)


def test_a_budget_that_cannot_be_held_is_said() -> None:
    scores = {0: 0.1, 1: 0.3, 2: 0.3, 4: 0.2, 5: 0.25}
    choice = spare_linears(rows(10), lambda spared: scores[len(spared.names)], 0.9, CONFIG)
    assert not choice.within_budget
    assert choice.tried == tuple(scores.items())
    assert choice.spared.names == ("linear 0",)  # the best, with the fewest
    assert choice.score == 0.3


@given(
    count=st.integers(1, 80),
    share=st.floats(0, 1),
    reference=st.floats(-1, 1),
    score=st.floats(-2, 2),
    max_loss=st.floats(0, 0.5),
)
@settings(deadline=None)
def test_the_search_ends_within_the_share(
    count: int, share: float, reference: float, score: float, max_loss: float
) -> None:
    config = Int8Config(max_fp32_share=share, max_loss=max_loss)
    choice = spare_linears(rows(count), lambda _: score, reference, config)
    numbers = [number for number, _ in choice.tried]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert numbers[-1] <= min(share * count, count - 1)  # one is left to quantize
    assert choice.within_budget == (reference - score <= max_loss * abs(reference))
    assert choice.within_budget or numbers[-1] == min(int(share * count), count - 1)


def test_scores_that_are_not_finite_and_empty_listings_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"with 0 linear\(s\) in float32, found nan"):
        spare_linears(rows(3), lambda _: float("nan"), 0.9, CONFIG)
    with pytest.raises(NumericalError, match="before INT8, found inf"):
        spare_linears(rows(3), lambda _: 0.9, float("inf"), CONFIG)
    with pytest.raises(UsageError, match="expected linears to choose from"):
        spare_linears([], lambda _: 0.9, 0.9, CONFIG)


def write_names(spared: Spared, path: Path) -> None:
    path.write_text("\n".join(spared.names))


def test_the_file_is_the_candidate_that_was_chosen(tmp_path: Path) -> None:
    judged: list[str] = []

    def judge(path: Path) -> float:
        judged.append(path.read_text())
        return 0.9 if "linear 1" in judged[-1] else 0.5

    target = tmp_path / "model.onnx"
    target.write_text("an older file")
    choice = within_budget(target, write_names, judge, rows(20), 0.9, CONFIG)
    assert judged == ["", "linear 0", "linear 0\nlinear 1"]
    assert (choice.spared.names, choice.score, choice.within_budget) == (("linear 0", "linear 1"), 0.9, True)
    assert target.read_text() == judged[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_best_file_is_kept_if_none_holds_the_budget(tmp_path: Path) -> None:
    scores = {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.3}
    target = tmp_path / "model.onnx"
    choice = within_budget(
        target, write_names, lambda path: scores[len(path.read_text().splitlines())], rows(6), 0.9, CONFIG
    )
    assert choice.tried == tuple(scores.items())
    assert not choice.within_budget
    assert target.read_text() == "linear 0"


def test_a_judge_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("an older file")
    with pytest.raises(NumericalError, match="found nan"):
        within_budget(target, write_names, lambda _: float("nan"), rows(3), 0.9, CONFIG)
    assert target.read_text() == "an older file"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
