"""JSON and YAML from anywhere: plain data within limits, or one kind of error; a message repeats little of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziplm_deploy.documents import MAX_SHOWN, parse_json, read_json, read_yaml, shortened, shown


def written(folder: Path, text: str) -> Path:
    path = folder / "document"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("opening", ["[", '{"a":', "[{"])
def test_deep_nesting_is_an_ordinary_error(tmp_path: Path, opening: str) -> None:
    path = written(tmp_path, opening * 40_000)
    for read in (read_json, read_yaml):
        with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
            read(path)


def test_files_beyond_their_limit_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 256 KiB"):
        read_yaml(written(tmp_path, "a" * (257 << 10)))
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: takes no room on the disk, and would take a terabyte of memory
    with pytest.raises(ValueError, match="more than 65536 KiB"):
        read_json(path)


def test_aliases_are_refused_and_dates_stay_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the alias \*a"):
        read_yaml(written(tmp_path, "a: &a [1, 2]\nb: *a\n"))
    assert read_yaml(written(tmp_path, "name: 2020-13-45\nfrom: 2024-05-01\n")) == {
        "name": "2020-13-45",
        "from": "2024-05-01",
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: !!int xx",
        "a: !!timestamp x",
        "a: !!binary x",
        "a: !!bool maybe",
        "a: " + "1" * 6000,
        "? [1]\n: 2",
        "a: !x 1",
    ],
)
def test_odd_tags_and_numbers_are_ordinary_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the texts are PyYAML's)
        read_yaml(written(tmp_path, text))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[-1e999]"])
def test_numbers_that_are_no_json_are_refused_where_they_must_be_finite(text: str) -> None:
    parse_json(text)
    with pytest.raises(ValueError, match=r"no JSON number|too large"):
        parse_json(text, finite=True)
    assert parse_json("[1.5, -2e3, 7]", finite=True) == [1.5, -2000.0, 7]


def test_values_are_shown_short() -> None:
    for value in ("x" * 10**6, list(range(10**5)), {"a" * 999: ["b" * 999] * 9}, 1 << 60_000, [[[[[[]]]]]]):
        assert len(shown(value)) <= MAX_SHOWN
    assert shown("2x") == "'2x'"


def test_texts_are_shortened_in_the_middle() -> None:
    assert shortened("abcdefghij", 9) == "abc...hij"
    assert shortened("abcdefghij", 10) == "abcdefghij"
