"""Models of sentence-transformers, in the forms of every age: read as they say, or refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file

from exporters.heads import sentence_dense
from tests.helpers.models import random_entries, save_dense
from tests.helpers.sentence_models import TEXTS, TinySentenceModel, by_sentence_transformers, module, write
from ziplm_deploy.errors import CorruptArtifactError, RecipeError, UnsupportedModelError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.models.member_files import MEMBER_FILE, load, save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.recipe import DataConfig, ModelConfig, parse_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

PROMPTS = {"prompts": {"query": "who sat on the mat ? ", "document": ""}, "default_prompt_name": "query"}
MODELS = {
    "mean": TinySentenceModel(),
    "cls, as one name": TinySentenceModel({"pooling_mode": "cls"}, age="new"),
    "max, not normalized": TinySentenceModel({"pooling_mode_max_tokens": True}, normalize=False),
    "dense": TinySentenceModel(dense=((16, True, "Tanh"),)),
    "two dense": TinySentenceModel({"pooling_mode": ["mean"]}, dense=((24, True, "ReLU"), (8, False, None)), age="new"),
    "dense, not normalized": TinySentenceModel(dense=((8, False, "Identity"),), normalize=False),
    "texts": TinySentenceModel(texts={"max_seq_length": 7, "do_lower_case": True}, lowers=False),
    "prompt": TinySentenceModel(settings=PROMPTS, normalize=False),
    "transformer in a folder": TinySentenceModel(transformer="0_Transformer", texts={"max_seq_length": 5}),
}
DENSE = MODELS["dense"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: model.save(tmp_path_factory.mktemp("model")) for name, model in MODELS.items()}


def settings(folder: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": "sentence-similarity", **changes})


def embeddings(model: ModelConfig, texts: list[str]) -> np.ndarray:
    """As a run makes them: rows of a file, the loaded model, batches with padding."""
    dense, processor = load_dense(model)
    task: Any = get_task(with_own_settings(model))
    rows = task.normalize_rows([{"text": text} for text in texts], DataConfig(), "calibration")
    return np.asarray(task.embed(torch_function(task, dense), EvaluationSet(rows, processor, 40, 4)))


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_those_that_the_files_say(name: str, folders: dict[str, Path]) -> None:
    expected = MODELS[name].embeddings(folders[name], TEXTS)
    np.testing.assert_allclose(embeddings(settings(folders[name]), TEXTS), expected, atol=2e-5)
    plain = MODELS["mean"].embeddings(folders["mean"], TEXTS)
    assert (name == "mean") == (plain.shape == expected.shape and np.allclose(plain, expected, atol=1e-3))


@pytest.mark.slow
def test_sentence_transformers_answers_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    found = by_sentence_transformers(list(folders.values()), TEXTS, tmp_path)
    for (name, folder), expected in zip(folders.items(), found, strict=True):
        np.testing.assert_allclose(embeddings(settings(folder), TEXTS), expected, atol=2e-5, err_msg=name)


def make_member(model: ModelConfig, folder: Path, sizes: dict[str, int] | None = None) -> torch.nn.Module:
    """A member's folder with its ONNX file."""
    dense, processor = load_dense(model)
    complete = with_own_settings(model)
    member = resize(dense, random_entries(dense, sizes or {}))
    save_member(folder, member, processor, model, {})
    raw = {"name": "x", "model": complete.model_dump(), "speedups": [2], "environment": {"workload": {"seq_len": 16}}}
    export = OnnxExport.from_recipe(parse_recipe(raw), get_task(complete))
    export.write(load(folder), folder / "model.onnx", "member")
    return member


def test_sentence_transformers_opens_members_as_the_original(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its torch back end cannot: the weights have other shapes. Its ONNX back end needs optimum."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("optimum.onnxruntime", reason="optimum is not installed")
    members = [tmp_path / str(number) for number in range(len(folders))]
    for folder, member in zip(folders.values(), members, strict=True):
        make_member(settings(folder), member)
    found = by_sentence_transformers(members, TEXTS, tmp_path, backend="onnx")
    for (name, folder), answers in zip(folders.items(), found, strict=True):
        np.testing.assert_allclose(answers, MODELS[name].embeddings(folder, TEXTS), atol=1e-4, err_msg=name)


def test_a_pruned_member_keeps_its_dense_layers(tmp_path: Path, folders: dict[str, Path]) -> None:
    model, folder = settings(folders["two dense"]), tmp_path / "member"
    member = make_member(model, folder, {"0.attention": 1, "1.ffn": 20})
    loaded, task = load(folder), get_task(with_own_settings(model))
    inputs = {"input_ids": np.array([[2, 5, 7, 9, 3, 0]]), "attention_mask": np.array([[1, 1, 1, 1, 1, 0]])}
    wanted = torch_function(task, member)(inputs)["sentence_embedding"]
    np.testing.assert_array_equal(torch_function(task, loaded)(inputs)["sentence_embedding"], wanted)
    graph_inputs = {**inputs, "token_type_ids": np.zeros((1, 6), dtype=np.int64)}
    (found,) = onnxruntime.InferenceSession(folder / "model.onnx").run(["sentence_embedding"], graph_inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert wanted.shape == (1, 8)
    for number in (0, 1):
        stored = load_file(folder / f"{2 + number}_Dense" / "model.safetensors")
        source = load_file(folders["two dense"] / f"{2 + number}_Dense" / "model.safetensors")
        assert stored.keys() == source.keys()
        assert all(torch.equal(stored[key], source[key]) for key in stored)


def test_a_member_of_a_plain_model_of_before_is_loaded(tmp_path: Path, folders: dict[str, Path]) -> None:
    dense, processor = load_dense(settings(folders["mean"]))
    save_member(tmp_path, dense, processor, settings(folders["mean"]), {})
    fields = json.loads((tmp_path / MEMBER_FILE).read_text())
    assert fields.pop("dense_layers") == []
    write(tmp_path / MEMBER_FILE, {**fields, "schema_version": 1})
    assert sentence_dense(load(tmp_path)) is None


def test_what_a_member_is_opened_with_is_copied(tmp_path: Path) -> None:
    whole = {**PROMPTS, "similarity_fn_name": "dot", "truncate_dim": 16, "__version__": {"pytorch": "1"}}
    model = TinySentenceModel(texts={"max_seq_length": 7, "do_lower_case": True}, settings=whole)
    folder = model.save(tmp_path / "model")
    own = read_sentence_modules(settings(folder))
    assert (own.prompt, own.similarity, own.max_seq_length) == ("who sat on the mat ? ", "dot", 7)
    dense, processor = load_dense(settings(folder))

    def saved(**changes: Any) -> dict[str, Any]:
        save_member(tmp_path / "member", dense, processor, settings(folder, **changes), {})
        return json.loads((tmp_path / "member" / "config_sentence_transformers.json").read_text())  # type: ignore[no-any-return]

    assert saved() == whole  # sizes that embeddings may be cut to are for whoever cuts them
    assert json.loads((tmp_path / "member" / "sentence_bert_config.json").read_text()) == model.texts
    assert saved(prompt="a ")["prompts"] == {**PROMPTS["prompts"], "default": "a "}  # type: ignore[dict-item]
    assert saved(prompt="a ")["default_prompt_name"] == "default"
    assert saved(prompt="")["default_prompt_name"] is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "member")
    assert len(tokenizer("the cat sat on the mat under the tree", truncation=True)["input_ids"]) == 7


def test_a_recipe_says_nothing_against_the_model(tmp_path: Path) -> None:
    model = TinySentenceModel({"pooling_mode": "cls"}, normalize=False, settings={"similarity_fn_name": "dot"})
    folder = model.save(tmp_path)
    complete = with_own_settings(settings(folder))
    assert (complete.pooling, complete.normalize, complete.prompt, complete.similarity) == ("cls", False, "", "dot")
    agreeing = settings(folder, pooling="cls", normalize=False, similarity="dot")
    assert with_own_settings(agreeing) == complete == with_own_settings(complete)
    for field, value in (("pooling", "mean"), ("normalize", True), ("similarity", "cosine")):
        with pytest.raises(RecipeError, match=f"expected model.{field}: .*found {json.dumps(value)}"):
            load_dense(settings(folder, **{field: value}))


def test_a_plain_model_says_nothing(tmp_path: Path) -> None:
    save_dense(tmp_path)
    found = with_own_settings(settings(tmp_path))
    assert (found.pooling, found.normalize, found.prompt, found.similarity) == ("mean", True, "", "cosine")
    assert with_own_settings(settings(tmp_path, pooling="cls", normalize=False)).head == ("cls", False)
    assert found.fingerprint == {"task": "sentence-similarity", "pooling": "mean", "normalize": True}
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert with_own_settings(settings(tmp_path)).head == ("cls", True)
    with pytest.raises(RecipeError, match="pooling"):
        load_dense(settings(tmp_path, pooling="mean"))
    assert read_sentence_modules(ModelConfig(path=str(tmp_path), task="fill-mask")).pooling is None


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls [+] mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}, "none"),
        ({"pooling_mode": ["mean", "max"]}, "mean [+] max"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
    ],
)
def test_other_poolings_are_refused(pooling: dict[str, Any], found: str, tmp_path: Path) -> None:
    write(tmp_path / "modules.json", [module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")])
    write(tmp_path / "1_Pooling" / "config.json", pooling)
    with pytest.raises(UnsupportedModelError, match=f"exactly one pooling .*found {found}"):
        with_own_settings(settings(tmp_path))


BASIC = [module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")]
WHOLE = [*BASIC, module(2, "2_Dense", "Dense"), module(3, "3_Normalize", "Normalize")]


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        (
            "modules.json",
            [*BASIC, {**module(2, "2_Dropout", "Dense"), "type": "sentence_transformers.models.Dropout"}],
            "Dropout",
        ),
        ("modules.json", [{**BASIC[0], "type": "custom_st.Transformer"}, BASIC[1]], "custom_st.Transformer"),
        (
            "modules.json",
            [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}],
            r"CLIPModel\); give that folder as model\.path, of a local copy: .*/0_CLIPModel",
        ),
        ("modules.json", [BASIC[0]], "then any Dense layers .*found Transformer;"),
        ("modules.json", [*BASIC, WHOLE[3], WHOLE[2]], "found Transformer, Pooling, Normalize, Dense"),
        ("modules.json", [BASIC[0], {**BASIC[1], "path": "../other"}], "inside of"),
        ("modules.json", [{**BASIC[0], "path": "/etc"}, BASIC[1]], "inside of"),
        (
            "2_Dense/config.json",
            {"in_features": 32, "out_features": 16, "use_residual": True},
            "without use_residual: true",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 32, "out_features": 16, "module_input_name": "token_embeddings"},
            "module_input_name",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 32, "out_features": 16, "activation_function": "evil.Tanh"},
            "evil.Tanh",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 32, "out_features": 16, "activation_function": "torch.nn.Dropout"},
            "torch.nn.Dropout",
        ),
        ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 9}}}, "processing_kwargs"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "maxsim"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt: false"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(file: str, content: Any, match: str, tmp_path: Path) -> None:
    DENSE.save(tmp_path)
    write(tmp_path / "config_sentence_transformers.json", PROMPTS)
    with_own_settings(settings(tmp_path))
    write(tmp_path / file, content)
    with pytest.raises(UnsupportedModelError, match=match):
        load_dense(settings(tmp_path))


def test_code_of_a_models_own_is_refused_before_its_modules(tmp_path: Path) -> None:
    DENSE.save(tmp_path)
    write(tmp_path / "modules.json", [{**BASIC[0], "type": "custom_st.Transformer"}, BASIC[1]])
    code = {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"}
    write(tmp_path / "config.json", {"model_type": "xlm-roberta", "auto_map": code})
    with pytest.raises(UnsupportedModelError, match=r"never run; .*jina_embeddings_v3"):
        read_sentence_modules(settings(tmp_path))


def test_sizes_are_found_in_the_python_of_a_card(tmp_path: Path) -> None:
    DENSE.save(tmp_path)
    (tmp_path / "README.md").write_text("loss = MatryoshkaLoss(model, loss, matryoshka_dims=[8, 4])", encoding="utf-8")
    assert sorted(read_sentence_modules(settings(tmp_path)).dimensions or ()) == [4, 8]


def test_a_prompt_that_is_not_pooled_matters_only_where_there_is_one(tmp_path: Path) -> None:
    model = TinySentenceModel({"pooling_mode": "mean", "include_prompt": False}, settings=PROMPTS)
    assert with_own_settings(settings(model.save(tmp_path), prompt="")).prompt == ""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("modules.json", content) for content in (None, {}, 5, [1], [{"path": 1, "type": "x"}], [{"type": "x"}])),
        *(("1_Pooling/config.json", content) for content in ([], {"pooling_mode": 3}, {"embedding_dimension": 64})),
        *(("2_Dense/config.json", content) for content in ({}, {"in_features": -1, "out_features": 16})),
        ("2_Dense/config.json", {"in_features": 32, "out_features": "16"}),
        ("2_Dense/config.json", {"in_features": 16, "out_features": 32}),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 8}),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False}),
        *(("sentence_bert_config.json", content) for content in ([], {"max_seq_length": 0}, {"do_lower_case": "yes"})),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
        ("config_sentence_transformers.json", {"prompts": ["a"]}),
    ],
)
def test_damaged_files_are_named(file: str, content: Any, tmp_path: Path) -> None:
    DENSE.save(tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(CorruptArtifactError, match="get"):
        load_dense(settings(tmp_path))


def test_damaged_or_pickled_weights_of_dense_layers(tmp_path: Path) -> None:
    weights = DENSE.save(tmp_path) / "2_Dense" / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:-9], b"{}" + whole):
        weights.write_bytes(content)
        with pytest.raises(CorruptArtifactError, match="weights of its Dense layers in 2_Dense"):
            load_dense(settings(tmp_path))
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match="found no weights"):
        load_dense(settings(tmp_path))
    torch.save(
        {"linear.weight": torch.zeros(16, 32), "linear.bias": torch.ones(16)}, weights.with_name("pytorch_model.bin")
    )
    with pytest.raises(UnsupportedModelError, match=r"only pickled weights .*weights_only=True") as caught:
        load_dense(settings(tmp_path))
    code = str(caught.value).split('python -c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", code], check=True, cwd=weights.parent)
    dense = sentence_dense(load_dense(settings(tmp_path))[0])
    assert dense is not None
    assert torch.equal(dense[0].bias, torch.ones(16))


def test_dense_layers_need_the_graph(tmp_path: Path) -> None:
    raw = {"name": "x", "model": settings(DENSE.save(tmp_path)).model_dump(), "speedups": [2]}
    recipe = parse_recipe({**raw, "export": {"embed_in_graph": False}})
    model, _ = load_dense(recipe.model)
    with pytest.raises(RecipeError, match="embed_in_graph: true"):
        OnnxExport.from_recipe(recipe, get_task(recipe.model)).inputs(model)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; there is no network in tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str, folder: Path, absent: tuple[str, ...] = ()) -> str:
    """The id of a model in the cache, as if it had been downloaded; ``absent``: files known not to be there."""
    repository, commit = hub / f"models--tiny--{name}", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    write(repository / "refs" / "main", "")
    (repository / "refs" / "main").write_text(commit)
    for file in absent:
        (repository / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
        (repository / ".no_exist" / commit / file).touch()
    return f"tiny/{name}"


@pytest.mark.parametrize("name", ["cls, as one name", "two dense", "texts", "prompt", "transformer in a folder"])
def test_a_hub_id_says_the_same_as_a_folder(name: str, hub: Path, folders: dict[str, Path]) -> None:
    model = cached(hub, "model", folders[name])
    assert with_own_settings(settings(model)).head == with_own_settings(settings(folders[name])).head
    np.testing.assert_array_equal(embeddings(settings(model), TEXTS), embeddings(settings(folders[name]), TEXTS))
    if name == "cls, as one name":
        with pytest.raises(RecipeError, match=f'files of {model} say, found "mean"'):
            load_dense(settings(model, pooling="mean"))


def test_a_hub_id_whose_modules_nobody_knows(hub: Path, tmp_path: Path) -> None:
    save_dense(tmp_path / "plain")
    known = cached(hub, "known", tmp_path / "plain", ("modules.json",))
    assert with_own_settings(settings(known)).head == ("mean", True)
    unknown = cached(hub, "unknown", tmp_path / "plain")
    with pytest.raises(UnsupportedModelError, match="hf download tiny/unknown"):
        load_dense(settings(unknown))
    load_dense(settings(next((hub / "models--tiny--unknown" / "snapshots").iterdir())))
