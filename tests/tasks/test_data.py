"""Reading rows: every format gives the same rows, and every kind of bad file a message that helps."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.recipe import DataConfig, load_recipe
from ziplm_deploy.tasks import TASKS, get_task
from ziplm_deploy.tasks.data import read_rows, sample_rows

ROWS = [{"sentence": 'unbalanced " quote, comma', "label": 1}, {"sentence": "größer\nline two", "label": 0}] * 6


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the name tells."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as stream:
        if name.endswith((".csv", ".tsv")):
            delimiter = "," if name.endswith(".csv") else "\t"
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".json"):
            json.dump(rows, stream)
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    rows = read_rows(str(path), split="train")
    assert [row["sentence"] for row in rows] == [row["sentence"] for row in ROWS]
    assert [int(row["label"]) for row in rows] == [row["label"] for row in ROWS]
    assert list(tmp_path.iterdir()) == [path], "reading a file leaves nothing behind"


def test_plain_text_gives_a_row_a_line_without_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b" one \n\n \ntwo\n", mtime=0))
    assert read_rows(str(path), split="train") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2.*truncated"),
        ("a.jsonl", b'{"text": "a"}\n17\n', "JSON object in line .* 2 .*found int"),
        ("a.json", b'[{"text": "a"},', "expected a JSON array"),
        ("a.jsonl", b"", "empty data set"),
        ("a.csv", b"text,label\n", "empty data set"),
        ("a.csv", b"text,label\na,b,1\n", "header .* line 2"),
        ("a.csv", b'text,label\n"a" b,1\n', "line 2"),
        ("a.jsonl", b'{"text": "\xff"}', "readable .jsonl file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "readable .jsonl file"),
        ("a.jsonl.gz", b"not gzip", "readable .jsonl file"),
        ("a.parquet", b"PAR1 not parquet", "readable .parquet file"),
        ("a.xlsx", b"PK", r"type \.csv, .*found a.xlsx"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_rows(str(tmp_path / name), split="train")
    assert name in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/file", "data/deep/missing"])
def test_a_missing_file_is_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"expected a data file at .* found none"):
        read_rows(source, split="train")


def test_a_name_that_is_no_file_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("glue", split="train", config_name="sst2") == ROWS
    assert asked == [(("glue", "sst2"), {"split": "train"})]


def test_an_unreachable_data_set_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'no-such-set' .* split 'dev'.*ConnectionError: offline"):
        read_rows("no-such-set", split="dev")


@pytest.mark.parametrize("shuffle", [False, True])
def test_sampling_is_seeded_and_draws_each_row_once(shuffle: bool) -> None:
    rows = [{"n": number} for number in range(50)]

    def draw(count: int | None, seed: int) -> list[int]:
        return [row["n"] for row in sample_rows(rows, count, seed, field="n_calibration", shuffle=shuffle)]

    assert draw(20, 3) == draw(20, 3) != draw(20, 4)
    assert len(set(draw(20, 3))) == 20
    assert sorted(draw(None, 0)) == list(range(50))
    assert (draw(None, 0) == sorted(draw(None, 0))) is not shuffle


def test_too_few_rows_are_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    for asked, found in ((None, 12), (10, 10)):  # nobody who named no number is refused for it
        few = DataConfig(calibration=str(path), n_calibration=asked)
        assert len(get_task("text-classification").load_rows(few, "calibration", 0)) == found
    config = DataConfig(calibration=str(path), n_calibration=13)
    with pytest.raises(DataError, match=r"at least 13 examples for data.n_calibration, found 12"):
        get_task("text-classification").load_rows(config, "calibration", 0)


def test_missing_columns_list_those_found(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"review": "x", "stars": 1}])
    config = DataConfig(calibration=str(path), evaluation=str(path), n_calibration=8)
    with pytest.raises(DataError, match=r"a.jsonl: .*'sentence1' \+ 'sentence2'.*'review', 'stars'.*data.text_columns"):
        get_task("text-classification").load_rows(config, "calibration", 0)
    named = config.model_copy(update={"text_columns": ("review",)})
    with pytest.raises(DataError, match=r"the label in .*'label'.*found columns 'review', 'stars'.*data.label_column"):
        get_task("text-classification").load_rows(named, "evaluation", 0)
    rows = get_task("text-classification").load_rows(
        named.model_copy(update={"label_column": "stars"}), "evaluation", 0
    )
    assert rows == [{"text": "x", "label": 1}]


@pytest.mark.parametrize("bad", [{"sentence": None, "label": 1}, {"sentence": 4, "label": 1}, {"label": 1}])
def test_a_bad_row_is_named_by_its_number(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, bad])
    with pytest.raises(DataError, match="row 13"):
        get_task("text-classification").load_rows(DataConfig(evaluation=str(path)), "evaluation", 0)


def test_nothing_configured_is_an_error() -> None:
    with pytest.raises(DataError, match=r"expected data.calibration in the recipe, found none"):
        get_task("fill-mask").load_rows(DataConfig(), "calibration", 0)


def test_training_rows_have_their_own_source_or_that_of_calibration(tmp_path: Path) -> None:
    texts = [{"text": f"text {number}", "label": number % 2} for number in range(20)]
    train, calibration = (
        str(write_rows(tmp_path / name, part)) for name, part in (("t.jsonl", texts[:12]), ("c.jsonl", texts[12:]))
    )
    task = get_task("text-classification")
    config = DataConfig(calibration=calibration, train=train, n_calibration=8)

    def drawn(config: DataConfig, seed: int = 0) -> list[str]:
        return [row["text"] for row in task.load_rows(config, "train", seed)]

    everything = [row["text"] for row in texts]
    assert sorted(drawn(config)) == sorted(everything[:12])
    assert drawn(config) == drawn(config) != drawn(config, 1) != sorted(drawn(config, 1))
    assert sorted(drawn(config.model_copy(update={"train": None}))) == sorted(everything[12:])
    assert len(drawn(config.model_copy(update={"n_train": 5}))) == 5
    with pytest.raises(DataError, match=r"at least 13 examples for data.n_train, found 12"):
        drawn(config.model_copy(update={"n_train": 13}))
    with pytest.raises(DataError, match=r"expected data.train or data.calibration in the recipe, found none"):
        drawn(DataConfig())


def test_the_train_split_is_asked_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    splits: list[str] = []

    def load(*_: Any, split: str) -> list[dict[str, Any]]:
        splits.append(split)
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    both = DataConfig(calibration="glue", calibration_split="c", train="glue", train_split="t", config_name="sst2")
    for config in (both, both.model_copy(update={"train": None})):
        get_task("text-classification").load_rows(config, "train", 0)
    assert splits == ["t", "c"]


@pytest.mark.parametrize("name", ["text-classification", "text-regression", "token-classification"])
def test_training_rows_need_no_labels(name: str) -> None:
    raw = [{"tokens": ["a"]}] if name == "token-classification" else [{"text": "a"}]
    (row,) = get_task(name).normalize_rows(raw, DataConfig(), "train")
    assert "label" not in row


def test_training_sentences_come_from_pairs_once_each() -> None:
    raw = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "b", "sentence2": " ", "label": 0}]
    rows = get_task("sentence-similarity").normalize_rows(raw, DataConfig(), "train")
    assert rows == [{"text": "a"}, {"text": "b"}]


def test_an_unknown_task_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"sentence-similarity.*found 'translation'"):
        get_task("translation")
    assert [get_task(name).name for name in TASKS] == list(TASKS)


def test_quickstart_recipe_and_its_data() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "benchmarks" / "quickstart.yaml")
    task = get_task(recipe.model)
    everything = recipe.data.model_copy(update={"n_calibration": 1500})
    calibration = task.load_rows(everything, "calibration", recipe.seed)
    evaluation = task.load_rows(recipe.data, "evaluation", recipe.seed)
    assert len(calibration) == 1500
    assert len(evaluation) == 1500
    held_out = {row[key].strip().casefold() for row in evaluation for key in ("text", "text_pair")}
    assert not held_out & {row["text"].strip().casefold() for row in calibration}
    assert all(0 <= row["label"] <= 5 for row in evaluation)
    assert recipe.speedups == (1.5, 2.0, 3.0)


def test_a_revision_pins_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[dict[str, Any]] = []

    def load(*_: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append(options)
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    get_task("text-classification").load_rows(DataConfig(evaluation="glue", revision="abc"), "evaluation", 0)
    assert asked == [{"split": "validation", "revision": "abc"}]


def test_the_images_that_a_table_names_count(tmp_path: Path) -> None:
    task = get_task("image-classification")
    table = tmp_path / "a.csv"
    table.write_text("image,label\na.png,0\nb.png,1\n")

    def hashed() -> str:
        return task.linked_files_hash(str(table), DataConfig())

    missing = hashed()
    (tmp_path / "a.png").write_bytes(b"one")
    one = hashed()
    (tmp_path / "a.png").write_bytes(b"two")
    two = hashed()
    assert hashed() == two
    (tmp_path / "b.png").write_bytes(b"x" * 100_000)
    large = hashed()
    (tmp_path / "b.png").write_bytes(b"x" * 100_001)
    assert len({missing, one, two, large, hashed()}) == 5
    assert get_task("text-classification").linked_files_hash(str(table), DataConfig()) == ""
    nested = tmp_path / "a.jsonl"
    nested.write_text('{"image": {"bytes": null, "path": "a.png"}, "label": 0}\n')
    assert task.linked_files_hash(str(nested), DataConfig()) not in ("", one, two)
    table.write_text("broken\n1,2\n")
    assert hashed() == "", "what is wrong with a file is said when it is read"


@pytest.mark.parametrize(("named", "counts"), [(True, True), (False, False)])
def test_images_that_parquet_names_count_and_those_that_it_holds_do_not(
    named: bool, counts: bool, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    image = "a.png" if named else {"bytes": b"one", "path": "a.png"}
    parquet.write_table(pytest.importorskip("pyarrow").table({"image": [image], "label": [0]}), tmp_path / "a.parquet")
    found = []
    for content in (b"one", b"two"):
        (tmp_path / "a.png").write_bytes(content)
        found.append(get_task("image-classification").linked_files_hash(str(tmp_path / "a.parquet"), DataConfig()))
    assert (found[0] != found[1]) == counts
