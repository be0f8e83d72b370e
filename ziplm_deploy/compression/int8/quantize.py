"""INT8 ONNX files from float32 ones: the linears of the layers compute in integers, the heads of encoders in float32.

Word embeddings are stored in 8 bits, too (:mod:`ziplm_deploy.compression.int8.embeddings`), unless the settings say no.

``dynamic`` is ONNX Runtime's ``quantize_dynamic``; linears beside it can have weight-only forms
(:mod:`ziplm_deploy.compression.int8.weight_only`). ``static`` and ``qat`` are written here as QuantizeLinear and
DequantizeLinear around every linear, with the scales that ``quantize_static`` would choose. It is not called because it
rounds a linear's input for *every* reader: the residual stream would pass through 8 bits, too.

======================  =========================================================================================
activation              uint8, asymmetric, one scale a tensor; q, k and v read one quantized tensor
weight                  int8, symmetric (a zero stays zero), ±127 or, with ``reduce_range``, ±64; a scale for each
                        tensor or output
bias                    float32
======================  =========================================================================================
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters import ExportError, to_integer_matmul
from exporters.names import HEAD, linear_of
from exporters.nbits_matmul import BlockWeights
from ziplm_deploy.artifacts import atomic_path
from ziplm_deploy.compression.int8.causal import head_as_product, keep_tied_head
from ziplm_deploy.compression.int8.embeddings import round_embeddings
from ziplm_deploy.compression.int8.scales import (
    ACTIVATION_LEVELS,
    ActivationRange,
    ArrayBatch,
    LinearScales,
    activation_parameters,
    quiet,
    tensor_ranges,
    weight_scales,
)
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.weight_only import write_weight_only
from ziplm_deploy.compression.onnx_graphs import check_size, drop_unread, load_onnx, replace_nodes, save_onnx
from ziplm_deploy.errors import EngineError, NumericalError, UsageError
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.recipe import Int8Config


def linear_names(path: Path) -> tuple[str, ...]:
    """Linears of a float32 file that can be quantized, as module paths of the model, in graph order.

    Raises:
        CorruptArtifactError: no ONNX file.
    """
    return tuple(_linears(load_onnx(path)))


def quantized_linears(path: Path) -> tuple[str, ...]:
    """Linears of a file that are INT8, of any method of :func:`quantize`; weight-only ones are not.

    Raises:
        CorruptArtifactError: no ONNX file.
    """
    graph = load_onnx(path).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    names = []
    for node in graph.node:
        integer = node.op_type == "MatMulInteger" or (node.op_type == "MatMul" and dequantized.issuperset(node.input))
        name = linear_of(node.name)
        if integer and name is not None:
            names.append(name)
    return tuple(names)


def quantize(
    source: Path,
    destination: Path,
    settings: Int8Settings,
    *,
    batches: Sequence[ArrayBatch] = (),
    keep_fp32: Collection[str] = (),
    ranges: Mapping[str, ActivationRange | LinearScales] | None = None,
    weight_only: Mapping[str, int] | None = None,
    rounded: Mapping[str, BlockWeights] | None = None,
) -> None:
    """Write ``source`` with INT8 linears to ``destination``, in the form that the engine runs fast, or nothing at all.

    Args:
        source: float32 file of ``exporters.export_encoder``.
        batches: calibration inputs by name, for ``static`` without ``ranges``.
        keep_fp32: module paths of linears that stay float32.
        ranges: by module path; spares the calibration (:func:`linear_ranges`) or is what ``qat`` learned.
        weight_only: bits by module path, beside ``dynamic``; ``rounded``: what weights became, if not the nearest.

    Raises:
        UsageError: the engine cannot run what is asked for, nothing is left to quantize, an unknown name in
            ``keep_fp32`` or ``weight_only``, one in both, or ``ranges`` that are missing or do not fit.
        DataError: no calibration batches, or batches that the model does not take.
        NumericalError: NaN or infinite weights or activations; names the linear.
        CorruptArtifactError: ``source`` is no ONNX file.  StorageError: ``destination`` cannot be written.
        EngineError: ONNX Runtime's quantizer left a linear as it was.
    """
    _check_request(settings, ranges)
    config, model = settings.config, load_onnx(source)
    linears = chosen_linears(model, source, keep_fp32)
    check_weights(model, linears)
    if weight_only:
        _check_weight_only(settings, linears, weight_only, keep_fp32)
        write_weight_only(model, linears, weight_only, rounded)
        linears = _linears(model, keep_fp32)
    if HEAD in linears:
        head_as_product(model, linears[HEAD])
        linears = _linears(model, keep_fp32)
    if config.embeddings:
        round_embeddings(model)
        linears = _linears(model, keep_fp32)  # the nodes are new ones
    if config.method == "dynamic":
        _write_dynamic(model, linears, destination, settings)
        return
    if ranges is None:
        ranges = _calibrate(model, linears, batches, config)
    _insert_pairs(model, linears, _scales(model, linears, ranges, settings))
    if settings.engine == "onnxruntime":
        _keep_matmuls(model)
    with atomic_path(destination) as temporary:
        if settings.engine != "deepsparse":
            save_onnx(model, temporary)
            return
        with tempfile.TemporaryDirectory(prefix="int8-", dir=scratch_root()) as folder:
            pairs = Path(folder) / "model.onnx"
            save_onnx(model, pairs)
            try:
                to_integer_matmul(pairs, temporary)
            except ExportError as error:
                raise UsageError(f"{source} cannot be quantized for DeepSparse: {error}") from error


def linear_ranges(
    source: Path, batches: Sequence[ArrayBatch], config: Int8Config, *, keep_fp32: Collection[str] = ()
) -> dict[str, ActivationRange]:
    """Input ranges of the linears of a float32 file, by module path; raises like :func:`quantize`.

    Memory holds the linears' inputs of one batch at a time, however many batches there are.
    """
    model = load_onnx(source)
    return _calibrate(model, chosen_linears(model, source, keep_fp32), batches, config)


def _check_request(settings: Int8Settings, ranges: Mapping[str, ActivationRange | LinearScales] | None) -> None:
    config, engine = settings.config, settings.engine
    if config.method == "dynamic" and engine != "onnxruntime":
        raise UsageError(
            f"expected int8.method static or qat for {engine}, found dynamic, which only ONNX Runtime runs; change it"
        )
    if config.method == "dynamic" and ranges is not None:
        raise UsageError(
            "expected no ranges for int8.method dynamic, which measures at run time, found some; leave them out"
        )
    if config.method == "qat" and not (ranges and all(isinstance(item, LinearScales) for item in ranges.values())):
        raise UsageError("expected the scales that training learned for int8.method qat, found none; train first")
    if config.per_channel and engine == "deepsparse":
        raise UsageError(
            "expected int8.per_channel: false for deepsparse, whose fast kernels take one weight scale for each "
            "tensor, found true; change it"
        )


def _check_weight_only(
    settings: Int8Settings,
    linears: Mapping[str, onnx.NodeProto],
    weight_only: Mapping[str, int],
    keep_fp32: Collection[str],
) -> None:
    if settings.config.method != "dynamic":
        raise UsageError(
            f"expected int8.method dynamic for weight-only linears, found {settings.config.method}; change it"
        )
    twice = sorted(set(weight_only).intersection(keep_fp32))
    if twice:
        raise UsageError(f"expected {twice[0]} in keep_fp32 or in weight_only, found it in both; choose one")
    unknown = sorted(set(weight_only) - linears.keys())
    if unknown:
        raise UsageError(
            f"expected names of linears in weight_only, such as {next(iter(linears))}, found {unknown[0]!r}; correct it"
        )


def _linears(model: onnx.ModelProto, leave_out: Collection[str] = ()) -> dict[str, onnx.NodeProto]:
    """Float32 linears of a graph by module path."""
    weights = {item.name for item in model.graph.initializer if item.data_type == onnx.TensorProto.FLOAT}
    found = {}
    for node in model.graph.node:
        name = linear_of(node.name)
        is_product = node.op_type == "MatMul" or (name == HEAD and node.op_type == "Gemm")
        if is_product and name is not None and name not in leave_out and node.input[1] in weights:
            found[name] = node
    return found


def chosen_linears(model: onnx.ModelProto, source: Path, keep_fp32: Collection[str] = ()) -> dict[str, onnx.NodeProto]:
    """Nodes of the linears to quantize, by module path; raises :class:`UsageError` where there are none."""
    linears = _linears(model)
    if not linears:
        raise UsageError(
            f"expected float32 linears inside numbered layers in {source}, found none; choose a file that "
            "ziplm-deploy exported, before any other tool changed it"
        )
    unknown = sorted(set(keep_fp32) - linears.keys())
    if unknown:
        raise UsageError(
            f"expected names of linears in keep_fp32, such as {next(iter(linears))}, found {unknown[0]!r}; correct it"
        )
    chosen = {name: node for name, node in linears.items() if name not in set(keep_fp32)}
    if not chosen:
        raise UsageError(f"expected a linear to quantize, found all {len(linears)} in keep_fp32; use the float32 file")
    return chosen


def check_weights(model: onnx.ModelProto, linears: Mapping[str, onnx.NodeProto]) -> None:
    """Raise :class:`NumericalError`, naming the linear, for weights that are NaN or infinite."""
    weights = {item.name: item for item in model.graph.initializer}
    for name, node in linears.items():
        if not np.isfinite(numpy_helper.to_array(weights[node.input[1]])).all():
            raise NumericalError(f"expected finite weights of {name}, found NaN or infinity; check the checkpoint")


def _write_dynamic(
    model: onnx.ModelProto, linears: Mapping[str, onnx.NodeProto], destination: Path, settings: Int8Settings
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not linears:  # all are weight-only or float32
        with atomic_path(destination) as temporary:
            save_onnx(model, temporary)
        return
    weights = {item.name: len(item.raw_data) for item in model.graph.initializer}
    check_size(sum(weights.values()) - 3 / 4 * sum(weights[node.input[1]] for node in linears.values()))
    head = next((node for node in model.graph.node if linear_of(node.name) == HEAD and node.op_type == "Gemm"), None)
    kept = None if head is None else onnx.NodeProto.FromString(head.SerializeToString())
    with atomic_path(destination) as temporary:
        with quiet():
            quantize_dynamic(
                model,
                str(temporary),
                op_types_to_quantize=["MatMul"],
                per_channel=settings.config.per_channel,
                reduce_range=settings.reduce_range,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=[node.name for node in linears.values()],
                # Contrib operators end ONNX's inference of types.
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        if kept is not None:
            made = onnx.load(str(temporary))
            keep_tied_head(made, kept)
            save_onnx(made, temporary)
        missing = set(linears) - set(quantized_linears(temporary))
        if missing:
            raise EngineError(
                f"expected ONNX Runtime's quantizer to quantize {min(missing)}, found it unchanged; export the model "
                "again with another opset"
            )


def _calibrate(
    model: onnx.ModelProto, linears: Mapping[str, onnx.NodeProto], batches: Sequence[ArrayBatch], config: Int8Config
) -> dict[str, ActivationRange]:
    readers: dict[str, str] = {}
    for name, node in linears.items():
        readers.setdefault(node.input[0], name)  # q, k and v read one tensor
    ranges = tensor_ranges(model, readers, batches, config)
    return {name: ranges[node.input[0]] for name, node in linears.items()}


def _scales(
    model: onnx.ModelProto,
    linears: Mapping[str, onnx.NodeProto],
    ranges: Mapping[str, ActivationRange | LinearScales],
    settings: Int8Settings,
) -> dict[str, LinearScales]:
    per_channel, limit = settings.config.per_channel, settings.weight_limit
    weights = {item.name: item for item in model.graph.initializer}
    scales = {}
    for name, node in linears.items():
        if name not in ranges:
            raise UsageError(f"expected a range for {name}, found none; name it in keep_fp32 or calibrate it")
        given = ranges[name]
        weight = numpy_helper.to_array(weights[node.input[1]]).T  # [out, in]
        if isinstance(given, ActivationRange):
            if not -np.inf < given.low <= given.high < np.inf:
                raise UsageError(
                    f"expected a finite range with low <= high for {name}, found {given}; measure it again"
                )
            w = weight_scales(weight, per_channel=per_channel, limit=limit)
            activation = activation_parameters(given.low, given.high)
            given = LinearScales(*activation, tuple(map(float, w)), limit)
        _check_scales(name, given, len(weight) if per_channel else 1, limit)
        scales[name] = given
    return scales


def _check_scales(name: str, scales: LinearScales, n_weight_scales: int, limit: int) -> None:
    if scales.weight_limit != limit:
        raise UsageError(
            f"expected scales of {name} for weights within ±{limit}, found ±{scales.weight_limit}; quantize with the "
            "reduce_range that was trained with"
        )
    if len(scales.weight_scale) != n_weight_scales:
        raise UsageError(
            f"expected {n_weight_scales} weight scale(s) for {name}, found {len(scales.weight_scale)}; quantize with "
            "the per_channel that was trained with, and the model that was trained"
        )
    positive = all(0 < scale < np.inf for scale in (scales.activation_scale, *scales.weight_scale))
    if not positive or not 0 <= scales.activation_zero_point <= ACTIVATION_LEVELS:
        raise UsageError(
            f"expected positive scales and a zero point in 0 … {ACTIVATION_LEVELS} for {name}, found others; "
            "train the scales again"
        )


def _insert_pairs(
    model: onnx.ModelProto, linears: Mapping[str, onnx.NodeProto], scales: Mapping[str, LinearScales]
) -> None:
    """Put QuantizeLinear and DequantizeLinear before the linears, in place; weights become int8."""
    graph = model.graph
    weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    pairs: dict[tuple[str, float, int], str] = {}  # (tensor, scale, zero point) → dequantized tensor
    by_node = {node.name: scales[name] for name, node in linears.items()}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name in by_node and node.op_type == "MatMul":
            chosen = by_node[node.name]
            tensor, zero_point = node.input[0], chosen.activation_zero_point
            key = (tensor, chosen.activation_scale, zero_point)
            if key not in pairs:
                pairs[key] = f"{tensor}_dequantized_{len(pairs)}"
                parameters = _constants(graph, pairs[key], np.float32(key[1]), np.uint8(zero_point))
                quantized = f"{tensor}_quantized_{len(pairs)}"
                nodes.append(_node("QuantizeLinear", [tensor, *parameters], quantized))
                nodes.append(_node("DequantizeLinear", [quantized, *parameters], pairs[key]))
            scale = np.array(chosen.weight_scale, np.float32)  # [1] or [out]
            integers = (weights[node.input[1]] / scale).round().clip(-chosen.weight_limit, chosen.weight_limit)
            stored = numpy_helper.from_array(integers.astype(np.int8), f"{node.name}_weight_int8")  # [in, out]
            graph.initializer.append(stored)
            scale = scale.squeeze(0) if scale.size == 1 else scale
            parameters = _constants(graph, stored.name, scale, np.zeros(scale.shape, np.int8))
            # axis: of the outputs; without meaning for a single scale
            nodes.append(_node("DequantizeLinear", [stored.name, *parameters], f"{node.name}_weight", axis=1))
            node.input[:] = [pairs[key], f"{node.name}_weight"]
        nodes.append(node)
    replace_nodes(graph, nodes)


def _keep_matmuls(model: onnx.ModelProto) -> None:
    """Give the biases of quantized linears the shape ``[1, 1, out]``, in a graph of static shapes.

    With ``[out]`` ONNX Runtime merges MatMul and Add to a Gemm before it looks for integers, and computes in float32.
    """
    graph = model.graph
    if not all(axis.dim_value for item in graph.input for axis in item.type.tensor_type.shape.dim):
        return
    biases = {item.name: item for item in graph.initializer if len(item.dims) == 1}
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = {
        node.output[0] for node in graph.node if node.op_type == "MatMul" and dequantized.issuperset(node.input)
    }
    for node in graph.node:
        for product, place in ((0, 1), (1, 0)):
            if node.op_type == "Add" and node.input[product] in products and node.input[place] in biases:
                bias = numpy_helper.to_array(biases[node.input[place]])
                # A copy: equal biases are stored once, and other nodes read them, too.
                stored = numpy_helper.from_array(bias.reshape(1, 1, -1), f"{node.name}_bias")
                graph.initializer.append(stored)
                node.input[place] = stored.name
    drop_unread(graph)


def _node(op_type: str, inputs: list[str], output: str, axis: int | None = None) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], name=f"{output}_{op_type}", axis=axis)


def _constants(graph: onnx.GraphProto, name: str, scale: Any, zero_point: Any) -> list[str]:
    names = [f"{name}_scale", f"{name}_zero_point"]
    for constant, value in zip(names, (scale, zero_point), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), constant))
    return names
