"""Good files of every kind that may come from anywhere, for the readers of ``robustness.py`` to damage."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
TASK = "text-classification"


def make_corpus(folder: Path) -> None:
    """Good files of every kind, of a tiny random model; a copy of the folder is what readers damage."""
    from tests.helpers.models import random_entries, random_level, save_dense
    from tests.helpers.onnx_models import write_int8, write_mlp
    from tests.helpers.pipeline import raw_recipe, write_rows
    from tests.helpers.reports import benchmark_record, family_report, latency_table, plan
    from ziplm_deploy.compression.records import Int8Record
    from ziplm_deploy.engines.trial import RefusedFiles
    from ziplm_deploy.models.dense import load_dense
    from ziplm_deploy.models.member_files import save_member
    from ziplm_deploy.models.modules import prunable_modules
    from ziplm_deploy.models.resizing import resize
    from ziplm_deploy.pruning.database import Database
    from ziplm_deploy.recipe import ModelConfig
    from ziplm_deploy.recovery.record import TrainingRecord
    from ziplm_deploy.run.manifest import Correction, Manifest

    save_dense(folder / "dense", task=TASK)
    settings = ModelConfig.model_validate({"path": str(folder / "dense"), "task": TASK})
    model, processor = load_dense(settings)
    resized = resize(model, random_entries(model, {"0.attention": 0, "0.ffn": 24, "1.attention": 2}))
    save_member(folder / "member", resized, processor, settings, {})
    _write_sentence_model(folder / "sentences", hidden_size=model.config.hidden_size)
    save_dense(folder / "images", "vit", "image-classification")
    levels = {"0.ffn": {size: random_level(model, prunable_modules(model)[1], size) for size in (0, 8)}}
    Database(levels, {"0.ffn": 0.01}).save(folder / "database.safetensors")
    for name in ("dense", "member", "images"):
        (folder / name / "evil.py").write_text(CODE, encoding="utf-8")
    (folder / "recipe.yaml").write_text(_as_yaml(raw_recipe(folder)), encoding="utf-8")
    for name in ("train", "test"):
        write_rows(folder / f"{name}.jsonl", 20, 0)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = [f"text{mark}label", *(f"{row['text'].replace(',', ' ')}{mark}{row['label']}" for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    int8 = Int8Record(
        **{"method": "static", "backend": "onnxruntime", "ranges": "minmax", "per_channel": True, "weight_bits": 8},
        **{"n_linears": 2, "fp32_linears": ["a"], "reference_score": 0.9, "scores": [0.8], "within_budget": False},
        **{"sensitivities": [], "ruined_by_outliers": []},
    )
    correction = {"2x": Correction(2.1, 1, [(2.0, 1.9)])}
    artifacts = {
        **{"table": latency_table(), "plan": plan(2.0), "benchmark": benchmark_record(**{"2x": 2.0})},
        **{"report": family_report(), "refused": RefusedFiles(files={"2x": "why"}), "int8": int8},
        **{"training": TrainingRecord.of_none(), "manifest": Manifest(name="a", corrections=correction)},
    }
    for name, artifact in artifacts.items():
        artifact.save(folder / f"{name}.json")
    (folder / "accuracy.json").write_text('{"accuracy": 0.5, "f1": 0.4}', encoding="utf-8")
    if find_spec("gguf"):  # in the extra llamacpp
        from tests.helpers.gguf_models import parts_of, tiny_llama, write_llama

        write_llama(folder / "model.gguf", parts_of(tiny_llama()))
    write_mlp(folder / "mlp.onnx", 8)
    write_int8(folder / "int8.onnx")


SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json",
                  "sentence_bert_config.json", "2_Dense/model.safetensors")  # fmt: skip


def _write_sentence_model(folder: Path, hidden_size: int) -> None:
    """A model as sentence-transformers saves it: mean pooling, a Dense layer, normalization, a prompt."""
    import torch
    from safetensors.torch import save_file

    from tests.helpers.models import save_dense

    save_dense(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    for name in kinds:
        (folder / name).mkdir(exist_ok=True)
    activation = "torch.nn.modules.activation.Tanh"
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds.items())
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": hidden_size, "out_features": 8, "activation_function": activation},
        "config_sentence_transformers.json": {"prompts": {"q": "the "}, "default_prompt_name": "q"},
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": True},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    tensors = {"linear.weight": torch.zeros(8, hidden_size), "linear.bias": torch.zeros(8)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")


def _as_yaml(raw: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(raw, sort_keys=False)
