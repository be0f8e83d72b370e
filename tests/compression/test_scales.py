"""Ranges of activations from calibration data: those of ONNX Runtime's calibrators, in bounded memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.helpers.int8_files import (
    BATCH_SIZE,
    SEQ_LEN,
    Batch,
    Exported,
    Reader,
    exported,
    node_named,
    without_padding,
)
from tests.helpers.models import tiny_model
from ziplm_deploy.compression.int8 import scales as int8_scales
from ziplm_deploy.compression.int8.quantize import linear_ranges
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import Int8Config

INTERMEDIATE = "encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("static"), "static")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("dynamic"), "dynamic", opset=17)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_ranges_are_those_of_onnx_runtimes_calibrators(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    monkeypatch.setattr(int8_scales, "_ENTROPY_BINS", 256)
    source = exported(tmp_path, model=tiny_model("bert", num_hidden_layers=1))
    batches = without_padding(source.batches)  # ONNX Runtime counts padding like any token
    found = linear_ranges(source.path, batches, Int8Config(ranges=method, percentile=99.0))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    bins = {"entropy": 256, "percentile": 2048}.get(method, 0)
    calibrator = create_calibrator(
        source.path,
        ["MatMul"],
        str(tmp_path / "augmented.onnx"),
        {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}.get(
            method, CalibrationMethod.Percentile
        ),
        extra_options={"num_bins": bins, "symmetric": False, "percentile": 99.0},
    )
    calibrator.collect_data(Reader(batches))  # all at once
    with np.errstate(all="ignore"):
        theirs = calibrator.compute_data()
    graph = onnx.load(str(source.path)).graph
    for name, values in found.items():
        layer, _, rest = name.partition(".layer.0.")
        ending = f"{layer}/layer.0/{rest.replace('.', '/')}/MatMul"
        low, high = theirs[node_named(graph, ending).input[0]].range_value
        assert (values.low, values.high) == (pytest.approx(low.item()), pytest.approx(high.item()))


def ragged(seed: int = 3) -> list[list[int]]:
    """Twelve examples of 2 to ``SEQ_LEN`` tokens, most of them short."""
    generator = np.random.default_rng(seed)
    lengths = [2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 7, SEQ_LEN]
    return [generator.integers(5, 19, length).tolist() for length in lengths]


def padded(examples: list[list[int]], to: int | None = None, side: str = "right") -> Batch:
    """One batch, padded to ``to`` tokens or to its longest example."""
    length = to or max(map(len, examples))
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = {name: np.zeros((len(examples), length), np.int64) for name in names}
    for row, example in enumerate(examples):
        place = slice(length - len(example), length) if side == "left" else slice(0, len(example))
        found["input_ids"][row, place], found["attention_mask"][row, place] = example, 1
    return found


def paired(examples: list[list[int]], to: int | None = None, side: str = "right") -> list[Batch]:
    return [padded(examples[start : start + BATCH_SIZE], to, side) for start in range(0, len(examples), BATCH_SIZE)]


@pytest.fixture(scope="module")
def with_far_padding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """A model in both forms whose inputs at padding lie far outside those at tokens, as in trained models."""
    model = tiny_model("bert", num_hidden_layers=1)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = 9 * torch.linspace(-1, 1, model.config.hidden_size) ** 3  # type: ignore[index, operator, union-attr]
    folder = tmp_path_factory.mktemp("padding")
    return {shapes: exported(folder, shapes, model=copy.deepcopy(model)) for shapes in ("dynamic", "static")}


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_ranges_depend_neither_on_padding_nor_on_order_nor_on_batching(
    with_far_padding: dict[str, Exported], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_scales, "_ENTROPY_BINS", 256)
    config = Int8Config(ranges=method, percentile=97.0)  # type: ignore[arg-type]
    examples, dynamic, static = ragged(), with_far_padding["dynamic"].path, with_far_padding["static"].path
    alone = linear_ranges(dynamic, [padded([example]) for example in examples], config)  # no padding at all
    shuffled = [examples[index] for index in np.random.default_rng(0).permutation(len(examples))]
    for path, batches in (
        (dynamic, paired(examples)),
        (dynamic, paired(shuffled)),
        (dynamic, [padded(shuffled, SEQ_LEN)]),
        (static, paired(examples, SEQ_LEN)),
        (static, paired(shuffled, SEQ_LEN)),
    ):
        for name, values in linear_ranges(path, batches, config).items():
            assert (values.low, values.high) == pytest.approx((alone[name].low, alone[name].high), rel=1e-3), name
    every = [{**batch, "attention_mask": np.ones_like(batch["attention_mask"])} for batch in paired(examples, SEQ_LEN)]
    moved = linear_ranges(static, every, config)[INTERMEDIATE]
    assert abs(moved.high - alone[INTERMEDIATE].high) > 0.05 * alone[INTERMEDIATE].high  # the test can fail


def test_histogram_ranges_lie_within_the_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_scales, "_ENTROPY_BINS", 256)
    source = exported(tmp_path, model=tiny_model("bert", num_hidden_layers=1))
    extremes = linear_ranges(source.path, source.batches, Int8Config())
    for config in (Int8Config(ranges="entropy"), Int8Config(ranges="percentile", percentile=90.0)):
        for name, values in linear_ranges(source.path, source.batches, config).items():
            assert extremes[name].low <= values.low < values.high <= extremes[name].high
            assert config.ranges == "entropy" or values.high - values.low < extremes[name].high - extremes[name].low


class _Streamed(Sequence[Batch]):
    """Batches that are made when they are asked for."""

    def __init__(self, example: Batch) -> None:
        self._example = example
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError
        arrays = {name: _Counted.of(array) for name, array in self._example.items()}
        self.alive.update(arrays.values())
        self.most = max(self.most, len(self.alive))
        return arrays


class _Counted(np.ndarray[Any, Any]):
    __hash__ = object.__hash__  # type: ignore[assignment]

    @classmethod
    def of(cls, array: np.ndarray) -> _Counted:
        return array.copy().view(cls)


def test_calibration_keeps_no_batches(static: Exported) -> None:
    streamed = _Streamed(static.batches[0])
    linear_ranges(static.path, streamed, Int8Config(ranges="percentile"))
    assert 0 < streamed.most <= 2 * len(static.batches[0])


@pytest.mark.parametrize("ranges", ["minmax", "percentile"])
def test_large_batches_go_in_pieces(dynamic: Exported, monkeypatch: pytest.MonkeyPatch, ranges: str) -> None:
    large = {name: np.concatenate([batch[name] for batch in dynamic.batches] * 2) for name in dynamic.batches[0]}
    config, sizes = Int8Config(ranges=ranges), list[int]()  # type: ignore[arg-type]
    run = onnxruntime.InferenceSession.run

    def noting(self: Any, outputs: Any, inputs: Batch, *more: Any) -> Any:
        sizes.extend({len(array) for array in inputs.values()})
        return run(self, outputs, inputs, *more)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", noting)
    found = linear_ranges(dynamic.path, [large], config)
    assert sizes == [8, 8, 4] * (1 if ranges == "minmax" else 2)
    monkeypatch.setattr(int8_scales, "_EXAMPLES_AT_ONCE", 64)
    whole = linear_ranges(dynamic.path, [large], config)
    assert sizes[-1] == 20
    assert found.keys() == whole.keys()
    for name, values in found.items():
        assert (values.low, values.high) == pytest.approx((whole[name].low, whole[name].high), rel=1e-5)


def test_batches_of_a_fixed_size_stay_whole(static: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear_ranges(static.path, static.batches, Int8Config())
    monkeypatch.setattr(int8_scales, "_EXAMPLES_AT_ONCE", 1)
    assert linear_ranges(static.path, static.batches, Int8Config()) == expected


def test_inputs_of_different_numbers_of_examples_are_refused(dynamic: Exported) -> None:
    many = {name: np.repeat(array, 8, axis=0) for name, array in dynamic.batches[0].items()}
    with pytest.raises(DataError, match="batches that the model takes"):
        linear_ranges(dynamic.path, [{**many, "attention_mask": many["attention_mask"][:9]}], Int8Config())
