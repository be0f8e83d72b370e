"""A causal model's INT8 file with weight-only linears, made by the stage: record, file and ranking say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.decoder_models import skip_in_old_engine
from tests.helpers.pipeline import causal_recipe, save_causal
from ziplm_deploy.compression.int8.quantize import linear_names, quantized_linears
from ziplm_deploy.compression.int8.weight_only import weight_only_linears
from ziplm_deploy.compression.records import Int8Record
from ziplm_deploy.errors import UsageError
from ziplm_deploy.pipeline import begin
from ziplm_deploy.recipe import Variant, parse_recipe
from ziplm_deploy.stages.export import export_dense
from ziplm_deploy.stages.quantize import quantize_file

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


def test_a_pattern_that_fits_no_linear_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"weight_only_4, such as layers\.0.*'\*\.gate', which fits none"):
        made(folder, weight_only_4=["*.gate"])
