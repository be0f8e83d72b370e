"""Every field of a recipe repeats exactly these stages: a field that is missing in a key would fail in silence.

A finished run is resumed with one field changed, and stages say whether they would be made again. What a stage makes
stays as it was, so that the table shows which keys hold a field themselves, not what follows from other files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, write_rows
from ziplm_deploy import pipeline
from ziplm_deploy.engines import get_engine
from ziplm_deploy.machine import info
from ziplm_deploy.machine.side_environments import SideEnvironment
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages import benchmark, closed_loop, evaluate, settle
from ziplm_deploy.stages.recover import training_key

BASE: dict[str, Any] = {
    "dense": {"train": True, "max_steps": 1, "batch_size": 8},
    "recover": {"mode": "one-shot", "max_steps": 1, "batch_size": 8},
    "compress": {
        "variants": ["int8", "sparse", "sparse-int8"],
        "int8": {"method": "static", "n_calibration": 8, "reduce_range": False},
        "train": {"mode": "distil", "max_steps": 1, "batch_size": 8},
    },
    "benchmark": {"baselines": ["onnxruntime-int8"]},
    "speedups": [1.5],
}
# Stages by what their keys hold in common.
DENSE = {"calibrate", "export", "prune", "recover", "sparsify", "train dense"}  # the dense model
INT8 = {"quantise", "rank linears"}
EXAMPLES = {"calibrate", "prune", "sparsify", *INT8}  # calibration examples
FILES = {"export", "export pruned", "export sparse"}
SCORED = {"evaluate", "evaluate pruned"}
TIMED = {"benchmark", "benchmark of"}
TRAINED = {"recover", "sparsify"}
PRUNED = {"calibrate", "prune"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, and a finished run that trains its dense model, prunes, recovers and compresses."""
    folder = tmp_path_factory.mktemp("keys")
    for name, seed in (("model", 0), ("other-model", 1)):
        save_dense(folder / name, task="text-classification", num_hidden_layers=1, seed=seed)
    for name, seed in (("train", 0), ("test", 1), ("other", 2)):
        write_rows(folder / f"{name}.jsonl", 80, seed)
    pipeline.run_pipeline(parse_recipe(raw_recipe(folder, **BASE)))
    shutil.copy(folder / "runs" / "tiny" / "profile.json", folder / "table.json")
    return folder


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {**raw, head: changed(raw.get(head, {}), rest, value) if rest else value}


def plain(stage: str) -> str:
    """A stage without the member and the variant that it is about."""
    if stage == "train dense":
        return stage
    words = re.sub(r", \d+$", "", re.sub(r"\b(dense|1\.5x)\b", "", stage)).split()
    kept = [word for word in words if word not in ("int8", "sparse-int8")]
    name = " ".join(kept)
    if name.startswith("evaluate baseline "):
        return "evaluate"
    same = {
        "zero": "sparsify",
        "train sparse": "sparsify",
        "evaluate sparse": "evaluate",
        "compare with baselines": "uncertainty",
    }
    return same.get(name, name)


def repeated(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, value: Any) -> set[str]:
    """Stages that would be made again in a finished run if this field changed."""
    found: set[str] = set()
    make = RunFolder._make

    def ask(
        self: RunFolder, stage: str, key: str, outputs: list[Path], work: Callable[[], None], together: bool = False
    ) -> bool:
        if self.is_made(stage, key) and all(output.exists() for output in outputs):
            return False
        found.add(plain(stage))
        # A stand-in is read by the next stage; steps towards zeros leave nothing that one reads.
        return make(self, stage, key, outputs, work) if stage.startswith("stand-in") else False

    monkeypatch.setattr(RunFolder, "make", ask)
    monkeypatch.setattr(closed_loop, "correct", lambda run, member, record: False)
    monkeypatch.setattr(settle, "settles", lambda recipe: False)  # a loop's aims, settled or corrected, stay its own
    monkeypatch.setattr(info, "usable_cores", lambda: 64)
    monkeypatch.setattr(SideEnvironment, "check", lambda self: None)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    value = str(finished / value.removeprefix("@")) if isinstance(value, str) and value.startswith("@") else value
    raw = {**raw_recipe(finished, **BASE), "output_dir": str(tmp_path / "runs")}
    run = pipeline.begin(parse_recipe(changed(raw, path, value)))
    pipeline.build(run)
    benchmark.STAGE(run)
    evaluate.STAGE(run)
    return found


# field: another value ("@" stands for the folder of the data), and the stages that it repeats
TABLE: dict[str, tuple[Any, set[str]]] = {
    "seed": (7, DENSE | SCORED | INT8 | {"uncertainty"}),
    "model.path": ("@other-model", DENSE),
    "model.revision": ("abc", DENSE),
    "model.metric": ("matthews", SCORED | {"quantise", "uncertainty"}),
    "model.pooling": ("cls", DENSE | FILES | SCORED | INT8),
    "model.prompt": ("the ", DENSE | FILES | SCORED | INT8),
    "model.similarity": ("dot", DENSE | FILES | SCORED | INT8),
    "model.normalize": (False, DENSE | FILES | SCORED | INT8),
    "model.query_prompt": ("the ", set()),  # of retrieval, as the next five: no run of this table searches
    "model.passage_prompt": ("the ", set()),
    "model.dimensions": ([8], set()),
    "data.retrieval_split": ("other", set()),
    "data.retrieval_columns": (["query", "passage"], set()),
    "data.n_retrieval": (3, set()),
    "data.calibration": ("@other.jsonl", DENSE | INT8),
    "data.evaluation": ("@other.jsonl", SCORED | {"quantise"}),
    "data.train": ("@other.jsonl", DENSE),
    "data.calibration_split": ("other", DENSE | INT8),
    "data.train_split": ("other", set()),
    "data.evaluation_split": ("other", SCORED | {"quantise"}),
    "data.revision": ("abc", set()),  # of a name; these are files
    "data.config_name": ("other", DENSE | SCORED | INT8),
    "data.text_columns": (["text"], DENSE | SCORED | INT8),
    "data.label_column": ("label", DENSE | SCORED | INT8),
    "data.n_calibration": (32, EXAMPLES),
    "data.n_evaluation": (20, SCORED | {"quantise"}),
    "data.n_train": (32, DENSE),
    "environment.engine": ("openvino", SCORED | TIMED | {"profile", "quantise"}),
    "environment.threads": (2, TIMED | {"profile", "quantise"}),
    "environment.huge_pages": (True, TIMED | {"profile", "quantise"}),
    "environment.workload.batch_size": (2, FILES | TIMED | {"evaluate", "profile", "quantise"}),
    "environment.workload.seq_len": (24, DENSE | FILES | SCORED | TIMED | INT8 | {"profile"}),
    "environment.workload.lengths": ({"8": 3, "32": 1}, TIMED | {"profile", "quantise"}),
    "export.cache_form": ("portable", FILES),  # of causal language models
    "profile.table": ("@table.json", {"profile"}),
    "profile.allow_foreign_table": (True, set()),
    "profile.stack_depth": (3, {"profile"}),
    "profile.width_ratio": (0.6, {"profile"}),
    "profile.width_align": (4, {"profile"}),
    "profile.min_rounds": (4, {"profile"}),
    "profile.max_rounds": (5, {"profile"}),
    "profile.precision": (0.02, {"profile"}),
    "profile.max_seconds": (6, {"profile"}),
    "prune.method": ("uniform", PRUNED),
    "prune.damping": (0.02, PRUNED),
    "prune.centred": (False, PRUNED),
    "prune.fisher": (True, PRUNED),
    "prune.reconstruct": (False, {"prune"}),
    "prune.in_order": (True, {"prune"}),
    "prune.memory_limit_gb": (4.0, set()),
    "prune.search.n_sequences": (20, {"prune"}),
    "prune.search.n_rerank": (20, {"prune"}),
    "prune.search.sensitivity_levels": (2, {"prune"}),
    "prune.search.coefficient_steps": (2, {"prune"}),
    "prune.search.swap_evaluations": (5, {"prune"}),
    "export.shapes": ("static", FILES | SCORED | {"profile"}),
    "export.opset": (18, FILES | {"profile"}),
    "export.embed_in_graph": (False, FILES),
    "compress.variants": (["int8", "sparse"], {"benchmark", "uncertainty"}),
    "compress.target": ("int8", {"benchmark of", "profile", "stand-in"}),
    "compress.sparsity.sparsity": (0.7, {"sparsify"}),
    "compress.sparsity.pattern": ("block4", {"sparsify"}),
    "compress.sparsity.distribution": ("sensitivity", {"sparsify"}),
    "compress.sparsity.passes": (2, {"sparsify"}),
    "compress.sparsity.damping": (0.02, {"sparsify"}),
    "compress.int8.method": ("qat", {"quantise"}),
    "compress.int8.backend": ("neural-compressor", {"quantise"}),
    "compress.int8.ranges": ("entropy", {"quantise"}),
    "compress.int8.percentile": (99.9, {"quantise"}),
    "compress.int8.n_calibration": (9, INT8),
    "compress.int8.per_channel": (False, INT8),
    "compress.int8.reduce_range": (True, INT8),
    "compress.int8.embeddings": (False, {"quantise"}),
    "compress.int8.max_loss": (0.02, {"quantise"}),
    "compress.int8.max_fp32_share": (0.4, {"quantise"}),
    "compress.int8.fallback": ("float32", set()),  # of causal language models
    "benchmark.rounds": (6, TIMED),
    "benchmark.processes": (3, TIMED),
    "benchmark.max_processes": (3, TIMED),
    "benchmark.runs_per_round": (2, TIMED),
    "benchmark.max_seconds": (11, TIMED),
    "benchmark.tolerance": (0.03, TIMED),
    "benchmark.overshoot": (0.2, set()),
    "benchmark.median_length": (True, {"benchmark short requests"}),
    "benchmark.baseline_engine": ("openvino", SCORED | TIMED | {"profile"}),
    "benchmark.max_corrections": (1, set()),
    "benchmark.parity_atol": (0.001, set()),
    "benchmark.baselines": ([], {"benchmark"}),
    "dense.epochs": (2.0, DENSE),
    "dense.max_steps": (2, DENSE),
    "dense.batch_size": (10, DENSE),
    "dense.learning_rate": (0.0003, DENSE),
    "dense.warmup_ratio": (0.1, DENSE),
    "dense.weight_decay": (0.01, DENSE),
    "dense.precision": ("bf16", DENSE),
    "dense.report_to": ("tensorboard", set()),
    "dense.save_steps": (100, set()),
    "recover.epochs": (2.0, {"recover"}),
    "recover.max_steps": (2, {"recover"}),
    "recover.batch_size": (10, {"recover"}),
    "recover.learning_rate": (0.0003, {"recover"}),
    "recover.warmup_ratio": (0.1, {"recover"}),
    "recover.weight_decay": (0.01, {"recover"}),
    "recover.precision": ("bf16", {"recover"}),
    "recover.report_to": ("tensorboard", set()),
    "recover.save_steps": (100, set()),
    "compress.train.epochs": (2.0, {"sparsify"}),
    "compress.train.max_steps": (2, {"sparsify"}),
    "compress.train.batch_size": (10, {"sparsify"}),
    "compress.train.learning_rate": (0.0003, {"sparsify"}),
    "compress.train.warmup_ratio": (0.1, {"sparsify"}),
    "compress.train.weight_decay": (0.01, {"sparsify"}),
    "compress.train.precision": ("bf16", {"sparsify"}),
    "compress.train.report_to": ("tensorboard", set()),
    "compress.train.save_steps": (100, set()),
    "dense.train": (False, TRAINED | PRUNED | {"export"}),
    "recover.mode": ("gradual", set()),
    "recover.task_weight": (0.1, TRAINED),
    "recover.logit_weight": (0.4, TRAINED),
    "recover.token_weight": (0.4, TRAINED),
    "recover.temperature": (1.0, TRAINED),
    "recover.teacher": ("@other-model", TRAINED),
    "recover.dropout": (True, TRAINED),
    "recover.rebuild_hessians": (False, {"recover"}),
    "recover.freeze_embeddings": (False, TRAINED),
    "recover.teacher_cache_gb": (1.0, set()),
    "compress.train.mode": ("gradual", {"sparsify"}),
}
# Not in the table: another folder, another member, another head.
ANOTHER_RUN = {"name", "output_dir", "speedups", "model.task"}
# Refused for encoders.
OF_CAUSAL_MODELS = {
    "environment.workload.prefill",
    "environment.workload.decode",
    "export.gguf",
    "export.genai",
    "export.stock_optimum",
    "benchmark.engines",
    "compress.int8.weight_only_4",
    "compress.int8.mixed",
    "compress.int8.smooth",
    *("data.context", "data.stride", "prune.search.context", "profile.stack_megabytes"),
    "data.generated",  # what it repeats: test_pipeline_self_data
}
# Refused with training of zeros, which this run has; what it repeats: test_pipeline_recovery.
NOT_WITH_ZEROS = {"recover.lora"}
# Refused for classifiers; what it repeats: test_pipeline_retrieval.
OF_EMBEDDINGS = {"data.retrieval", "data.passage_length"}
# The same; what they repeat: test_pipeline_causal_reranker.
OF_RERANKERS = {"model.pair_prompt", "model.instruction", "model.answer_tokens"}
# Of regression; what it does: test_cross_encoders.
OF_REGRESSION = {"model.score_activation"}


def test_another_tokenizer_or_other_class_names_repeat_what_sees_data(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what depends on the model's content, which holds its tokenizer and configuration, too."""
    for name, file, old, new in (
        ("other-tokenizer", "tokenizer.json", '"lowercase": true', '"lowercase": false'),
        ("other-names", "config.json", "LABEL_2", "third"),
    ):
        folder = finished / name
        shutil.copytree(finished / "model", folder)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        with monkeypatch.context() as patch:
            (tmp_path / name).mkdir()
            found = repeated(finished, tmp_path / name, patch, "model.path", f"@{name}")
        assert found == DENSE | SCORED | INT8, name


def test_other_class_names_train_again_beside_a_teacher_that_stays(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "named")
    config = tmp_path / "named" / "config.json"
    config.write_text(config.read_text().replace("LABEL_2", "third"))
    recover = {**BASE["recover"], "teacher": str(finished / "other-model")}
    keys = set()
    for path in (finished / "model", tmp_path / "named"):
        model = {"path": str(path), "task": "text-classification"}
        given = raw_recipe(finished, **{**BASE, "dense": {}, "model": model, "recover": recover})
        with pipeline.begin(parse_recipe({**given, "output_dir": str(tmp_path / "runs")})) as run:
            keys.add(training_key(run, run.recipe.recover, "weights"))
    assert len(keys) == 2


def test_files_that_change_their_engines_are_scored_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the same engines run in the same versions."""
    monkeypatch.setattr(Run, "engine_versions", {"onnxruntime": get_engine("onnxruntime").version()})
    assert "evaluate" in repeated(finished, tmp_path, monkeypatch, "benchmark.baseline_engine", "openvino")


@pytest.mark.parametrize(
    ("owner", "name", "value", "expected"),
    [
        (type(get_engine("onnxruntime")), "version", lambda self: "0.0", TIMED | SCORED | {"profile"}),
        (info.MachineInfo, "fingerprint", property(lambda self: "Z80"), TIMED | {"profile"}),
    ],
    ids=["version", "machine"],
)
def test_another_engine_or_machine_repeats_what_it_did(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    value: Any,
    expected: set[str],
) -> None:
    monkeypatch.setattr(owner, name, value)
    assert repeated(finished, tmp_path, monkeypatch, "benchmark.overshoot", 0.2) == expected


def test_an_unchanged_recipe_repeats_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeated(finished, tmp_path, monkeypatch, "benchmark.tolerance", 0.02) == set()


def test_the_table_has_every_field() -> None:
    elsewhere = ANOTHER_RUN | OF_CAUSAL_MODELS | OF_EMBEDDINGS | OF_RERANKERS | OF_REGRESSION | NOT_WITH_ZEROS
    assert set(TABLE) == set(leaves(Recipe)) - elsewhere


@pytest.mark.parametrize("path", TABLE)
def test_a_field_repeats_exactly_these_stages(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    value, expected = TABLE[path]
    assert repeated(finished, tmp_path, monkeypatch, path, value) == expected
