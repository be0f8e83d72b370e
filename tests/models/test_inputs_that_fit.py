"""Label maps, tokenizers and image processors that do not fit the model are refused when it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.helpers.models import output_tensors, save_dense, tiny_inputs
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError, ZipLMError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers
META = {"format": "pt"}
DEFAULT_OF_TWO = {"LABEL_0": 0, "LABEL_1": 1}


def load(folder: Path, task: str = "text-classification") -> tuple[Any, Any]:
    return load_dense(ModelConfig.model_validate({"path": str(folder), "task": task}))


def edit(folder: Path, **fields: Any) -> None:
    """Change ``config.json``; None removes a field."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    ("id2label", "label2id"),
    [
        ({"0": "a", "1": "b", "2": "c"}, None),
        (None, {"a": 0, "b": 1, "c": 2}),
        (None, {"c": "2", "a": "0", "b": "1"}),
        ({"2": "c", "0": "a", "1": "b"}, {"a": 0, "b": 1, "c": 2}),
        ({"0": "a", "1": "b", "2": "c"}, DEFAULT_OF_TWO),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, {"a": 0, "b": 1, "c": 2}),
    ],
)
def test_names_come_from_the_map_that_has_them(tmp_path: Path, id2label: Any, label2id: Any) -> None:
    save_dense(tmp_path, task="text-classification")
    edit(tmp_path, id2label=id2label, label2id=label2id)
    config = load(tmp_path)[0].config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.num_labels == 3


@pytest.mark.parametrize(
    ("id2label", "label2id", "expected"),
    [
        ({"1": "a", "2": "b", "3": "c"}, None, r"0 to n - 1 in id2label .*'1': 'a'"),
        ({"0": "a", "1": "b", "3": "c"}, None, r"0 to n - 1 in id2label"),
        (None, {"a": 1, "b": 2, "c": 3}, r"0 to n - 1 in label2id"),
        ({"0": "a", "1": "b", "2": "c"}, {"a": 2, "b": 1, "c": 0}, r"the same classes, found \{0: a.*and \{0: c"),
        ({"0": "a", "1": "b", "2": "a"}, {"a": 1, "b": 0}, r"0 to n - 1 in label2id|the same classes"),
    ],
)
def test_maps_that_number_classes_otherwise_are_refused(
    tmp_path: Path, id2label: Any, label2id: Any, expected: str
) -> None:
    save_dense(tmp_path, task="text-classification")
    edit(tmp_path, id2label=id2label, label2id=label2id)
    with pytest.raises(UnsupportedModelError, match=expected):
        load(tmp_path)


@pytest.mark.parametrize("label2id", [None, {"a": 2, "b": 1}, {"a": 0, "b": 1}])
def test_classes_that_share_a_name_are_told_apart_by_number(tmp_path: Path, label2id: Any) -> None:
    """As in ImageNet, where "crane" is a bird and a machine."""
    save_dense(tmp_path, task="text-classification")
    edit(tmp_path, id2label={"0": "a", "1": "b", "2": "a"}, label2id=label2id)
    config = load(tmp_path)[0].config
    assert config.id2label == {0: "a (0)", 1: "b", 2: "a (2)"}
    assert config.label2id == {"a (0)": 0, "b": 1, "a (2)": 2}


@pytest.mark.parametrize("id2label", [{"a": "b"}, ["a", "b", "c"], 3])
def test_maps_that_are_none_are_refused(tmp_path: Path, id2label: Any) -> None:
    save_dense(tmp_path, task="text-classification")
    edit(tmp_path, id2label=id2label)
    with pytest.raises(ZipLMError, match="expected "):
        load(tmp_path)


def test_other_tasks_and_new_heads_need_no_names(tmp_path: Path) -> None:
    save_dense(tmp_path, task="fill-mask")
    edit(tmp_path, id2label={"1": "a", "2": "b"}, label2id={"a": 7})
    load(tmp_path, "fill-mask")
    settings = ModelConfig(path=str(tmp_path), task="text-classification")
    model, _ = load_dense(settings, {"num_labels": 2, "id2label": {0: "n", 1: "y"}, "label2id": {"n": 0, "y": 1}})
    assert model.config.id2label == {0: "n", 1: "y"}  # type: ignore[union-attr]


def test_a_tokenizer_with_more_tokens_than_embeddings(tmp_path: Path) -> None:
    save_dense(tmp_path, task="text-classification", vocab_size=19)
    load(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["newt", "owl"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"tokens 0 to 18 .* found 2 more, the first 'newt' \(19\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    "like", ["layer.0.output.adapters.0.weight", "layer.1.attention.self.distance_embedding.weight"]
)
def test_weights_in_layers_that_the_model_does_not_use(tmp_path: Path, like: str) -> None:
    save_dense(tmp_path, task="text-classification")
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    extra = {f"bert.encoder.{like}": torch.zeros(2, 2), "bert.encoder.layer.0.attention.self.attn.bias": torch.zeros(2)}
    safetensors.torch.save_file(weights | {"lm.head": torch.zeros(2)} | extra, tmp_path / "model.safetensors", META)
    with pytest.raises(CorruptArtifactError, match=rf"found 1 in its layers .*, the first \S*{re.escape(like)}"):
        load(tmp_path)
    del extra[f"bert.encoder.{like}"]
    safetensors.torch.save_file(weights | {"lm.head": torch.zeros(2)} | extra, tmp_path / "model.safetensors", META)
    load(tmp_path)


def save_images(folder: Path, size: dict[str, int], **changes: Any) -> None:
    save_dense(folder, "vit", "image-classification", **changes)
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)


def test_images_of_another_shape(tmp_path: Path) -> None:
    task = "image-classification"
    save_images(tmp_path / "other", {"height": 24, "width": 24})
    with pytest.raises(UnsupportedModelError, match=r"gives 3 x 16 x 16 pixels, .* found 3 x 24 x 24"):
        load(tmp_path / "other", task)
    save_images(tmp_path / "grey", {"height": 16, "width": 16}, num_channels=1)
    with pytest.raises(UnsupportedModelError, match=r"3 channels \(RGB\), found num_channels 1"):
        load(tmp_path / "grey", task)
    save_images(tmp_path / "wide", {"height": 16, "width": 24}, image_size=[24, 16])
    with pytest.raises(UnsupportedModelError, match=r"gives 3 x 24 x 16 pixels, .* found 3 x 16 x 24"):
        load(tmp_path / "wide", task)


def test_images_that_are_no_squares(tmp_path: Path) -> None:
    save_images(tmp_path, {"height": 16, "width": 24}, image_size=[16, 24])
    model, _ = load(tmp_path, "image-classification")
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(2, 3, 16, 24)).logits.shape == (2, 3)


@pytest.mark.parametrize("task", ["text-classification", "sentence-similarity", "token-classification"])
def test_padding_on_the_left_is_refused_for_encoders(tmp_path: Path, task: str) -> None:
    """Positions and the first token would depend on what else is in a batch."""
    save_dense(tmp_path, task=task)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    with pytest.raises(UnsupportedModelError, match="pads on the left; set padding_side in its"):
        load(tmp_path, task)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa", "somebody/kernels"])
def test_settings_of_attention_do_not_matter(tmp_path: Path, name: str, attention: str) -> None:
    original = save_dense(tmp_path, task="text-classification")
    edit(tmp_path, **{name: attention, "use_flash_attn": True})
    model, _ = load(tmp_path)
    assert model.config._attn_implementation == "eager"
    inputs = tiny_inputs(original)
    torch.testing.assert_close(output_tensors(model, inputs), output_tensors(original, inputs), rtol=0, atol=0)
