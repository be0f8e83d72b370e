"""Histograms of lengths: what is accepted, the calls that stand for them, and what wrong ones are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe import Call, Environment, Recipe, Workload, load_recipe, parse_recipe
from ziplm_deploy.recipe import lengths as recipe_lengths
from ziplm_deploy.recipe.lengths import MAX_CALLS, of_lengths, read_histogram, representative

MIN_RECIPE: dict[str, Any] = {"name": "demo", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}


def with_lengths(lengths: Any, **changes: Any) -> Recipe:
    return parse_recipe({**MIN_RECIPE, "environment": {"workload": {"lengths": lengths}}, **changes})


def mean_of(histogram: dict[int, float]) -> float:
    return sum(tokens * weight for tokens, weight in histogram.items()) / sum(histogram.values())


def test_calls_have_the_shares_of_their_lengths() -> None:
    workload = Workload(batch_size=2, lengths={64: 1, 16: 3})
    assert workload.calls == (Call(2, 16, 0.75), Call(2, 64, 0.25))
    assert (workload.seq_len, workload.has_several) == (64, True)
    assert workload.describe() == "batch 2, 16 to 64 tokens (2 lengths, 28.0 on average)"


def test_one_call_is_what_it_was() -> None:
    assert Workload().calls == (Call(1, 128, 1.0),)
    assert Workload(seq_len=32).model_dump(mode="json") == {"batch_size": 1, "seq_len": 32}
    alone = Workload(lengths={32: 5})
    assert (alone.calls, alone.has_several) == ((Call(1, 32, 1.0),), False)
    assert alone.fingerprint == Workload(seq_len=32).fingerprint


def test_a_copy_with_another_length_has_another_call() -> None:
    workload = Workload()
    assert workload.calls[0].seq_len == 128
    assert workload.model_copy(update={"seq_len": 9}).calls == (Call(1, 9, 1.0),)


def test_keys_go_by_shares_and_not_by_counts() -> None:
    few, many, others = (Environment(workload=Workload(lengths={8: a, 64: b})) for a, b in ((1, 2), (100, 200), (2, 1)))
    assert few.fingerprint == many.fingerprint != others.fingerprint
    assert few.fingerprint != Environment(workload=Workload(seq_len=64)).fingerprint


@pytest.mark.parametrize("lengths", [{8: 1, 64: 0.5}, dict.fromkeys(range(5, 90), 1.5)])
def test_a_recipe_with_lengths_survives_its_own_dump(lengths: dict[int, float]) -> None:
    recipe = with_lengths(lengths)
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert again == recipe
    assert again.environment.workload.calls == recipe.environment.workload.calls


histograms = st.dictionaries(st.integers(1, 600), st.floats(0.01, 1000.0), min_size=1, max_size=60)


@given(histograms)
def test_few_lengths_keep_the_weight_the_mean_and_the_longest(histogram: dict[int, float]) -> None:
    found = representative(histogram)
    lifted = {tokens: 0.0 for tokens in {max(tokens, 4) for tokens in histogram}}
    for tokens, weight in histogram.items():
        lifted[max(tokens, 4)] += weight
    assert list(found) == sorted(found)
    assert len(found) == min(MAX_CALLS, len(lifted))
    assert sum(found.values()) == pytest.approx(sum(histogram.values()))
    assert max(found) == max(lifted)
    assert found[max(found)] == pytest.approx(lifted[max(lifted)])
    assert mean_of(found) == pytest.approx(mean_of(lifted), abs=0.5)
    assert representative(found) == found


def test_bins_are_those_of_the_smallest_spread() -> None:
    """Against every way to cut ten lengths into two bins; the eleventh, the longest, stays alone."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        tokens = np.sort(generator.choice(np.arange(4, 200), 11, replace=False))
        weights = generator.uniform(0.1, 5.0, 11)
        found = representative(dict(zip(tokens.tolist(), weights.tolist(), strict=True)), max_calls=3)

        def spread(start: int, stop: int, tokens: Any = tokens, weights: Any = weights) -> float:
            mean = np.average(tokens[start:stop], weights=weights[start:stop])
            return float((weights[start:stop] * (tokens[start:stop] - mean) ** 2).sum())

        cut = min(range(1, 10), key=lambda edge: spread(0, edge) + spread(edge, 10))
        assert list(found.values()) == pytest.approx([weights[:cut].sum(), weights[cut:10].sum(), weights[10]])
        means = [np.average(tokens[part], weights=weights[part]) for part in (slice(0, cut), slice(cut, 10))]
        assert list(found)[:2] == pytest.approx(means, abs=1.0)


def test_a_long_tail_keeps_its_mean_to_a_tenth_of_a_token() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(3.2, 0.8, 5000).astype(int), 4, 512)
    found = representative(of_lengths(lengths.tolist()))
    assert len(found) == 8
    assert mean_of(found) == pytest.approx(lengths.mean(), abs=0.1)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '{"16": 3, "64": 0.5}', {16: 3.0, 64: 0.5}),
        ("a.json", "[16, 64, 16]", {16: 2.0, 64: 1.0}),
        ("a.csv", "tokens,count\n16,3\n64,1\n16,1\n", {16: 4.0, 64: 1.0}),
        ("a.csv", "16\n64\n16\n", {16: 2.0, 64: 1.0}),
        ("a.csv", "length\n16\n", {16: 1.0}),
        ("a.txt", "16\n\n 64 \n16\n", {16: 2.0, 64: 1.0}),
        ("a.txt", "\ufeff16\n17\n", {16: 1.0, 17: 1.0}),
        ("a.json", '{"16": 0, "64": 1}', {64: 1.0}),
        ("a.txt", "two cats\n16\n", None),
        ("a.jsonl", '{"text": "two cats"}\n', None),
    ],
)
def test_files_of_lengths(tmp_path: Path, name: str, content: str, expected: dict[int, float] | None) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_histogram(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '{"0": 1}', "from 1 to 8192 tokens, found '0'"),
        ("a.json", "[-4]", "from 1 to 8192 tokens, found -4"),
        ("a.json", '{"16": -1}', "weights of 0 or more, found -1 for '16' tokens"),
        ("a.json", '{"16": "many"}', "weights of 0 or more, found 'many'"),
        ("a.json", '{"16": true}', "weights of 0 or more, found True"),
        ("a.json", '{"16": NaN}', "weights of 0 or more, found nan"),
        ("a.json", '{"16": 0, "32": 0}', "a sum above 0, found 0.0"),
        ("a.json", '{"16": 1e308, "32": 1e308}', "a sum above 0, found inf"),
        ("a.json", '["long"]', "whole numbers of tokens, found 'long'"),
        ("a.json", "[16.5]", "whole numbers of tokens, found 16.5"),
        ("a.json", "[9000]", "from 1 to 8192 tokens, found 9000"),
        ("a.json", "[[16]]", "whole numbers of tokens"),
        ("a.json", "[]", "lengths of requests in tokens, found none"),
        ("a.json", "{}", "lengths of requests in tokens, found none"),
        ("a.json", '"16"', "a list of lengths or"),
        ("a.json", "", r"a\.json: "),
        ("a.json", "{", r"a\.json: "),
        ("a.csv", "", "lengths of requests in tokens, found none"),
        ("a.csv", "tokens,count\n", "lengths of requests in tokens, found none"),
        ("a.csv", "text\na long story\n", "whole numbers of tokens, found 'a long story'"),
        ("a.csv", "16,1,2\n", "one column of lengths, or two"),
        ("a.csv", "16,1\n17\n", "one column of lengths, or two"),
        ("a.txt", "", "lengths of requests in tokens, found none"),
        ("a.txt", "\n\n", "lengths of requests in tokens, found none"),
        ("a.txt", "16\ntwo cats\n", "in every line, as in the first, found 'two cats' in line 2"),
        ("a.parquet", "", "a file of type .csv, .json, .txt"),
    ],
)
def test_wrong_files_are_told_what_is_wrong(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"environment\.workload: .*{told}"):
        with_lengths(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, Path("x" * 500)):
        with pytest.raises(RecipeError, match=r"a file of lengths or texts at .*, found none; check the path"):
            with_lengths(str(path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"a\.txt: .*utf-8"):
        with_lengths(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("lengths", [5, True, [16], 1.5])
def test_lengths_are_a_mapping_or_a_path(lengths: Any) -> None:
    with pytest.raises(RecipeError, match=r"lengths as \{tokens: weight, …\} or the path of a file, found"):
        with_lengths(lengths)


def test_a_length_and_lengths_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("two cats\n", encoding="utf-8")
    for lengths in ({16: 1, 64: 1}, str(tmp_path / "a.txt")):
        workload = {"seq_len": 128, "lengths": lengths}
        with pytest.raises(RecipeError, match="seq_len or lengths, found both"):
            parse_recipe({**MIN_RECIPE, "environment": {"workload": workload}})


def test_static_files_have_one_length() -> None:
    static = {"export": {"shapes": "static"}}
    with pytest.raises(
        RecipeError, match=r"static shapes fill every request up to one length.*export\.shapes: dynamic"
    ):
        with_lengths({16: 1, 64: 1}, **static)
    assert with_lengths({16: 1}, **static).environment.workload.seq_len == 16


def test_images_have_no_lengths() -> None:
    model = {"model": {"path": "m", "task": "image-classification"}}
    with pytest.raises(RecipeError, match=r"images have no lengths: leave out environment\.workload\.lengths"):
        with_lengths({16: 1}, **model)


def test_paths_are_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "lengths.json").write_text(json.dumps({"16": 1, "64": 3}), encoding="utf-8")
    (tmp_path / "texts.txt").write_text("two cats\n", encoding="utf-8")
    for name in ("lengths.json", "texts.txt"):
        path = tmp_path / "r.yaml"
        path.write_text(
            "name: demo\nmodel: {path: m, task: fill-mask}\nspeedups: [2]\n"
            f"environment: {{workload: {{lengths: {name}}}}}\n",
            encoding="utf-8",
        )
        workload = load_recipe(path).environment.workload
        if name == "lengths.json":
            assert workload.lengths == {16: 1.0, 64: 3.0}
        else:
            assert workload.lengths == (tmp_path / name).resolve()
            assert workload.describe() == "batch 1, as long as the texts in texts.txt"
            with pytest.raises(RecipeError, match="expected counted lengths, found the file of texts"):
                assert workload.calls


def test_texts_one_a_line_may_be_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_lengths, "MAX_JSON_BYTES", 100)
    path = tmp_path / "requests.txt"
    path.write_text("\n" + "two cats sat\n" * 50)
    assert read_histogram(path) is None
    path.write_text("16\n" * 50)
    with pytest.raises(ValueError, match=r"requests\.txt: more than 0 KiB"):
        read_histogram(path)
