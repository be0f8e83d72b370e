"""Files as people have them: tables with and without quoting, printed lists, SQuAD's own JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.data import read_rows
from ziplm_deploy.tasks.nested import parse_nested

datasets = pytest.importorskip("datasets")
LONE = ['"a lone one', "none", 'inside "two" of them', '"both ends"', 'at the end"', '"again']


def test_quotes_mean_nothing_in_a_tsv_of_glue(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{n}\n" for n, text in enumerate(LONE * 3)))
    assert [row["sentence"] for row in read_rows(str(path), split="train")] == LONE * 3


@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_of_a_csv_writer_is_unquoted(tmp_path: Path, style: Any, end: str) -> None:
    path, texts = tmp_path / "a.tsv", ['say "hi"', "two\nlines", '"all"', "plain"]
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t", quoting=style, lineterminator=end).writerows(
            [["text", "n"], *([t, "1"] for t in texts)]
        )
    assert [row["text"] for row in read_rows(str(path), split="train")] == texts


def test_a_tsv_of_a_spreadsheet_is_unquoted(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.tsv", ['say "hi", all', "one, two", "plain"]
    path.write_text('text\tlabel\r\n"say ""hi"", all"\t0\r\n"one, two"\t1\r\nplain\t0\r\n')
    assert [row["text"] for row in read_rows(str(path), split="train")] == texts
    path.write_text('text\tlabel\n"one, two"\t1\none, two\t0\n')
    assert [row["text"] for row in read_rows(str(path), split="train")] == ['"one, two"', "one, two"], (
        "no writer quotes so"
    )


def test_a_broken_tsv_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tn\n"one\t1\ntwo" \t2\t3\n')
    with pytest.raises(DataError, match=r"2 fields .* found 3 in line 3; .*JSON lines"):
        read_rows(str(path), split="train")


# nested columns

ANSWERS = [
    {"text": ['it\'s "quoted"', "b\nc"], "answer_start": [0, 2]},
    {"text": ["d"], "answer_start": [5]},
    {"text": [], "answer_start": []},
]


def test_nested_columns_survive_to_csv(tmp_path: Path) -> None:
    data = {"answers": ANSWERS, "words": [["the", "cat's"], ["a"], []], "tags": [[0, 1], [-2], []]}
    datasets.Dataset.from_dict(data).to_csv(tmp_path / "a.csv")
    rows = read_rows(str(tmp_path / "a.csv"), split="train")
    assert [parse_nested(row["answers"], "answers", 1) for row in rows] == ANSWERS
    assert [parse_nested(row["words"], "words", 1) for row in rows] == data["words"]
    assert [parse_nested(row["tags"], "tags", 1) for row in rows] == data["tags"]


@pytest.mark.parametrize(
    "text",
    ["['a', ...]", "[" * 5000, "{'text': array([a])}", "[__import__('os')]", "['a' + 'b']", "[1 -1]", "['a", "{**{}}"],
)
def test_what_is_no_list_is_named_with_the_formats_that_keep_it(text: str) -> None:
    with pytest.raises(DataError, match=r"column 'answers', found .* in row 7: .*JSON lines .*Parquet"):
        parse_nested(text, "answers", 7)


def test_answers_of_a_csv_file_are_the_answers(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "a dog ran"]
    answers = [{"text": ["cat", "the cat"], "answer_start": [4, 0]}, {"text": ["dog"], "answer_start": [2]}]
    rows = {"question": ["who ?"] * 2, "context": texts, "answers": answers}
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "a.csv")
    data = DataConfig(evaluation=str(tmp_path / "a.csv"), train=str(tmp_path / "a.csv"))
    task = get_task("question-answering")
    assert [row["answers"] for row in task.load_rows(data, "evaluation", 0)] == [["cat", "the cat"], ["dog"]]
    assert sorted(row["answer_start"] for row in task.load_rows(data, "train", 0)) == [2, 4]
    lists = {**rows, "answers": [["cat", "the cat"], ["dog"]]}
    datasets.Dataset.from_dict(lists).to_csv(tmp_path / "a.csv")
    assert [row["answers"] for row in task.load_rows(data, "evaluation", 0)] == [["cat", "the cat"], ["dog"]]
    for text in ("[x]", "[1]"):
        (tmp_path / "a.csv").write_text(f"question,context,answers\nwho ?,{text} a,{text}\n")
        assert task.load_rows(data, "evaluation", 0)[0]["answers"] == [text], "a text in brackets is a text"
    (tmp_path / "a.csv").write_text("question,context,answers\nwho ?,{x} a,{x}\n")
    assert task.load_rows(data, "evaluation", 0)[0]["answers"] == ["{x}"], "a text in braces is a text"
    (tmp_path / "a.csv").write_text("question,context,answers\nwho ?,a,\"{'text': array(['a', ...])}\"\n")
    with pytest.raises(DataError, match=r"column 'answers'.*row 1.*JSON lines"):
        task.load_rows(data, "evaluation", 0)


def test_words_and_tags_of_a_csv_file(tmp_path: Path) -> None:
    rows = {"tokens": [["the", "cat"], ["dog"]], "ner_tags": [[0, 1], [1]]}
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "a.csv")
    loaded = get_task("token-classification").load_rows(DataConfig(evaluation=str(tmp_path / "a.csv")), "evaluation", 0)
    assert loaded == [{"words": ["the", "cat"], "label": [0, 1]}, {"words": ["dog"], "label": [1]}]


# Parquet and JSON


def test_metadata_of_another_form_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = json.dumps({"info": {"features": {"a": {"names": 3, "_type": "ClassLabel"}}}})
    table = pa.Table.from_pylist([{"a": 1}]).replace_schema_metadata({"huggingface": info})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"readable \.parquet file .*metadata"):
        read_rows(str(tmp_path / "a.parquet"), split="train")


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_as_it_is_published(tmp_path: Path, indent: int | None) -> None:
    question = {"id": "1", "question": "who ?", "answers": [{"text": "cat", "answer_start": 4}]}
    article = {"title": "T", "paragraphs": [{"context": "the cat sat", "qas": [question, {**question, "id": "2"}]}]}
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"version": "1.1", "data": [article]}, indent=indent))
    rows = get_task("question-answering").load_rows(DataConfig(evaluation=str(path)), "evaluation", 0)
    assert rows == [{"question": "who ?", "context": "the cat sat", "answers": ["cat"]}] * 2
    del question["question"]
    path.write_text(json.dumps({"version": "1.1", "data": [article]}, indent=indent))
    with pytest.raises(DataError, match=r"SQuAD's JSON .* without 'question'"):
        read_rows(str(path), split="train")


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_inside_an_object(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, indent=indent))
    assert read_rows(str(path), split="train") == [{"text": "a"}, {"text": "b"}]
    path.write_text(json.dumps({"text": {"0": "a"}, "label": {"0": 1}}, indent=1))
    with pytest.raises(DataError, match=r"expected rows .* found one object with 'text', 'label'"):
        read_rows(str(path), split="train")


def test_one_line_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n')
    assert read_rows(str(path), split="train") == [{"text": "a", "label": 1}]
