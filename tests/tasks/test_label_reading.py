"""One rule for labels: by name where names are known, the same in every format, and said where names do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.label_reading import read_labels

datasets = pytest.importorskip("datasets")
OF_GLUE = ["entailment", "neutral", "contradiction"]
TEXTS = ["a", "b", "c"] * 3


def head(*names: str) -> SimpleNamespace:
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


def write(path: Path, texts: list[str], labels: list[Any]) -> Path:
    """Rows in the format of the name, through the `datasets` library's own writers."""
    data = datasets.Dataset.from_dict({"text": texts, "label": labels})
    {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[path.suffix[1:]](path)
    return path


def numbers(path: Path, config: Any, task: str = "text-classification") -> tuple[list[Any], str | None]:
    rows = get_task(task).load_rows(DataConfig(evaluation=str(path)), "evaluation", 0)
    return [row["label"] for row in get_task(task).check_labels(rows, config)], get_task(task).label_note(rows, config)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", [int, str, float])
@pytest.mark.parametrize(
    ("labels", "names", "expected", "noted"),
    [
        ([1, 3, 5], ["1", "2", "3", "4", "5"], [0, 2, 4], True),
        ([0, 3, 4], ["1", "2", "3", "4", "5"], [0, 3, 4], False),
        ([0, 1, 2], ["0", "1", "2"], [0, 1, 2], False),
        ([0, 1, 2], ["no", "yes", "2"], [0, 1, 2], False),
        ([2, 0, 1], ["LABEL_0", "LABEL_1", "LABEL_2"], [2, 0, 1], False),
        ([1, 2, 10], ["001", "002", "010"], [0, 1, 2], True),
        ([1, 3, 4], ["1.0", "2.0", "3.0", "4.0", "5.0"], [0, 2, 3], True),
    ],
)
def test_numbers_mean_the_same_in_every_format(
    tmp_path: Path, suffix: str, kind: type, labels: list[int], names: list[str], expected: list[int], noted: bool
) -> None:
    path = write(tmp_path / f"a.{suffix}", TEXTS, [kind(label) for label in labels] * 3)
    found, note = numbers(path, head(*names))
    assert found == expected * 3
    assert (note is not None) is noted


def test_readings_that_differ_in_nothing_are_alike() -> None:
    plain, shifted = head("0", "1", "other"), head("1", "2", "3")
    assert not read_labels([0, 1], plain).is_unlike(read_labels([0, 1, 2], plain)), "every number means the same"
    assert read_labels([1, 2], shifted).is_unlike(read_labels([0, 1, 2], shifted))
    assert read_labels([0, 1, 2], shifted).is_unlike(read_labels([1, 2], shifted))
    assert not read_labels(["2", "3"], shifted).is_unlike(read_labels([1, 2], shifted))


def test_texts_are_the_names_that_they_are() -> None:
    reading = read_labels(["1", "01"], head("01", "1", "2"))
    assert [reading.number(label, 1) for label in ("1", "01")] == [1, 0], "two names spell one number"
    reading = read_labels([1, 2], head("01", "1", "2"))
    assert [reading.number(label, 1) for label in (1, 2)] == [1, 2], "a number of two names counts from 0"


@pytest.mark.parametrize("form", ["parquet", "folder"])
@pytest.mark.parametrize(
    "names",
    [["contradiction", "neutral", "entailment"], ["Contradiction", "NEUTRAL", " entailment"], ["x", "entailment", "y"]],
)
def test_classes_of_a_data_set_are_found_by_name(tmp_path: Path, form: str, names: list[str]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=OF_GLUE)})
    given = [0] * 9 if names[0] == "x" else [0, 1, 2] * 3
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": given}, features=features)
    path = tmp_path / ("a.parquet" if form == "parquet" else "saved")
    (data.to_parquet if form == "parquet" else data.save_to_disk)(str(path))
    found, note = numbers(path, head(*names))
    folded = [name.strip().lower() for name in names]
    assert found == [folded.index(OF_GLUE[label]) for label in given]
    assert note is None
    if names[0] == "x":
        rows = [{"label": NamedClass(2, tuple(OF_GLUE))}]
        with pytest.raises(DataError, match=r"one of x, entailment, y, found 'contradiction' in row 1"):
            get_task("text-classification").check_labels(rows, head(*names))


@pytest.mark.parametrize(
    ("names", "said"), [(["NEGATIVE", "POSITIVE"], "other names"), (["LABEL_0", "LABEL_1"], "no names")]
)
def test_names_that_do_not_fit_are_said(names: list[str], said: str) -> None:
    labels = [NamedClass(number, ("bad", "good")) for number in (1, 0, 1)]
    reading = read_labels(labels, head(*names))
    assert [reading.number(label, 1) for label in labels] == [1, 0, 1]
    assert reading.note is not None
    assert "bad, good" in reading.note
    assert said in reading.note
    with pytest.raises(DataError, match=r"found -1 in row 3.*test splits"):
        read_labels(labels, head("bad", "good")).number(NamedClass(-1, ("bad", "good")), 3)


def test_names_that_are_only_numbers_say_nothing() -> None:
    labels = [NamedClass(number, ("0", "1")) for number in (1, 0)]
    reading = read_labels(labels, head("no", "yes"))
    assert ([reading.number(label, 1) for label in labels], reading.note) == ([1, 0], None)


def test_tags_and_new_heads_take_the_names_of_the_data_set(tmp_path: Path) -> None:
    tags = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": [tags]})
    data = datasets.Dataset.from_dict({"tokens": [["a", "b"]] * 2, "ner_tags": [[1, 2], [0, 1]]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    found, note = numbers(tmp_path / "a.parquet", head("I-PER", "O", "B-PER"), "token-classification")
    assert (found, note) == ([[2, 0], [1, 2]], None)
    labels = [NamedClass(number, tuple(OF_GLUE)) for number in (2, 0)]
    settings = get_task("text-classification").head_settings([{"label": label} for label in labels])
    assert settings["id2label"] == dict(enumerate(OF_GLUE)), "all classes, in the data set's order"
    assert json.loads(json.dumps(settings["label2id"])) == {name: number for number, name in enumerate(OF_GLUE)}


def test_similar_names_are_not_guessed() -> None:
    reading = read_labels(["not_entailment"], head("entailment", "not entailment"))
    assert reading.number("not_entailment", 1) == 1
    with pytest.raises(DataError, match="found 'A' in row 4"):
        read_labels(["A"], head("a", "a ")).number("A", 4)
