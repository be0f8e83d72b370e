"""A causal model's INT8 file with weight-only linears, made by the stage: record, file and ranking say the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from exporters.names import linear_of
from tests.helpers.decoder_models import skip_in_old_engine
from tests.helpers.pipeline import causal_recipe, raw_recipe, save_causal
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.fake_quant import quantizable_linears
from ziplm_deploy.compression.int8.forms import Form
from ziplm_deploy.compression.int8.gptq import gptq_blocks, input_moments
from ziplm_deploy.compression.int8.linear_times import LinearTimes
from ziplm_deploy.compression.int8.quantize import linear_names, quantized_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.smoothing import smooth_as_chosen
from ziplm_deploy.compression.int8.weight_only import weight_only_linears
from ziplm_deploy.compression.onnx_graphs import load_onnx
from ziplm_deploy.compression.records import Int8Record, LinearRanking, facts_of, int8_note, spared_from_int8
from ziplm_deploy.engines.generator import TextGenerator
from ziplm_deploy.errors import ParityError, RecipeError, UsageError
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import begin
from ziplm_deploy.recipe import Variant, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages import prepare_weights, rank_linears
from ziplm_deploy.stages import quantize as quantize_stage
from ziplm_deploy.stages.checks import check_task
from ziplm_deploy.stages.continuations import continue_texts
from ziplm_deploy.stages.export import export_dense
from ziplm_deploy.stages.prepare_weights import watched_batches
from ziplm_deploy.stages.quantize import quantize_file
from ziplm_deploy.tasks.record import Continuations

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weight-only")
    save_causal(folder, "gpt2")
    return folder


def made(folder: Path, **int8: Any) -> tuple[Int8Record, Path]:
    """Record and INT8 file of the dense model."""
    compress = {"variants": ["int8"], "int8": int8}
    with begin(parse_recipe(causal_recipe(folder, compress=compress))) as run:
        export_dense(run)
        file = run.dense_member.file(Variant.INT8)
        quantize_file(run, file)
        return Int8Record.load(file.int8_record), file.path


def test_record_and_file_name_the_same_linears(folder: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    record, onnx = made(folder, max_loss=0.0, weight_only_4=["*.feed_forward.up"])
    names = linear_names(onnx.with_name("model.onnx"))
    assert [row.name for row in record.sensitivities] != list(names)
    assert {row.name for row in record.sensitivities} == set(names)
    assert weight_only_linears(onnx) == record.weight_only
    assert set(quantized_linears(onnx)) == set(names) - record.weight_only.keys() - set(record.fp32_linears)
    # Four bits where the recipe asks, unless the budget spared the linear.
    spared = {name for name, bits in record.weight_only.items() if bits == 8} | set(record.fp32_linears)
    asked = {name for name in names if name.endswith(".feed_forward.up")}
    assert {name for name, bits in record.weight_only.items() if bits == 4} == asked - spared
    assert record.within_budget == (record.reference_score is not None and record.reference_score <= max(record.scores))

    before = onnx.stat().st_mtime_ns
    again, _ = made(folder, max_loss=0.0, weight_only_4=["*.feed_forward.up"])
    assert (again, onnx.stat().st_mtime_ns) == (record, before)
    plain, _ = made(folder, max_loss=0.9, fallback="float32")
    assert (plain.weight_only, plain.fp32_linears) == ({}, [])
    assert onnx.stat().st_mtime_ns != before


def test_a_mixture_has_the_forms_that_its_record_names(folder: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    record, onnx = made(folder, max_loss=0.9, mixed=True)
    names = linear_names(onnx.with_name("model.onnx"))
    assert record.mixture is not None
    assert record.within_budget, "any file loses less than 90 %"
    assert len(record.scores) == 1, "the fastest holds it"
    assert record.mixture.ms <= record.mixture.int8_ms + 1e-9
    assert weight_only_linears(onnx) == record.weight_only
    assert set(quantized_linears(onnx)) == set(names) - record.weight_only.keys() - set(record.fp32_linears)
    forms = {"int8", "weight-only-8", "weight-only-4"}
    assert all(set(row.by_form) == forms and row.by_form["int8"] == row.divergence for row in record.sensitivities)
    assert (spared_from_int8(record), int8_note("dense int8", record, 0.9)) == ("", "")
    assert "forms by ms" in facts_of(None, record)
    times = folder / "runs" / "tiny" / "compression" / "linear-times.json"
    before = (onnx.stat().st_mtime_ns, times.stat().st_mtime_ns)
    again, _ = made(folder, max_loss=0.9, mixed=True)
    assert (again, onnx.stat().st_mtime_ns, times.stat().st_mtime_ns) == (record, *before)

    strict, _ = made(folder, max_loss=0.0, mixed=True)
    assert times.stat().st_mtime_ns == before[1], "milliseconds do not depend on the budget"
    assert strict.mixture is not None
    assert strict.mixture.ms >= record.mixture.ms
    assert len(strict.scores) > 1 or strict.within_budget


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_a_file_has_the_weights_that_were_smoothed_and_rounded(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused queries, keys and values, of GPT-NeoX in another order, and a tied head among them."""
    save_causal(tmp_path, model_type, tie_word_embeddings=True)
    inner = quantize_stage.ranked_linears

    def ranked(*args: Any) -> LinearRanking:
        found = inner(*args)
        every = [row.model_copy(update={"gptq": True}) for row in found.linears]
        return found.model_copy(update={"linears": every, "smoothing": {"norms": 0.7}})

    monkeypatch.setattr(quantize_stage, "ranked_linears", ranked)
    asked = ["*.feed_forward.up", "*.attention.*", "head"]
    record, onnx = made(tmp_path, max_loss=0.9, weight_only_4=asked, embeddings=False)
    assert record.smoothing == {"norms": 0.7}
    with begin(parse_recipe(causal_recipe(tmp_path, compress={"variants": ["int8"]}))) as run:
        model = load(run.dense_member.folder)
        smooth_as_chosen(model, watched_batches(run), record.smoothing)
        moments = dict(input_moments(model, watched_batches(run), quantizable_linears(model), 10**9))
    parts, held = causal_parts(model), weights_of(onnx)
    names = set(linear_names(onnx.with_name("model.onnx")))
    assert {"head", "layers.1.feed_forward.up"} <= set(weight_only_linears(onnx)) <= names
    for name, integers in held.items():
        rows = rows_of(parts, name)
        path = linear_groups(model, [name])[name][0]
        expected = gptq_blocks(rows.detach().numpy(), moments[path], 4)
        same = (integers == expected.packed).mean()
        assert same > 0.999, name  # but for one that lies between two integers
    monkeypatch.setattr(quantize_stage, "rounded_in_file", lambda *args: {})
    made(tmp_path, max_loss=0.8, weight_only_4=asked, embeddings=False)
    assert any((weights_of(onnx)[name] != integers).mean() > 0.01 for name, integers in held.items())


def weights_of(onnx: Path) -> dict[str, np.ndarray]:
    """Integers of the 4-bit linears of a file, by name."""
    graph = load_onnx(onnx).graph
    tensors = {item.name: item for item in graph.initializer}
    found = {linear_of(node.name): node for node in graph.node if node.op_type == "MatMulNBits"}
    return {str(name): numpy_helper.to_array(tensors[node.input[1]]) for name, node in found.items()}


def rows_of(parts: Any, name: str) -> torch.Tensor:
    """Weight ``[out, in]`` of a linear of a file, in torch."""
    if name == "head":
        return parts.embedding if parts.head is None else parts.head.weight
    _, index, block, kind = name.split(".")
    part = getattr(parts.layers[int(index)], block)
    if kind == "qkv":
        return torch.cat([part.query.weight, part.key.weight, part.value.weight])
    weight: torch.Tensor = getattr(part, kind).weight
    return weight


def test_other_milliseconds_make_another_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    made(folder, max_loss=0.9, mixed=True)

    def slow(run: Run, settings: Int8Settings, form: Form) -> LinearTimes:
        found = LinearTimes.load(run.folder.linear_times)
        parts = {name: part.model_copy(update={"ms": {**part.ms, form: 1e3}}) for name, part in found.parts.items()}
        found.model_copy(update={"parts": parts}).save(run.folder.linear_times)
        return LinearTimes.load(run.folder.linear_times)

    for form, has_none in (
        ("int8", quantized_linears),
        ("weight-only-4", lambda onnx: [bits for bits in weight_only_linears(onnx).values() if bits == 4]),
    ):
        monkeypatch.setattr(quantize_stage, "linear_times", functools.partial(slow, form=form))
        record, onnx = made(folder, max_loss=0.9, mixed=True)
        assert not has_none(onnx), f"no linear has the form {form}, which is slow"
        assert record.mixture is not None
        assert record.mixture.int8_ms > 1e3


def test_a_mixture_chooses_alone_and_needs_text_to_be_judged_by(folder: Path) -> None:
    for changes, message in (
        ({"fallback": "float32"}, "expected int8.mixed alone, found fallback beside it"),
        ({"weight_only_4": ["head"]}, "expected int8.mixed alone, found weight_only_4 beside it"),
        ({"method": "static"}, "int8.mixed needs method: dynamic"),
    ):
        with pytest.raises(RecipeError, match=message):
            made(folder, mixed=True, **changes)
    compress = {"variants": ["int8"], "int8": {"mixed": True}}
    with pytest.raises(RecipeError, match=r"expected another compress\.target with int8\.mixed, found int8"):
        parse_recipe(causal_recipe(folder, compress={**compress, "target": "int8"}))
    unjudged = parse_recipe(causal_recipe(folder, compress=compress, data={"evaluation": None}))
    with pytest.raises(RecipeError, match=r"expected data\.evaluation for compress\.int8\.mixed, found none"):
        check_task(unjudged)
    with pytest.raises(RecipeError, match="expected no weight-only linears for text-classification, found"):
        check_task(parse_recipe(raw_recipe(folder, compress=compress)))


def test_inputs_stay_as_they_are_where_a_smoothed_file_would_answer_otherwise_than_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then linears are ranked as in a run without smoothing."""

    def smoothed(model: Any, watched: Any, *rest: Any) -> dict[str, float]:
        smooth_as_chosen(model, watched, {"norms": 0.7})
        return {"norms": 0.7}

    def refused(run: Run, model: Any, path: Path, title: str) -> float:
        assert title.endswith("smoothed")
        raise ParityError("differs from torch by 1")

    plain, _ = made(folder, max_loss=0.9, smooth=False)
    monkeypatch.setattr(rank_linears, "choose_strengths", smoothed)
    monkeypatch.setattr(prepare_weights, "export_checked", refused)
    record, _ = made(folder, max_loss=0.9)
    assert record.smoothing == plain.smoothing == {}
    assert record.sensitivities == plain.sensitivities


def test_people_read_what_the_file_writes_that_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "members", property(lambda run: [run.dense_member]))  # the only one that is made
    made(folder, max_loss=0.9, fallback="float32")
    with begin(parse_recipe(causal_recipe(folder, compress={"variants": ["int8"], "target": "int8"}))) as run:
        continue_texts(run)
        written = Continuations.load(run.dense_member.continuations)
        of_files = {
            name: [
                TextGenerator(run.dense_member.folder, name).generate(text, max_new_tokens=13)
                for text in written.prompts
            ]
            for name in ("model.onnx", "model_int8.onnx")
        }
    assert written.texts == of_files["model_int8.onnx"] != of_files["model.onnx"]


def test_a_pattern_that_fits_no_linear_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"weight_only_4, such as layers\.0.*'\*\.gate', which fits none"):
        made(folder, weight_only_4=["*.gate"])
