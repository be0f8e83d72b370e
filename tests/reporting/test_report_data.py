"""What the report shows of the data: lengths of the texts, and scores class by class."""

from __future__ import annotations

from tests.helpers.reports import family_report, file, member
from ziplm_deploy.recipe import Variant
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import MemberReport
from ziplm_deploy.reporting.scores import MAX_LABELS
from ziplm_deploy.tasks.lengths import TokenLengths


def test_lengths_of_the_texts_are_shown() -> None:
    lengths = TokenLengths.of([5] * 19 + [40], 32, "k", are_cut=True)
    text = family_markdown(family_report(lengths={"evaluation": lengths}))
    assert "| evaluation | 20 | 5 | 5 | 40 | 32 | 1 |" in text
    assert "## Lengths of the texts" not in family_markdown(family_report())


def with_labels(name: str, by_label: dict[str, float]) -> MemberReport:
    return member(name).model_copy(update={"served": file(Variant.FP32, by_label=by_label)})


def test_classes_that_lose_most_stand_first() -> None:
    dense = with_labels("dense", {"a": 0.9, "b": 0.8, "c": 0.7})
    text = family_markdown(family_report(dense, with_labels("2x", {"a": 0.89, "b": 0.5})))
    table = text.split("## Scores by class")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == ["| c | 0.7000 | 0.0000 |", "| b | 0.8000 | 0.5000 |", "| a | 0.9000 | 0.8900 |"]
    assert "lose most." not in table
    assert "## Scores by class" not in family_markdown(family_report())


def test_of_many_classes_the_worst_are_shown() -> None:
    scores = {f"class {number}": 0.9 for number in range(MAX_LABELS + 5)}
    text = family_markdown(family_report(with_labels("dense", scores), with_labels("2x", {**scores, "class 7": 0.1})))
    table = text.split("## Scores by class")[1].split("##")[0]
    assert f"The {MAX_LABELS} of {MAX_LABELS + 5} classes that lose most." in table
    assert table.index("class 7") < table.index("class 0")
    assert table.count("| class ") == MAX_LABELS + 1


def test_members_pruned_in_order_say_how_much_that_changed() -> None:
    text = family_markdown(family_report(member("dense"), member("2x", exchanged_fraction=0.125)))
    assert "## Pruned in order" in text
    assert "| 2x | 12.5% |" in text
    assert "## Pruned in order" not in family_markdown(family_report())
