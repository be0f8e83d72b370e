"""From values to integers: the ranges of activations, and the scales that follow from them.

Scales are those of ONNX Runtime's quantizer: a uint8 activation covers its range and zero, an int8 weight is symmetric.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ziplm_deploy.engines.session import cpu_session
from ziplm_deploy.errors import DataError, NumericalError
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.recipe import Int8Config

ACTIVATION_LEVELS = 255  # uint8: 0 … 255
_SAFE_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimd"}  # int8 products are summed in 32 bits
# With ONNX Runtime's own 128 bins the entropy search has a single candidate: the whole range.
_ENTROPY_BINS, _PERCENTILE_BINS = 1024, 2048
_EXAMPLES_AT_ONCE = 8  # the inputs of all linears of BERT-base: 33 MB an example of 128 tokens
_TINY = float(np.finfo(np.float32).tiny)
ArrayBatch = Mapping[str, npt.NDArray[Any]]  # model inputs by name


@dataclass(frozen=True)
class ActivationRange:
    """Smallest and largest input of a linear that its integers must express."""

    low: float
    high: float


@dataclass(frozen=True)
class LinearScales:
    """What a linear was trained with: value = scale · (integer − zero point), weights within ± ``weight_limit``."""

    activation_scale: float
    activation_zero_point: int
    weight_scale: tuple[float, ...]  # one, or one for each output
    weight_limit: int


def default_reduce_range(machine: MachineInfo) -> bool:
    """Whether 8-bit weights could saturate: x86 without VNNI and AMX adds products in 16 bits. True if unknown."""
    return not _SAFE_FLAGS.intersection(machine.isa_flags)


def weight_limit(reduce_range: bool) -> int:
    """Largest integer of a weight; the smallest is its negative."""
    return 64 if reduce_range else 127


def activation_parameters(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of a uint8 activation within ``low … high``; zero is always expressed exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / ACTIVATION_LEVELS
    if scale < _TINY:
        return 1.0, 0
    return float(np.float32(scale)), round(-low / scale)


def weight_scales(weight: npt.NDArray[Any], *, per_channel: bool, limit: int) -> npt.NDArray[np.float32]:
    """Scales of a weight ``[out, in]``: ``[out]``, or ``[1]`` for the whole tensor; 1 where all weights are zero."""
    rows = weight if per_channel else weight.reshape(1, -1)
    scales = np.abs(rows).max(axis=1).astype(np.float64) / limit
    scales[scales < _TINY] = 1.0
    rounded: npt.NDArray[np.float32] = scales.astype(np.float32)
    return rounded


def tensor_ranges(
    model: onnx.ModelProto, readers: Mapping[str, str], batches: Sequence[ArrayBatch], config: Int8Config
) -> dict[str, ActivationRange]:
    """Ranges of tensors of a float32 model on calibration data, by ``config.ranges``.

    Positions with ``attention_mask`` 0 do not count, since no answer depends on them: the result depends neither on how
    far the examples are padded, nor on their order, nor on how they are cut into batches (histograms, which take a
    second pass, have the same bins for every batch). Without a mask, as for images, all positions count.

    Memory holds these tensors for one batch at a time, or for a few examples of it where the model takes any number.

    Args:
        readers: tensor → the linear that reads it, for messages. Tensors are [batch, length, features].
        batches: model inputs by name.

    Raises:
        DataError: no tokens in the batches, or batches that the model does not take.
        NumericalError: NaN or infinite values; names the linear.
    """
    inputs = _Tensors(model, readers)
    ranges: dict[str, ActivationRange] = {}
    for tensor, array in inputs.of(batches):
        low, high = float(array.min()), float(array.max())
        seen = ranges.get(tensor, ActivationRange(low, high))
        ranges[tensor] = ActivationRange(min(low, seen.low), max(high, seen.high))
    if not ranges:
        raise DataError(
            "expected calibration batches with tokens for static INT8, found none; give int8.n_calibration examples"
        )
    return ranges if config.ranges == "minmax" else _histogram_ranges(inputs, batches, ranges, config)


class _Tensors:
    """Runs a model and yields tensors from its inside."""

    def __init__(self, model: onnx.ModelProto, readers: Mapping[str, str]) -> None:
        self._readers = readers
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        del watched.graph.output[:]
        for tensor in self._readers:
            watched.graph.output.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
        self._session = cpu_session(watched.SerializeToString())

    def of(self, batches: Sequence[ArrayBatch]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yield (tensor name, values [tokens that count, features]) of every batch, or of every part of it."""
        for batch in batches:
            for part in self._parts(batch):
                yield from self._values(part)

    def _parts(self, batch: ArrayBatch) -> Iterator[ArrayBatch]:
        """The model's inputs, a few examples at a time if it does not fix how many there are."""
        declared = {item.name: item.shape for item in self._session.get_inputs()}
        missing = [name for name in declared if name not in batch]
        if missing:
            raise DataError(f"expected calibration inputs {list(declared)}, found no {missing[0]!r} in a batch; add it")
        inputs = {name: batch[name] for name in declared}
        counts = {len(array) for array in inputs.values()}
        fixed = any(isinstance(shape[0], int) for shape in declared.values())
        if fixed or len(counts) != 1:  # inputs that do not belong together are the model's to refuse
            yield inputs
            return
        for start in range(0, max(1, *counts), _EXAMPLES_AT_ONCE):
            yield {name: array[start : start + _EXAMPLES_AT_ONCE] for name, array in inputs.items()}

    def _values(self, inputs: ArrayBatch) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        try:
            arrays = self._session.run(list(self._readers), dict(inputs))
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise DataError(
                f"expected calibration batches that the model takes, found: {error}; encode them for this model"
            ) from error
        mask = inputs.get("attention_mask")
        for (tensor, reader), array in zip(self._readers.items(), arrays, strict=True):
            if not array.size:
                raise DataError(f"expected calibration data that reaches {reader}, found an empty batch; leave it out")
            if mask is not None:
                array = array[mask.astype(bool)]  # [batch, length, features] -> [tokens that count, features]
            if not array.size:
                continue
            if not np.isfinite(array).all():
                raise NumericalError(
                    f"expected finite inputs of {reader}, found NaN or infinity; check the checkpoint and the data"
                )
            yield tensor, array


def _histogram_ranges(
    inputs: _Tensors, batches: Sequence[ArrayBatch], extremes: Mapping[str, ActivationRange], config: Int8Config
) -> dict[str, ActivationRange]:
    from onnxruntime.quantization.calibrate import HistogramCollector

    bins = _ENTROPY_BINS if config.ranges == "entropy" else _PERCENTILE_BINS
    collector = HistogramCollector(
        method=config.ranges,
        symmetric=False,
        num_bins=bins,
        num_quantized_bins=128,
        percentile=config.percentile,
        scenario="same",
    )
    for tensor, extreme in extremes.items():
        low, high = np.float32(extreme.low), np.float32(extreme.high)
        limit = max(abs(low), abs(high))
        # Empty, but with the final bins: the collector's own would depend on which batch comes first.
        counts, edges = np.histogram(np.empty(0, np.float32), bins, range=(-limit, limit))  # type: ignore[arg-type]
        collector.histogram_dict[tensor] = (counts, edges, low, high, limit)
    with quiet():
        for tensor, array in inputs.of(batches):
            collector.collect({tensor: array})
        found = collector.compute_collection_result()
    return {tensor: ActivationRange(float(values[0]), float(values[1])) for tensor, values in found.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No prints, warnings and root-logger records of ``onnxruntime.quantization``, nor a handler that it installs."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def nothing(_: logging.LogRecord) -> bool:
        return False

    root.addHandler(handler)
    root.addFilter(nothing)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(nothing)
        root.removeHandler(handler)
