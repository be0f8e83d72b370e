"""Embedding models that people use, by the layout of their folders: BGE, E5, mxbai, Arctic, LEAF, multilingual MiniLM.

The weights are random and tiny. Dense and pruned, each answers as sentence-transformers does for the same folder, with
its default prompt and with that of queries.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.helpers.models import random_entries
from tests.helpers.reports import family_report
from tests.helpers.sentence_models import TEXTS, TinySentenceModel, by_sentence_transformers, write
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import masked, resize
from ziplm_deploy.models.sentence_files import SETTINGS_FILE
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.recipe import DataConfig, ModelConfig
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
    """A folder's layout, the name of its prompt for queries, and what it says about shorter embeddings."""

    model: TinySentenceModel
    query: str | None = None
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
        "query",
        (32, 16, 8),
    ),
    "Arctic": Family(TinySentenceModel(CLS, texts=LENGTHS, settings={**VERSIONS, **PROMPTS}), "query"),
    "LEAF": Family(
        TinySentenceModel(
            MEAN,
            dense=((64, True, "Identity"),),
            texts=LENGTHS,
            settings={**VERSIONS, **PROMPTS, "matryoshka_dims": [16, 64]},
        ),
        "query",
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
        for prompt in dict.fromkeys((None, FAMILIES[name].query)):
            config = settings(folder, **({} if prompt is None else {"prompt": QUERY}))
            opened += [folder, whole]
            prompts += [prompt, prompt]
            answers.append((f"{name}, {prompt}, dense", embeddings(config, dense, processor)))
            answers.append((f"{name}, {prompt}, pruned", embeddings(config, load(member), processor)))
    for (what, whole_answer), (_, pruned_answer) in zip(answers[::2], answers[1::2], strict=True):
        assert np.abs(whole_answer - pruned_answer).max() > 1e-3, what
    by_name = dict(answers)
    for name in (name for name, family in FAMILIES.items() if family.query):
        plain, asked = (by_name[f"{name}, {prompt}, dense"] for prompt in (None, "query"))
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
