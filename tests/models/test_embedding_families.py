"""Embedding models that people use, by the layout of their folders: BGE, E5, mxbai, Arctic, LEAF, multilingual MiniLM.

The weights are random and tiny. Dense and pruned, each answers as sentence-transformers does for the same folder, with
its default prompt and with that of queries.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.helpers.models import random_entries
from tests.helpers.reports import family_report
from tests.helpers.sentence_models import TEXTS, TinySentenceModel, by_sentence_transformers, write
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import masked, resize
from ziplm_deploy.models.sentence_files import SETTINGS_FILE
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.recipe import DataConfig, ModelConfig, parse_recipe
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

CLS = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
QUERY = "who sat on the mat ? "
VERSIONS = {"__version__": {"sentence_transformers": "3.0.0", "transformers": "4.41.0", "pytorch": "2.3.0"}}
PROMPTS = {"prompts": {"query": QUERY, "passage": ""}, "default_prompt_name": None}
LENGTHS = {"max_seq_length": 12, "do_lower_case": False}
SIZES = {"0.attention": 1, "0.ffn": 20, "1.attention": 0, "1.ffn": 0, "2.attention": 3}


@dataclass(frozen=True)
class Family:
    """A folder's layout, and what it says about shorter embeddings."""

    model: TinySentenceModel
    dims: tuple[int, ...] = ()


FAMILIES = {
    "BGE": Family(TinySentenceModel(CLS, texts={**LENGTHS, "do_lower_case": True}, settings=VERSIONS)),
    "E5": Family(TinySentenceModel(MEAN, texts=LENGTHS, settings={"prompts": {}, **VERSIONS})),
    "multilingual E5": Family(
        TinySentenceModel(MEAN, texts=LENGTHS, settings=VERSIONS, model_type="xlm-roberta", pieces=True)
    ),
    "mxbai": Family(
        TinySentenceModel(
            CLS,
            normalize=False,
            texts=LENGTHS,
            settings={**VERSIONS, **PROMPTS, "similarity_fn_name": "cosine"},
            card='# mxbai\n\n```json\n{"loss": "AnglELoss", "matryoshka_dims": [\n 32,\n 16, 8, 4096]}\n```\n',
        ),
        (32, 16, 8),
    ),
    "Arctic": Family(TinySentenceModel(CLS, texts=LENGTHS, settings={**VERSIONS, **PROMPTS})),
    "LEAF": Family(
        TinySentenceModel(
            MEAN,
            dense=((64, True, "Identity"),),
            texts=LENGTHS,
            settings={**VERSIONS, **PROMPTS, "matryoshka_dims": [16, 64]},
        ),
        (64, 16),
    ),
    "multilingual MiniLM": Family(
        TinySentenceModel(MEAN, normalize=False, texts=LENGTHS, settings=VERSIONS, pieces=True)
    ),
}


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": "sentence-similarity", **changes})


def embeddings(config: ModelConfig, model: nn.Module, processor: Any) -> np.ndarray:
    task: Any = get_task(with_own_settings(config))
    rows = task.normalize_rows([{"text": text} for text in TEXTS], DataConfig(), "calibration")
    return np.asarray(task.embed(torch_function(task, model), EvaluationSet(rows, processor, 40, 4)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.model.save(root / name) for name, family in FAMILIES.items()}


def full_size(folder: Path, dense: nn.Module, entries: Any, target: Path) -> Path:
    """The folder of a model with zeros where a member has nothing: what its own library can open."""
    shutil.copytree(folder, target)
    model: Any = masked(dense, entries)
    if hasattr(model, "sentence_dense"):
        del model.sentence_dense  # whose weights lie in folders of their own
    model.save_pretrained(target)
    return target


@pytest.mark.slow
def test_dense_and_pruned_answer_as_sentence_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    opened: list[Path] = []
    prompts: list[str | None] = []
    answers: list[tuple[str, np.ndarray]] = []
    for name, folder in folders.items():
        dense, processor = load_dense(settings(folder))
        entries = random_entries(dense, SIZES)
        member = tmp_path / name / "member"
        save_member(member, resize(dense, entries), processor, settings(folder), {})
        whole = full_size(folder, dense, entries, tmp_path / name / "masked")
        for prompt in (None, QUERY):
            config = settings(folder, **({} if prompt is None else {"prompt": prompt}))
            opened += [folder, whole]
            prompts += [prompt, prompt]
            answers.append((f"{name}, {prompt}, dense", embeddings(config, dense, processor)))
            answers.append((f"{name}, {prompt}, pruned", embeddings(config, load(member), processor)))
    for (what, whole_answer), (_, pruned_answer) in zip(answers[::2], answers[1::2], strict=True):
        assert np.abs(whole_answer - pruned_answer).max() > 1e-3, what
    by_name = dict(answers)
    for name in FAMILIES:
        plain, asked = (by_name[f"{name}, {prompt}, dense"] for prompt in (None, QUERY))
        assert np.abs(plain - asked).max() > 1e-3, name
    found = by_sentence_transformers(opened, TEXTS, tmp_path, prompts)
    for (what, expected), other in zip(answers, found, strict=True):
        np.testing.assert_allclose(expected, other, atol=2e-5, err_msg=what)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_of_shorter_embeddings_are_kept(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    dims = read_sentence_modules(settings(folders[name])).dimensions
    assert dims == (tuple(sorted(FAMILIES[name].dims)) or None)
    report = family_report()
    card = model_card(report, report.members[1], "ORTModelForFeatureExtraction", dims or ())
    assert ("Matryoshka" in card) == bool(dims)
    dense, processor = load_dense(settings(folders[name]))
    save_member(tmp_path, dense, processor, settings(folders[name]), {})
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert read_sentence_modules(settings(tmp_path)).dimensions == dims


def test_sizes_in_the_configuration_of_the_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["BGE"], tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write(folder / "config.json", {**fields, "matryoshka_dimensions": [8, 16, 32]})
    assert read_sentence_modules(settings(folder)).dimensions == (8, 16, 32)
    for broken in ([], [0, 99999999], "many", [4096]):
        write(folder / "config.json", {**fields, "matryoshka_dimensions": broken})
        assert read_sentence_modules(settings(folder)).dimensions is None


def test_a_member_keeps_prompts_that_nobody_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    dense, processor = load_dense(settings(folders["Arctic"]))
    save_member(tmp_path, dense, processor, settings(folders["Arctic"]), {})
    kept = json.loads((tmp_path / SETTINGS_FILE).read_text(encoding="utf-8"))
    assert kept["prompts"] == PROMPTS["prompts"]
    assert kept["default_prompt_name"] is None


@pytest.mark.parametrize("name", ["BGE", "Arctic"])
def test_prompts_of_the_recipe_are_the_members(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """BGE's file has none; Arctic's has one of each, of which the recipe changes that of passages alone."""
    config = settings(folders[name], query_prompt=QUERY, passage_prompt="passage: ")
    dense, processor = load_dense(config)
    save_member(tmp_path, dense, processor, config, {})
    kept = json.loads((tmp_path / SETTINGS_FILE).read_text(encoding="utf-8"))
    own = read_sentence_modules(settings(tmp_path))
    assert (own.query_prompt, own.passage_prompt) == (QUERY, "passage: ")
    assert kept["prompts"]["query"] == QUERY
    assert kept.get("default_prompt_name") is None, "texts of no kind have no prompt"


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "the "}, "query"),
        ({"x": "on "}, "x"),
        ({"query": "the ", "passage": "mat "}, None),
        ({"document": "mat "}, "document"),
    ],
)
def test_queries_and_passages_have_the_prompts_that_their_own_methods_have(
    prompts: dict[str, str], default: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    """By encode_query() and encode_document() of the member's folder."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "dense"
    shutil.copytree(folders["BGE"], folder)
    write(folder / SETTINGS_FILE, {"prompts": prompts, "default_prompt_name": default})
    config = with_own_settings(settings(folder))
    model, processor = load_dense(config)
    save_member(tmp_path / "member", model, processor, config, {})
    written = json.loads((tmp_path / "member" / SETTINGS_FILE).read_text(encoding="utf-8"))
    write(folder / SETTINGS_FILE, written)  # the dense model's weights, which torch opens, with the member's prompts
    opened = SentenceTransformer(str(folder), device="cpu")
    plain = {text: opened.encode(text, prompt="") for text in (f"{config.prompt_of_queries}cat", "cat")}
    np.testing.assert_allclose(opened.encode_query("cat"), plain[f"{config.prompt_of_queries}cat"], atol=1e-5)
    wanted = opened.encode(f"{config.prompt_of_passages}cat", prompt="")
    np.testing.assert_allclose(opened.encode_document("cat"), wanted, atol=1e-5)


def test_arguments_of_torch_do_not_reach_members(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(folders["BGE"], folder)
    lengths = {"max_seq_length": 12, "model_args": {"attn_implementation": "sdpa", "torch_dtype": "float32"}}
    write(folder / "sentence_bert_config.json", lengths)
    dense, processor = load_dense(settings(folder))
    save_member(tmp_path / "member", dense, processor, settings(folder), {})
    kept = json.loads((tmp_path / "member" / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert kept == {"max_seq_length": 12}
    write(folder / "sentence_bert_config.json", {"model_args": {"quantization_config": {}}})
    with pytest.raises(UnsupportedModelError, match="without model_args that change the model, found 'quantization"):
        load_dense(settings(folder))


def test_sentence_transformers_opens_pruned_members(folders: dict[str, Path], tmp_path: Path) -> None:
    """By its ONNX back end, in every layout, with and without a prompt."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("optimum.onnxruntime", reason="optimum is not installed")
    opened: list[Path] = []
    prompts: list[str | None] = []
    expected: list[np.ndarray] = []
    for name, folder in folders.items():
        config = settings(folder)
        dense, processor = load_dense(config)
        pruned = resize(dense, random_entries(dense, SIZES))
        member = tmp_path / name
        save_member(member, pruned, processor, config, {})
        raw = {"name": "x", "model": with_own_settings(config).model_dump(), "speedups": [2]}
        recipe = parse_recipe({**raw, "environment": {"workload": {"seq_len": 16}}})
        OnnxExport.from_recipe(recipe, get_task(recipe.model)).write(load(member), member / "model.onnx", "member")
        for prompt in (None, QUERY):
            opened.append(member)
            prompts.append(prompt)
            asked = config if prompt is None else settings(folder, prompt=prompt)
            expected.append(embeddings(asked, pruned, processor))
    found = by_sentence_transformers(opened, TEXTS, tmp_path, prompts, backend="onnx")
    for path, prompt, wanted, answers in zip(opened, prompts, expected, found, strict=True):
        np.testing.assert_allclose(answers, wanted, atol=1e-4, err_msg=f"{path.name}, {prompt}")


@pytest.mark.slow
def test_sentence_transformers_takes_members_from_our_loader(folders: dict[str, Path], tmp_path: Path) -> None:
    """The original's folder opened by its own library, its model replaced by the pruned one in torch."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    code = (
        "import json, sys, numpy, ziplm_deploy; from sentence_transformers import SentenceTransformer as S\n"
        "out, texts, *folders = sys.argv[1:]\n"
        "found = []\n"
        "for folder, member in zip(folders[::2], folders[1::2]):\n"
        "    model = S(folder, device='cpu')\n"
        "    name = 'auto_model' if 'auto_model' in model[0]._modules else 'model'\n"
        "    setattr(model[0], name, ziplm_deploy.load(member))\n"
        "    found.append(model.encode(json.loads(texts)))\n"
        "numpy.savez(out, *found)"
    )
    paths: list[Path] = []
    expected: list[np.ndarray] = []
    for name, folder in folders.items():
        dense, processor = load_dense(settings(folder))
        pruned = resize(dense, random_entries(dense, SIZES))
        save_member(tmp_path / name, pruned, processor, settings(folder), {})
        paths += [folder, tmp_path / name]
        expected.append(embeddings(settings(folder), pruned, processor))
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "found.npz", json.dumps(TEXTS), *paths]
    subprocess.run([*map(str, command)], check=True)
    found = np.load(tmp_path / "found.npz")
    for number, (name, wanted) in enumerate(zip(folders, expected, strict=True)):
        np.testing.assert_allclose(found[f"arr_{number}"], wanted, atol=2e-5, err_msg=name)
