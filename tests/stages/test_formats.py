"""Files for llama.cpp and onnxruntime-genai as outputs of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import gguf as gguf_writer
from exporters import gguf_layers
from tests.helpers.gguf_models import LlamaCpp, byte_level_tokenizer
from tests.helpers.models import random_entries
from tests.helpers.pipeline import causal_recipe, raw_recipe, save_causal, written_again
from ziplm_deploy.errors import ParityError, RecipeError, UnsupportedModelError
from ziplm_deploy.models.member_files import load
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_task
from ziplm_deploy.stages.formats import check_formats, write_formats

FORMATS = {"export": {"gguf": "F16", "genai": True}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    folder = tmp_path_factory.mktemp("formats")
    tokenizer = byte_level_tokenizer()
    save_causal(folder, vocab_size=len(tokenizer), eos_token_id=136, pad_token_id=136, bos_token_id=136)
    tokenizer.save_pretrained(folder / "model")
    run_pipeline(parse_recipe(causal_recipe(folder, **FORMATS)))
    return folder


@pytest.mark.slow
def test_llama_cpp_continues_as_the_member_does(finished: Path) -> None:
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    folder = finished / "runs" / "tiny" / "1.5x"
    model, ids = load(folder), [5, 40, 41, 42, 60, 61]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    _, first = LlamaCpp(folder / "model.gguf").complete(ids, 1)
    assert first == pytest.approx({token: float(expected[token]) for token in first}, abs=0.05)


def test_genai_reads_which_file_and_which_sizes(finished: Path) -> None:
    for name in ("dense", "1.5x"):
        described = json.loads((finished / "runs" / "tiny" / name / "genai_config.json").read_text())["model"]
        assert described["decoder"]["filename"] == "model.onnx"
        assert described["eos_token_id"] in (136, [136])


def test_they_are_made_once_and_change_nothing_else(finished: Path) -> None:
    again = written_again(finished, parse_recipe(causal_recipe(finished, **FORMATS)))
    assert not {name for name in again if name.endswith((".gguf", ".onnx", "genai_config.json"))}
    changed = written_again(finished, parse_recipe(causal_recipe(finished, export={"gguf": "Q8_0"})))
    assert {name for name in changed if name.endswith((".gguf", ".onnx"))} == {"dense/model.gguf", "1.5x/model.gguf"}


@pytest.mark.parametrize(
    ("model_type", "changes", "error", "text"),
    [
        ("gpt2", {"export": {"gguf": "F16"}}, UnsupportedModelError, "export.gguf: expected"),
        ("llama", {"export": {"gguf": "F16"}}, UnsupportedModelError, "export.gguf: expected"),  # its tokenizer
        ("llama", {"export": {"genai": True, "cache_form": "portable"}}, RecipeError, "cache_form onnxruntime"),
        (
            "llama",
            {"export": {"genai": True, "stock_optimum": True}},
            RecipeError,
            "optimum, found both",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused_at_once(
    model_type: str, changes: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    save_causal(tmp_path, model_type)
    with pytest.raises(error, match=text):
        run_pipeline(parse_recipe(causal_recipe(tmp_path, **changes)))
    assert not list((tmp_path / "runs").rglob("profile.json"))


@pytest.mark.parametrize("field", ["genai", "stock_optimum"])
def test_encoders_have_no_such_files(tmp_path: Path, field: str) -> None:
    with pytest.raises(RecipeError, match=r"expected no export\.gguf"):
        check_task(parse_recipe(raw_recipe(tmp_path, export={field: True})))


def test_genai_needs_a_token_that_ends_texts(tmp_path: Path) -> None:
    save_causal(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    generation = tmp_path / "model" / "generation_config.json"
    generation.unlink(missing_ok=True)
    with Run(parse_recipe(causal_recipe(tmp_path, export={"genai": True}))) as run:
        with pytest.raises(UnsupportedModelError, match=r"export\.genai: expected a token that ends a text"):
            check_formats(run)
        run.dense.processor.eos_token = "[SEP]"
        check_formats(run)


def test_a_member_without_attention_has_no_genai_config_and_a_note(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    recipe = causal_recipe(finished, **FORMATS, output_dir=str(tmp_path / "runs"))
    member = tmp_path / "runs" / "tiny" / "1.5x"
    with Run(parse_recipe(recipe)) as run:
        model = load(member)
        left = [each.name for each in prunable_modules(model) if each.kind == "attention" and each.structures]
        bare = resize(model, random_entries(model, dict.fromkeys(left, 0)))
        run.onnx_export.write(bare, member / "model.onnx", "1.5x")
        (member / "genai_config.json").unlink()
        write_formats(run)
        assert not (member / "genai_config.json").exists()
        assert (tmp_path / "runs" / "tiny" / "dense" / "genai_config.json").exists()
        assert any(note.startswith("1.5x: no genai_config.json: expected") for note in run.folder.notes)


def test_opsets_that_no_decoder_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected export\.opset from 17 on for text-generation, found 16"):
        check_task(parse_recipe(causal_recipe(tmp_path, export={"opset": 16})))


def test_a_gguf_file_beside_onnx_is_compared_with_torch(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    first = lambda layers, *sizes: gguf_layers.file_layers(layers[:1], *sizes)  # noqa: E731
    monkeypatch.setattr(gguf_writer, "file_layers", first)  # and no further ones
    with Run(parse_recipe(causal_recipe(finished, export={"gguf": "Q4_0"}))) as run:
        with pytest.raises(ParityError, match=r"expected dense as GGUF to answer in llama\.cpp within 50 %"):
            write_formats(run)
        assert not (finished / "runs" / "tiny" / "dense" / "model.gguf").exists()
