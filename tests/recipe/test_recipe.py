"""Recipes: what is accepted, and what a wrong field is told."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from ziplm_deploy.errors import RecipeError, UsageError
from ziplm_deploy.recipe import Recipe, RecoverConfig, Workload, load_recipe, parse_recipe, recipe_reference, recovery

MIN_RECIPE = {"name": "demo", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}
MIN_YAML = "name: demo\nmodel: {path: m, task: fill-mask}\nspeedups: [2]\n"


def test_the_least_recipe_is_complete() -> None:
    recipe = parse_recipe(MIN_RECIPE)
    assert recipe.run_dir == Path("runs/demo")
    assert recipe.environment.describe() == "onnxruntime, batch 1, 128 tokens, 1 thread(s)"
    assert recipe.prune.method == "ziplm"


def test_speedups_are_sorted_and_distinct() -> None:
    assert parse_recipe({**MIN_RECIPE, "speedups": [3, 1.5, 3.0, 2]}).speedups == (1.5, 2.0, 3.0)


def test_scenario_names() -> None:
    assert Workload(batch_size=1).scenario == "SingleStream"
    assert Workload(batch_size=16).scenario == "Offline"


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(MIN_RECIPE)
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = parse_recipe({**MIN_RECIPE, "environment": {"threads": 2}, "profile": {"table": "t.json"}})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"speedup": [2]}, "speedup: unknown field; valid here: benchmark, compress, data"),
        (
            {"environment": {"thread": 2}},
            "environment.thread: unknown field; valid here: engine, huge_pages, threads, workload",
        ),
        ({"environment": {"batch_size": 2}}, "environment.batch_size: renamed, write environment.workload.batch_size"),
        ({"environment": {"seq_len": 64}}, "environment.seq_len: renamed, write environment.workload.seq_len"),
        ({"prune": {"search": {"steps": 1}}}, "prune.search.steps: unknown field; valid here: coefficient_steps"),
        ({"speedups": [1.0]}, "speedups.0: Input should be greater than 1"),
        ({"speedups": [0.5]}, "speedups.0"),
        ({"speedups": [-2]}, "speedups.0"),
        ({"speedups": []}, "speedups"),
        ({"speedups": ["fast"]}, "found 'fast'"),
        ({"speedups": [float("nan")]}, "speedups.0"),
        ({"speedups": [float("inf")]}, "speedups.0"),
        ({"name": "../../etc"}, "name"),
        ({"name": ""}, "name"),
        ({"model": {"path": "m", "task": "translation"}}, "model.task"),
        ({"model": {"path": "m"}}, "model.task: required, but missing"),
        ({"environment": {"threads": 0}}, "environment.threads"),
        ({"environment": {"workload": {"batch_size": 0}}}, "environment.workload.batch_size"),
        ({"environment": {"engine": "tensorrt"}}, "environment.engine"),
        ({"prune": {"damping": 0}}, "prune.damping"),
        ({"prune": {"method": "zip"}}, "prune.method"),
        ({"data": {"n_calibration": 1}}, "data.n_calibration"),
        ({"export": {"opset": 99}}, "export.opset"),
        ({"seed": -1}, "seed"),
        ({"model": "bert"}, "model"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MIN_RECIPE, **change})
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


def test_ranges_of_activations_are_of_static_int8() -> None:
    compress: dict[str, Any] = {"variants": ["int8"], "int8": {"ranges": "percentile"}}
    with pytest.raises(RecipeError, match=r"int8\.method: static for int8\.ranges: percentile, found dynamic"):
        parse_recipe({**MIN_RECIPE, "compress": compress})
    parse_recipe({**MIN_RECIPE, "compress": {"variants": ["int8"], "int8": {**compress["int8"], "method": "static"}}})


@pytest.mark.parametrize("mode", ["distil", "gradual"])
@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_training_without_anything_to_train_is_refused(mode: str, method: str) -> None:
    compress = {"variants": ["int8"], "int8": {"method": method}, "train": {"mode": mode}}
    with pytest.raises(RecipeError, match=rf"train\.mode {mode} .*int8\.method {method} .*none or int8\.method: qat"):
        parse_recipe({**MIN_RECIPE, "compress": compress})
    changes: list[dict[str, Any]] = [
        {"variants": ["int8", "sparse"]},
        {"variants": ["sparse-int8"]},
        {"int8": {"method": "qat"}},
        {"train": {"mode": "none"}},
    ]
    for change in changes:
        parse_recipe({**MIN_RECIPE, "compress": {**compress, **change}})


@pytest.mark.parametrize("field", ["name", "model", "speedups"])
def test_missing_fields_are_named(field: str) -> None:
    with pytest.raises(RecipeError, match=f"{field}: required, but missing"):
        parse_recipe({key: value for key, value in MIN_RECIPE.items() if key != field})


def test_every_wrong_field_is_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "demo", "speedups": [1], "modle": {}})
    assert all(text in str(caught.value) for text in ("3 field(s)", "modle", "model: required", "speedups.0"))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "42\n", "a: [1\n", "\t: x", "name: demo\n  bad: indent\n"])
def test_files_that_are_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


def test_binary_file_missing_file_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\x80\x04\x95\xff\xfe")
    for wrong in (path, tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError):
            load_recipe(wrong)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch pwned']\n", encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_paths_beside_the_recipe_are_found(tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("text\na\n", encoding="utf-8")
    path = tmp_path / "r.yaml"
    path.write_text(MIN_YAML + "data: {calibration: text.csv, evaluation: glue}\n", encoding="utf-8")
    data = load_recipe(path).data
    assert data.calibration == str((tmp_path / "text.csv").resolve())
    assert data.evaluation == "glue"


def test_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MIN_YAML, encoding="utf-8")
    recipe = load_recipe(path, {"speedups": ["1.5", "4"], "output_dir": str(tmp_path)})
    assert recipe.speedups == (1.5, 4.0)
    assert recipe.run_dir == tmp_path / "demo"


def test_reference_names_every_field_once() -> None:
    names = [line.split("`")[1] for line in recipe_reference().splitlines()[2:]]
    assert len(names) == len(set(names))
    assert {"name", "model.task", "environment.threads", "prune.search.swap_evaluations"} <= set(names)
    assert not any("None |" in line for line in recipe_reference().splitlines()), "a field has no description"


def test_every_field_has_a_description() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


def test_a_rule_over_several_fields_is_told_without_the_whole_recipe() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MIN_RECIPE, "environment": {"engine": "deepsparse"}})
    text = str(caught.value)
    assert "recipe: DeepSparse" in text
    assert "export.shapes: static" in text
    assert "Value error" not in text
    assert "{" not in text


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+12", "99999999999999999999"])
def test_numbers_without_reason_are_refused_in_every_field(tmp_path: Path, value: str) -> None:
    """Some reach ``int(…)`` or bytes as 64-bit integers long after the recipe was accepted."""
    path = tmp_path / "r.yaml"
    for line in recipe_reference().splitlines()[2:]:
        name, default = line.split("`")[1], line.split("|")[2].strip(" `")
        if not default.replace(".", "").replace("e-", "").isdigit():
            continue
        *sections, field = name.split(".")
        nested = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
        path.write_text(f"{MIN_YAML}{nested}{'  ' * len(sections)}{field}: {value}\n", encoding="utf-8")
        if sections == ["model"]:
            continue
        with pytest.raises(RecipeError, match=re.escape(name)):
            load_recipe(path)


def test_targets_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="several that are called 2x"):
        parse_recipe({**MIN_RECIPE, "speedups": [2, 2.0000001, 3]})
    assert parse_recipe({**MIN_RECIPE, "speedups": [2, 2.00001]}).speedups == (2.0, 2.00001)


@pytest.mark.parametrize("ratio", [0.98, 0.999999])
def test_a_grid_without_end_is_refused(ratio: float) -> None:
    with pytest.raises(RecipeError, match=r"profile\.width_ratio"):
        parse_recipe({**MIN_RECIPE, "profile": {"width_ratio": ratio}})


def test_a_few_lines_that_stand_for_gigabytes_are_refused_in_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    levels = ["a0: &a0 [" + ", ".join(["x"] * 9) + "]"]
    levels += [f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 9) + "]" for level in range(1, 10)]
    path.write_text(MIN_YAML + "\n".join(levels), encoding="utf-8")
    with pytest.raises(RecipeError, match="alias") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1000


def test_messages_stay_short_whatever_stands_in_the_fields(tmp_path: Path) -> None:
    wrong = [{"speedups": ["x" * 10**6]}, {"seed": 1 << 60_000}, {f"field{index}": 1 for index in range(9999)}]
    for change in (*wrong, {"y" * 10**6: 1}, {"name": ["z"] * 10**6}):
        with pytest.raises(RecipeError) as caught:
            parse_recipe({**MIN_RECIPE, **change})
        assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b"])
@pytest.mark.parametrize("field", ["data.calibration", "output_dir", "profile.table", "model.path"])
def test_texts_that_no_path_can_be_are_refused(field: str, text: str) -> None:
    section, _, name = field.rpartition(".")
    change = {section: {**MIN_RECIPE.get(section, {}), name: text}} if section else {name: text}  # type: ignore[dict-item]
    with pytest.raises(RecipeError, match=re.escape(field)):
        parse_recipe({**MIN_RECIPE, **change})


@pytest.mark.parametrize("field", ["model: {path: %s, task: fill-mask}", "data: {calibration: %s}"])
def test_names_too_long_for_a_file_are_looked_for_nowhere(tmp_path: Path, field: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MIN_YAML.replace("model: {path: m, task: fill-mask}\n", "") + field % ("n" * 999), encoding="utf-8")
    if field.startswith("data"):
        path.write_text(MIN_YAML + field % ("n" * 999), encoding="utf-8")
    load_recipe(path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("avx2", "amx_bf16"), "bf16"),
        (("avx512f", "avx512_bf16"), "bf16"),
        (("avx2", "avx512_vnni"), "fp32"),
        ((), "fp32"),
    ],
)
def test_a_precision_left_to_the_machine_is_one_that_its_cpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(recovery, "machine_info", lambda: SimpleNamespace(isa_flags=flags))
    assert RecoverConfig(precision="auto").arithmetic == expected
    assert RecoverConfig(precision="fp16").arithmetic == "fp16"
