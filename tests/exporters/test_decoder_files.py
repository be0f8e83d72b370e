"""Files of causal language models: names, operators, weights beside, caches in place, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from exporters import DecoderExportSettings, ExportError, check_decoder_parity, export_decoder
from exporters.decoder_cache import cache_arrays
from exporters.decoder_parts import DecoderParts, DroppedPart, LinearPart, NormPart, RotaryPart
from exporters.names import linear_of
from exporters.parity import parity_session
from tests.helpers.decoder_cuts import dropped, keep_groups, keep_width, with_layers
from tests.helpers.decoder_models import (
    HIDDEN,
    POSITIONS,
    VOCABULARY,
    causal_model,
    decoder_parts,
    skip_where_windows_are_wrong,
    token_ids,
)
from tests.helpers.decoder_reference import greedy, reference_logits
from tests.helpers.onnx_models import kernels_of

FORMS = ("onnxruntime", "portable")
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def llama() -> DecoderParts:
    return decoder_parts(causal_model("llama", head_dim=16))


@pytest.fixture(scope="module")
def uneven(llama: DecoderParts) -> DecoderParts:
    """Layers with 2, 1 and no cached heads."""
    return with_layers(llama, {1: keep_groups(1), 2: dropped("attention")})


def exported(parts: DecoderParts, folder: Path, **changes: Any) -> Path:
    path = folder / "model.onnx"
    export_decoder(parts, path, DecoderExportSettings(**{"max_length": MAX_LENGTH, **changes}))
    return path


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    return {item.key: item.value for item in model.metadata_props}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_outputs_are_those_that_runtimes_know(uneven: DecoderParts, form: str, tmp_path: Path) -> None:
    session = parity_session(exported(uneven, tmp_path, form=form))
    positions = ["position_ids"] if form == "portable" else []
    caches = [f"past_key_values.{layer}.{role}" for layer in (0, 1) for role in ("key", "value")]
    inputs = {item.name: item.shape for item in session.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", *positions, *caches]
    assert inputs["past_key_values.1.key"] == ["batch", 1, "past", 16]
    outputs = {item.name: item.shape for item in session.get_outputs()}
    assert list(outputs) == ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    assert outputs["logits"] == ["batch", 1, VOCABULARY]


def test_nodes_say_which_linear_they_are(uneven: DecoderParts, tmp_path: Path) -> None:
    nodes = onnx.load(exported(uneven, tmp_path)).graph.node
    named = [linear_of(node.name) for node in nodes if linear_of(node.name)]
    feed_forwards = [f"layers.{layer}.feed_forward.{name}" for layer in range(3) for name in ("gate", "up", "down")]
    attentions = [f"layers.{layer}.attention.{name}" for layer in range(2) for name in ("qkv", "output")]
    assert sorted(named) == sorted([*feed_forwards, *attentions, "head"])
    assert [node.name for node in nodes if node.op_type == "Gemm"] == ["/head/Gemm"]


def test_portable_products_of_activations_are_no_linears(uneven: DecoderParts, tmp_path: Path) -> None:
    nodes = onnx.load(exported(uneven, tmp_path, form="portable")).graph.node
    products = [node.name for node in nodes if node.op_type == "MatMul"]
    activations = {f"/layers.{layer}/attention/{name}" for layer in range(2) for name in ("scores", "context")}
    assert {name for name in products if linear_of(name) is None} == activations
    queries = {linear_of(name) for name in products if "query" in name}
    assert queries == {"layers.0.attention.query", "layers.1.attention.query"}


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_portable_form_is_standard(uneven: DecoderParts, opset: int, tmp_path: Path) -> None:
    path = exported(uneven, tmp_path, form="portable", opset=opset)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", opset)]
    expected = {"form": "portable", "opset": str(opset), "contrib_ops": "", "max_length": str(MAX_LENGTH)}
    assert metadata_of(model) == expected | {"onnxruntime": ">=1.19"}
    check_decoder_parity(lambda ids: reference_logits(uneven, ids), path, [[5, 6, 7], [8]], 1e-4)


def test_contrib_operators_are_told(uneven: DecoderParts, tmp_path: Path) -> None:
    metadata = metadata_of(onnx.load(exported(uneven, tmp_path, opset=18)))
    operators = "GroupQueryAttention, QuickGelu, SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization"
    expected = {"form": "onnxruntime", "opset": "18", "contrib_ops": operators, "max_length": str(MAX_LENGTH)}
    assert metadata == expected | {"onnxruntime": ">=1.20"}


@pytest.mark.parametrize(("window", "oldest"), [(None, ">=1.20"), (MAX_LENGTH, ">=1.20"), (MAX_LENGTH - 1, ">=1.24")])
def test_windows_that_matter_need_a_newer_engine(
    llama: DecoderParts, window: int | None, oldest: str, tmp_path: Path
) -> None:
    model = onnx.load(exported(changed(llama, "attention", window=window), tmp_path))
    assert metadata_of(model)["onnxruntime"] == oldest
    windows = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "local_window_size"
    ]
    assert windows == ([window] if oldest == ">=1.24" else [])


def test_dropped_blocks_leave_no_nodes(llama: DecoderParts, tmp_path: Path) -> None:
    def kinds(parts: DecoderParts) -> list[str]:
        return [node.op_type for node in onnx.load(exported(parts, tmp_path)).graph.node]

    empty = dataclasses.replace(llama, layers=())
    nothing = with_layers(llama, dict.fromkeys(range(3), dropped("attention", "feed_forward")))
    assert kinds(nothing) == kinds(empty)
    constants = with_layers(llama, dict.fromkeys(range(3), dropped("attention", bias=torch.ones(HIDDEN))))
    assert kinds(constants).count("Sum") == 3


@pytest.mark.parametrize("form", FORMS)
def test_tied_embeddings_are_written_once(llama: DecoderParts, form: str, tmp_path: Path) -> None:
    tensors = onnx.load(exported(llama, tmp_path, form=form)).graph.initializer
    assert [tensor.name for tensor in tensors if VOCABULARY in tensor.dims] == ["embedding.weight"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_beside_give_the_same_logits(uneven: DecoderParts, form: str, tmp_path: Path) -> None:
    inside = exported(uneven, tmp_path / "inside", form=form)
    beside = exported(uneven, tmp_path / "beside", form=form, max_file_bytes=0)
    assert sorted(path.name for path in beside.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    places = {
        entry.value
        for tensor in onnx.load(beside, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx.data"}
    assert beside.stat().st_size < inside.stat().st_size / 2
    tensors = [
        {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(p).graph.initializer}
        for p in (inside, beside)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():
        np.testing.assert_array_equal(values, tensors[1][name])
    check_decoder_parity(lambda ids: reference_logits(uneven, ids), beside, [[5, 6, 7], [8]], 1e-4)


def test_weights_go_beside_above_the_limit_only(llama: DecoderParts, tmp_path: Path) -> None:
    size = exported(llama, tmp_path).stat().st_size
    assert not exported(llama, tmp_path, max_file_bytes=size).with_name("model.onnx.data").exists()
    assert exported(llama, tmp_path, max_file_bytes=size // 2).with_name("model.onnx.data").exists()
    # What nothing refers to any more is gone.
    assert not exported(llama, tmp_path).with_name("model.onnx.data").exists()


@pytest.mark.parametrize("max_file_bytes", [0, 2**30])
def test_failed_export_leaves_the_old_files(llama: DecoderParts, max_file_bytes: int, tmp_path: Path) -> None:
    path = exported(llama, tmp_path, max_file_bytes=max_file_bytes)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    # A tensor without values: what goes wrong does so after others were written.
    broken = dataclasses.replace(
        llama, final_norm=dataclasses.replace(llama.final_norm, weight=torch.ones(HIDDEN, device="meta"))
    )
    with pytest.raises(NotImplementedError):
        export_decoder(broken, path, DecoderExportSettings(MAX_LENGTH, max_file_bytes=max_file_bytes))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize("max_file_bytes", [0, 2**30])
def test_folder_that_is_a_file(llama: DecoderParts, max_file_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match="file"):
        exported(llama, tmp_path / "file", max_file_bytes=max_file_bytes)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


UNTOUCHED = 7.0


def rows_in_place(path: Path, cache: dict[str, np.ndarray], prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """Greedy answers with one buffer of full length bound as past and present; what comes after them must stay."""
    session = parity_session(path)
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array + UNTOUCHED) for name, array in cache.items()}
    rows = [list(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = np.array([row + [0] * (longest - len(row)) for row in rows])
    for _ in range(n_tokens):
        lengths = np.array([[len(row)] for row in rows])
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", (np.arange(lengths.max()) < lengths).astype(np.int64))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        for row, logits in zip(rows, binding.get_outputs()[-1].numpy(), strict=True):
            row.append(int(logits[-1].argmax()))
        ids = np.array([[row[-1]] for row in rows])
    for buffer in buffers.values():
        for row, kept in zip(rows, buffer.numpy(), strict=True):
            assert (kept[:, : len(row) - 1] != UNTOUCHED).all()
            # A copy of the whole cache would not keep to its place.
            assert (kept[:, max(len(row) - 1, longest) :] == UNTOUCHED).all()
    return rows


@pytest.mark.parametrize("stock_optimum", [False, True])
@pytest.mark.parametrize("case", ["llama", "llama-narrow", "qwen3", "mistral", "gpt2"])
def test_cache_stays_in_place(case: str, stock_optimum: bool, tmp_path: Path) -> None:
    skip_where_windows_are_wrong(case, "onnxruntime")
    parts = with_layers(decoder_parts(causal_model(case)), {1: keep_groups(1), 2: dropped("attention")})
    path = exported(parts, tmp_path, stock_optimum=stock_optimum)
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (6, 3, 8)]
    for batch in (prompts[:1], prompts):
        cache = cache_arrays(parts, len(batch), MAX_LENGTH)
        expected = [greedy(parts, torch.tensor([prompt]), 10) for prompt in batch]
        assert rows_in_place(path, cache, batch, 10) == expected


def test_layer_norms_stay_single_in_sessions(tmp_path: Path) -> None:
    """ONNX Runtime merges Add and LayerNormalization into a slow kernel."""
    path = exported(decoder_parts(causal_model("gpt2")), tmp_path)
    kernels = kernels_of(path)
    assert kernels["LayerNormalization"] == 7
    assert kernels["SkipLayerNormalization"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_stock_optimum_may_start_with_other_heads(uneven: DecoderParts, form: str, tmp_path: Path) -> None:
    path = exported(uneven, tmp_path, form=form, stock_optimum=True)
    ids = token_ids(2, 7)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 7), np.int64)}
    if form == "portable":
        feed["position_ids"] = np.arange(7)[None].repeat(2, axis=0)
    empty = {name: np.zeros((2, 5, 0, 3), np.float32) for name in cache_arrays(uneven, 2)}
    logits, *_ = parity_session(path).run(["logits"], feed | empty)
    np.testing.assert_allclose(logits, reference_logits(uneven, ids)[:, -1:].numpy(), atol=1e-4)
    check_decoder_parity(lambda ids: reference_logits(uneven, ids), path, [[5, 6, 7], [8]], 1e-4)


def changed(parts: DecoderParts, block: str, **changes: Any) -> DecoderParts:
    """Parts whose second layer has another block."""
    layer = parts.layers[1]
    layer = dataclasses.replace(layer, **{block: dataclasses.replace(getattr(layer, block), **changes)})
    return dataclasses.replace(parts, layers=(parts.layers[0], layer, *parts.layers[2:]))


def linear(out: int, size: int) -> LinearPart:
    return LinearPart(torch.zeros(out, size))


RMS = NormPart("rms", torch.ones(HIDDEN), 1e-6)
BAD_PARTS: dict[str, tuple[Any, str]] = {
    "heads that do not divide": (lambda p: changed(p, "attention", n_heads=3), "4|groups"),
    "no cached heads": (lambda p: changed(p, "attention", n_kv_heads=0), "equal groups"),
    "head count without its rows": (lambda p: changed(p, "attention", n_heads=2), r"attention\.query\.weight"),
    "activation": (lambda p: changed(p, "feed_forward", activation="swish"), "found swish"),
    "width": (lambda p: changed(p, "feed_forward", down=linear(HIDDEN, 63)), r"feed_forward\.down\.weight"),
    "no width": (lambda p: with_layers(p, {1: keep_width(0)}), "leave a DroppedPart"),
    "gate": (lambda p: changed(p, "feed_forward", gate=linear(63, HIDDEN)), r"feed_forward\.gate\.weight"),
    "window": (lambda p: changed(p, "attention", window=0), "at least 1 token"),
    "query norm": (lambda p: changed(p, "attention", query_norm=RMS), r"query_norm\.weight"),
    "no norm": (lambda p: with_layers(p, {1: lambda x: dataclasses.replace(x, attention_norm=None)}), "a norm before"),
    "vocabulary": (lambda p: dataclasses.replace(p, head=linear(VOCABULARY + 1, HIDDEN)), r"head\.weight"),
    "hidden": (lambda p: dataclasses.replace(p, embedding=torch.zeros(VOCABULARY, HIDDEN + 1)), "cut all parts"),
    "bias of a dropped block": (
        lambda p: with_layers(p, {1: lambda x: dataclasses.replace(x, attention=DroppedPart(torch.zeros(3)))}),
        r"layers\[1\]\.attention\.bias",
    ),
    "bias of an RMSNorm": (
        lambda p: dataclasses.replace(p, final_norm=dataclasses.replace(RMS, bias=torch.zeros(HIDDEN))),
        "expected no bias in final_norm",
    ),
    "epsilon": (lambda p: dataclasses.replace(p, final_norm=dataclasses.replace(RMS, epsilon=float("nan"))), "epsilon"),
    "rotary": (lambda p: dataclasses.replace(p, rotary=RotaryPart(torch.ones(9))), "at most 8 rotary frequencies"),
    "positions": (lambda p: dataclasses.replace(p, positions=torch.zeros(3, HIDDEN)), "learned positions"),
    "positions' width": (lambda p: dataclasses.replace(p, positions=torch.zeros(POSITIONS, 3)), "positions of shape"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_parts_are_refused(llama: DecoderParts, name: str, form: str, tmp_path: Path) -> None:
    change, message = BAD_PARTS[name]
    with pytest.raises(ExportError, match=message):
        exported(change(llama), tmp_path, form=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": POSITIONS + 1}, f"from 1 to {POSITIONS}, its positions, found {POSITIONS + 1}"),
        ({"max_length": 0}, "found 0"),
        ({"opset": 16}, "from 17"),
        ({"opset": 999}, "found 999"),
        ({"form": "tensorrt"}, "found tensorrt"),
    ],
)
def test_bad_settings_are_refused(llama: DecoderParts, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        exported(llama, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_heads_that_the_operator_cannot_take(tmp_path: Path) -> None:
    """GroupQueryAttention wants multiples of 8; the portable form takes any width."""
    parts = decoder_parts(causal_model("llama", head_dim=6))
    with pytest.raises(ExportError, match=r"multiples of 8 .* found 6 in layers\[0\]; choose form portable"):
        exported(parts, tmp_path)
    path = exported(parts, tmp_path, form="portable")
    check_decoder_parity(lambda ids: reference_logits(parts, ids), path, [[5, 6, 7], [8]], 1e-4)


def test_width_of_one_column_is_written(llama: DecoderParts, tmp_path: Path) -> None:
    parts = with_layers(llama, {0: keep_width(1)})
    weights = {tensor.name: list(tensor.dims) for tensor in onnx.load(exported(parts, tmp_path)).graph.initializer}
    assert weights["layers.0.feed_forward.down.weight"] == [1, HIDDEN]
