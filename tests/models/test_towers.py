"""Towers of CLIP and SigLIP: masked ≡ resized ≡ reloaded ≡ ONNX; CLIP's texts as transformers itself embeds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import normalize
from typer.testing import CliRunner

from exporters import ExportSettings, check_parity
from tests.helpers.models import output_tensors, random_entries, tiny_tokenizer
from tests.helpers.sentence_models import TEXTS, by_sentence_transformers
from tests.helpers.towers import PROJECTION, TOWER_TYPES, save_whole, tower, tower_inputs
from ziplm_deploy.cli.commands import app
from ziplm_deploy.errors import CorruptArtifactError, RecipeError, UnsupportedModelError
from ziplm_deploy.models.config_file import read_config
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport, write_graph
from ziplm_deploy.models.inspection import inspect_model, layer_rows
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import layers_of, output_linear, prunable_modules
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import masked, random_resized, resize
from ziplm_deploy.recipe import DataConfig, ModelConfig, parse_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

PLANS = {
    "mixed": {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3},
    "layer dropped": {"1.attention": 0, "1.ffn": 0},
    "all dropped": {f"{layer}.{kind}": 0 for layer in range(3) for kind in ("attention", "ffn")},
}
CONFIGS = {"text": ModelConfig(path="", task="fill-mask"), "vision": ModelConfig(path="", task="image-classification")}


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": "sentence-similarity", **changes})


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("model_type", TOWER_TYPES)
def test_each_module_has_its_linear_and_each_layer_its_parameters(model_type: str) -> None:
    model = tower(model_type)
    linears = [output_linear(model, module) for module in prunable_modules(model)]
    called: list[torch.nn.Module] = []
    for linear in linears:
        linear.register_forward_pre_hook(lambda module, _: called.append(module))
    output_tensors(model, tower_inputs(model))
    assert [id(module) for module in called] == [id(linear) for linear in linears]
    assert inspect_model(model) == layer_rows(model.config)
    assert inspect_model(model)[0]["parameters"] == sum(each.numel() for each in layers_of(model)[0].parameters())


@pytest.mark.parametrize("model_type", TOWER_TYPES)
def test_masked_equals_resized_equals_reloaded_equals_onnx(model_type: str, tmp_path: Path) -> None:
    dense = tower(model_type)
    inputs = tower_inputs(dense)
    before = output_tensors(dense, inputs)
    for name, sizes in PLANS.items():
        entries = random_entries(dense, sizes)
        resized = resize(dense, entries)
        found = output_tensors(resized, inputs)
        assert largest(output_tensors(masked(dense, entries), inputs), found) < 1e-5
        assert largest(before, found) > 1e-3
        folder = tmp_path / name
        save_member(folder, resized, tiny_tokenizer(tmp_path), CONFIGS[model_type.split("_")[1]], {})
        assert largest(output_tensors(load(folder), inputs), found) < 1e-5
        traced = write_graph(resized, folder / "model.onnx", list(found), ExportSettings(seq_len=24), "onnxruntime")
        assert check_parity(resized, folder / "model.onnx", (traced, inputs), atol=1e-4) < 1e-4
    assert largest(before, output_tensors(dense, inputs)) == 0.0


@pytest.mark.parametrize("model_type", TOWER_TYPES)
def test_pruned_twice_equals_pruned_once(model_type: str) -> None:
    dense = tower(model_type)
    inputs, sizes = tower_inputs(dense), {"0.attention": 2, "1.ffn": 17, "2.attention": 1}
    twice = random_resized(random_resized(dense, {"0.attention": 3, "1.ffn": 40, "2.attention": 3}), sizes)
    assert largest(output_tensors(random_resized(dense, sizes), inputs), output_tensors(twice, inputs)) < 1e-6


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP model, and its text tower as a model of its own, both as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    save_whole(folder / "whole")
    text: Any = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "whole")
    text.save_pretrained(folder / "text")
    transformers.CLIPTextModel.from_pretrained(folder / "text").save_pretrained(folder / "bare")
    for name in ("text", "bare"):
        tiny_tokenizer(folder / name / "words").save_pretrained(folder / name)
    return folder


def embedded_by_transformers(folder: Path) -> np.ndarray:
    """Text embeddings of CLIP's own loader, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    rows = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds)
    return normalize(torch.cat(rows)).numpy()


def embedded(model: ModelConfig) -> np.ndarray:
    """As a run makes them: rows of a file, the loaded model, batches with padding."""
    dense, processor = load_dense(model)
    task: Any = get_task(with_own_settings(model))
    rows = task.normalize_rows([{"text": text} for text in TEXTS], DataConfig(), "calibration")
    return np.asarray(task.embed(torch_function(task, dense), EvaluationSet(rows, processor, 40, 4)))


def test_texts_are_embedded_as_by_their_own_loader(clip: Path) -> None:
    expected = embedded_by_transformers(clip / "whole")
    assert expected.shape == (len(TEXTS), PROJECTION)
    for name in ("whole", "text"):
        np.testing.assert_allclose(embedded(settings(clip / name)), expected, atol=2e-5)
    assert embedded(settings(clip / "bare")).shape == (len(TEXTS), 32)  # without a projection


def test_a_member_of_the_text_tower_embeds_alike_everywhere(clip: Path, tmp_path: Path) -> None:
    model = settings(clip / "whole")
    complete = with_own_settings(model)
    dense, processor = load_dense(model)
    raw = {"name": "x", "model": complete.model_dump(), "speedups": [2], "environment": {"workload": {"seq_len": 16}}}
    export = OnnxExport.from_recipe(parse_recipe(raw), get_task(complete))
    for name, sizes in (("dense", {}), ("pruned", PLANS["mixed"])):
        member = resize(dense, random_entries(dense, sizes))
        save_member(tmp_path / name, member, processor, model, {})
        assert export.write(load(tmp_path / name), tmp_path / name / "model.onnx", name) < 1e-4
    pytest.importorskip("optimum.onnxruntime", reason="optimum is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    own, _ = by_sentence_transformers([tmp_path / "dense", tmp_path / "pruned"], TEXTS, tmp_path, backend="onnx")
    np.testing.assert_allclose(own, embedded_by_transformers(clip / "whole"), atol=1e-4)


def test_towers_that_a_task_cannot_take_are_refused(clip: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the two towers of a clip; name one \(inspect --tower text"):
        inspect_model(clip / "whole")
    rows = {side: inspect_model(clip / "whole", side) for side in ("text", "image")}  # type: ignore[arg-type]
    assert rows["text"] == inspect_model(clip / "text")
    assert rows["image"] != rows["text"]
    shown = CliRunner().invoke(app, ["inspect", str(clip / "whole"), "--tower", "image", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["layers"] == rows["image"]
    assert CliRunner().invoke(app, ["inspect", str(clip / "whole"), "--tower", "both"]).exit_code == 2
    with pytest.raises(UnsupportedModelError, match="found a clip_vision_model; choose another task"):
        load_dense(ModelConfig(path=str(clip / "whole"), task="image-classification"))
    with pytest.raises(UnsupportedModelError, match=r"reads images for .*, found a clip_text_model, which reads texts"):
        load_dense(ModelConfig(path=str(clip / "text"), task="image-feature-extraction"))
    with pytest.raises(RecipeError, match=r'expected model\.pooling: "lasttoken"'):
        load_dense(settings(clip / "whole", pooling="mean"))


def test_damaged_checkpoints_are_refused(clip: Path, tmp_path: Path) -> None:
    fields = json.loads((clip / "whole" / "config.json").read_text())
    text = fields["text_config"]
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"text_config": None}, CorruptArtifactError, "settings of a tower as text_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, UnsupportedModelError, "auto_map"),
        ({"text_config": {**text, "num_hidden_layers": 4}}, CorruptArtifactError, "4 layers"),
        ({"projection_dim": 8}, CorruptArtifactError, "projection"),
        ({"projection_dim": 0}, CorruptArtifactError, r"config\.json"),
    ]
    for number, (changes, kind, said) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in (clip / "whole").iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps({**fields, **changes}))
        with pytest.raises(kind, match=said):
            load_dense(settings(folder))


def test_texts_padded_on_the_left_are_refused(tmp_path: Path) -> None:
    save_whole(tmp_path / "model")
    words = transformers.BertTokenizerFast.from_pretrained(tmp_path / "model" / "words", padding_side="left")
    words.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="pads on the right for an encoder"):
        load_dense(settings(tmp_path / "model"))


def test_older_settings_of_a_tower_count_as_in_transformers(tmp_path: Path) -> None:
    save_whole(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    older = {name: fields["text_config"][name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    path.write_text(json.dumps({**fields, "text_config_dict": {**older, "layer_norm_eps": 0.1}}), encoding="utf-8")
    expected = transformers.AutoConfig.from_pretrained(tmp_path).text_config
    found = read_config(str(tmp_path), trust_remote_code=False, reads="text")
    for name in ("hidden_act", "layer_norm_eps", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.layer_norm_eps == 0.1


def test_damaged_class_names_of_a_tower_end_in_no_traceback(tmp_path: Path) -> None:
    save_whole(tmp_path)
    path = tmp_path / "config.json"
    inner = json.loads(path.read_text(encoding="utf-8"))["text_config"]
    path.write_text(json.dumps({**inner, "model_type": "clip_text_model", "architectures": 5}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="architectures: 5"):
        load_dense(settings(tmp_path))
