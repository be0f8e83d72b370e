"""Embeddings of images, and SigLIP's of texts: as transformers makes them; dense, pruned, reloaded and in ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import normalize

from tests.helpers.image_data import image_rows
from tests.helpers.models import IMAGE_TYPES, random_entries, save_dense, tiny_tokenizer
from tests.helpers.sentence_models import TEXTS
from tests.helpers.towers import PROJECTION, TOWER_TYPES, features, save_whole, tower
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import CorruptArtifactError, RecipeError, UnsupportedModelError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport, with_embedding_head
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.partner import partner_of
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import DataConfig, ExportConfig, ModelConfig, parse_recipe
from ziplm_deploy.run.partner import embed_by
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3}
LENGTH = 40  # of SigLIP's texts here
OF_TEXTS = pytest.mark.skipif("siglip_text_model" not in TOWER_TYPES, reason="transformers 4 has no such type")


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return with_own_settings(
        ModelConfig.model_validate({"path": str(folder), "task": "image-feature-extraction", **changes})
    )


def embedded(model: ModelConfig, raw: list[dict[str, Any]], function: Any = None) -> np.ndarray:
    """As a run makes them: rows of a file, the loaded model or a file, batches."""
    dense, processor = load_dense(model)
    task: Any = get_task(model)
    rows = task.normalize_rows(raw, DataConfig(calibration=f"{model.path}/images.jsonl"), "calibration")
    return np.asarray(task.embed(function or torch_function(task, dense), EvaluationSet(rows, processor, LENGTH, 4)))


def pixels(folder: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    return torch.as_tensor(processor(images=images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("model_type", IMAGE_TYPES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_encoders_of_images_are_pooled_as_their_users_do(model_type: str, pooling: str, tmp_path: Path) -> None:
    save_dense(tmp_path, model_type, "image-classification")
    rows = image_rows(tmp_path, 5)
    original = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = original(pixel_values=pixels(tmp_path, rows)).last_hidden_state
    patches = hidden[:, -4:]  # of 16 pixels in patches of 8; before them a class, and DeiT's token of distillation
    assert hidden.shape[1] == (6 if model_type == "deit" else 5)
    expected = {"cls": hidden[:, 0], "mean": patches.mean(1), "max": patches.amax(1)}[pooling]
    np.testing.assert_allclose(embedded(settings(tmp_path, pooling=pooling), rows), normalize(expected), atol=1e-5)
    bare = embedded(settings(tmp_path, pooling=pooling, normalize=False), rows)
    np.testing.assert_allclose(bare, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_embed_images_as_their_own_methods(kind: str, tmp_path: Path) -> None:
    whole = save_whole(tmp_path, kind)
    rows = image_rows(tmp_path, 5)
    expected = features(whole, pixel_values=pixels(tmp_path, rows))
    assert expected.shape == (5, PROJECTION if kind == "clip" else 32)
    model = settings(tmp_path)
    np.testing.assert_allclose(embedded(model, rows), expected, atol=2e-5)
    by_partner = embed_by(model, [{"image": tmp_path / row["image"]} for row in rows])
    np.testing.assert_allclose(by_partner, expected, atol=2e-5)


@pytest.mark.parametrize("model_type", ["vit", "dinov2", "clip", "siglip"])
@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_members_embed_images_alike_everywhere(model_type: str, shapes: str, tmp_path: Path) -> None:
    if model_type in IMAGE_TYPES:
        save_dense(tmp_path, model_type, "image-classification")
    else:
        save_whole(tmp_path, model_type)
    rows, model = image_rows(tmp_path, 5), settings(tmp_path)
    dense, processor = load_dense(model)
    member = resize(dense, random_entries(dense, SIZES))
    save_member(tmp_path / "member", member, processor, model, {})
    reloaded = load(tmp_path / "member")
    raw = {"name": "x", "model": model.model_dump(), "speedups": [2], "export": {"shapes": shapes}}
    export = OnnxExport.from_recipe(parse_recipe(raw), get_task(model))
    assert export.output_names == ["image_embeds"]
    file = tmp_path / "member" / "model.onnx"
    assert export.write(reloaded, file, "member") < 1e-4
    task: Any = get_task(model)
    expected = embedded(model, rows, torch_function(task, member))
    assert float(np.abs(expected - embedded(model, rows)).max()) > 1e-3, "pruned"
    np.testing.assert_allclose(embedded(model, rows, torch_function(task, reloaded)), expected, atol=1e-6)
    if shapes == "dynamic":
        np.testing.assert_allclose(embedded(model, rows, onnx_runner(file)), expected, atol=1e-4)


@OF_TEXTS
def test_siglip_reads_texts_filled_up_to_one_length(tmp_path: Path) -> None:
    whole = save_whole(tmp_path, "siglip")
    model = settings(tmp_path, task="sentence-similarity")
    tokenizer = tiny_tokenizer(tmp_path / "words")
    padded = tokenizer(TEXTS, padding="max_length", max_length=LENGTH, return_tensors="pt")
    expected = features(whole, input_ids=padded["input_ids"])
    raw = [{"text": text} for text in TEXTS]
    np.testing.assert_allclose(embedded(model, raw), expected, atol=2e-5)
    np.testing.assert_allclose(embed_by(model, raw), expected, atol=2e-5)
    dense, _ = load_dense(model)
    workload = {"workload": {"seq_len": LENGTH}}
    recipe = {"name": "x", "model": model.model_dump(), "speedups": [2], "environment": workload}
    export = OnnxExport.from_recipe(parse_recipe({**recipe, "export": {"shapes": "static"}}), get_task(model))
    member = resize(dense, random_entries(dense, SIZES))
    save_member(tmp_path / "member", member, tokenizer, model, {})
    assert not (tmp_path / "member" / "modules.json").exists(), "sentence-transformers has no such pooling"
    file = tmp_path / "member" / "model.onnx"
    assert export.write(load(tmp_path / "member"), file, "member") < 1e-4
    run = onnx_runner(file)
    assert run({"input_ids": padded["input_ids"][:1].numpy()})["sentence_embedding"].shape == (1, 32)
    with pytest.raises(Exception, match="input_ids"):  # another length is no input of this graph
        run({"input_ids": padded["input_ids"][:1, :9].numpy()})


@OF_TEXTS
def test_a_text_is_embedded_alike_in_any_batch(tmp_path: Path) -> None:
    save_whole(tmp_path, "siglip")
    model = settings(tmp_path, task="sentence-similarity")
    one = np.concatenate([embedded(model, [{"text": text}]) for text in TEXTS])
    np.testing.assert_allclose(embedded(model, [{"text": text} for text in TEXTS]), one, atol=1e-5)


def test_the_partner_of_a_tower_is_the_other_one(tmp_path: Path) -> None:
    save_whole(tmp_path / "whole")
    images = settings(tmp_path / "whole")
    texts = partner_of(images)
    assert (texts.task, texts.pooling) == ("sentence-similarity", "lasttoken")
    assert partner_of(texts) == images
    tower("clip_vision_model").save_pretrained(tmp_path / "alone")  # type: ignore[operator]
    with pytest.raises(UnsupportedModelError, match=r"\(clip, siglip\).*clip_vision_model without its partner"):
        partner_of(settings(tmp_path / "alone"))
    save_dense(tmp_path / "vit", "vit", "image-classification")
    with pytest.raises(UnsupportedModelError, match="found a vit; give the whole model"):
        partner_of(settings(tmp_path / "vit"))


def test_settings_that_images_cannot_have_are_refused(tmp_path: Path) -> None:
    save_whole(tmp_path / "clip")
    save_dense(tmp_path / "vit", "vit", "image-classification")
    with pytest.raises(ValueError, match="images, which have no last token"):
        settings(tmp_path / "vit", pooling="lasttoken")
    with pytest.raises(RecipeError, match=r"found model\.pooling: pooler, the head that towers"):
        settings(tmp_path / "vit", pooling="pooler")
    with pytest.raises(RecipeError, match=r'expected model\.pooling: "pooler"'):
        settings(tmp_path / "clip", pooling="cls")
    model = settings(tmp_path / "vit")
    dense, _ = load_dense(model)
    with pytest.raises(RecipeError, match=r"embed_in_graph: true for images"):
        with_embedding_head(dense, model, ExportConfig(embed_in_graph=False))
    save_dense(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match=r"reads images .* found a bert, which reads texts"):
        load_dense(settings(tmp_path / "bert"))
    with pytest.raises(UnsupportedModelError, match=r"reads texts .* found a vit, which reads images"):
        load_dense(ModelConfig(path=str(tmp_path / "vit"), task="sentence-similarity"))


def test_damaged_towers_of_images_are_refused(tmp_path: Path) -> None:
    save_whole(tmp_path / "whole")
    fields = json.loads((tmp_path / "whole" / "config.json").read_text())
    vision = fields["vision_config"]
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"vision_config": None}, CorruptArtifactError, "settings of a tower as vision_config"),
        ({"projection_dim": 8}, CorruptArtifactError, "visual_projection"),
        ({"projection_dim": 0}, CorruptArtifactError, r"config\.json"),
    ]
    for changes, kind, said in cases:
        (tmp_path / "whole" / "config.json").write_text(json.dumps({**fields, **changes}))
        with pytest.raises(kind, match=said):
            load_dense(ModelConfig(path=str(tmp_path / "whole"), task="image-feature-extraction"))
    (tmp_path / "whole" / "config.json").write_text(
        json.dumps({**fields, "model_type": "siglip", "vision_config": {**vision, "vision_use_head": False}})
    )
    with pytest.raises(UnsupportedModelError, match="vision_use_head: false"):
        load_dense(ModelConfig(path=str(tmp_path / "whole"), task="image-feature-extraction"))
