"""Every reader of files from anywhere, with good files for it, and what is done with a file that it takes.

A reader is given the folder of a corpus that it may damage, and a source of random numbers. It damages one file, reads
it as a user would, and uses what it got. It may raise :class:`ZipLMError`; anything else is a failure.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from robustness_corpus import SENTENCE_FILES, TASK
from robustness_mutations import (
    json_text,
    mutated_bytes,
    mutated_json,
    mutated_onnx,
    mutated_safetensors,
)

Random = random.Random
Reader = Callable[[Path, Random], None]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _damage(path: Path, rng: Random) -> None:
    """Damage a JSON file in its bytes or in its values."""
    if rng.random() < 0.3:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
        return
    changed = json_text(mutated_json(json.loads(path.read_text(encoding="utf-8")), rng))
    path.write_text(changed, encoding="utf-8", errors="surrogatepass")


def recipe(folder: Path, rng: Random) -> None:
    """A recipe, its data and where it would write."""
    import yaml

    from ziplm_deploy.recipe import load_recipe, parse_recipe

    path = folder / "recipe.yaml"
    if rng.random() < 0.5:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
        load_recipe(path)
        return
    raw = mutated_json(yaml.safe_load(path.read_text(encoding="utf-8")), rng)
    if isinstance(raw, dict):
        taken = parse_recipe(raw)
        assert parse_recipe(taken.model_dump(mode="json")) == taken, "a recipe that was taken is refused afterwards"


def run_folder(folder: Path, rng: Random) -> None:
    """A run that begins in a folder with a damaged manifest."""
    from ziplm_deploy.recipe import parse_recipe
    from ziplm_deploy.run.folder import RunFolder

    _damage(folder / "manifest.json", rng)
    taken = parse_recipe({"name": folder.name, "output_dir": str(folder.parent), **_model(folder), "speedups": [2]})
    made = RunFolder(taken)
    assert isinstance(made.notes, list)
    made.correction("2x", "key")


def _model(folder: Path) -> dict[str, Any]:
    return {"model": {"path": str(folder / "dense"), "task": TASK}}


def table(folder: Path, rng: Random) -> None:
    """A latency table, and the plans that would be made with it."""
    from ziplm_deploy.latency.table import LatencyTable
    from ziplm_deploy.models.shape import MODULE_KINDS

    _damage(folder / "table.json", rng)
    taken = LatencyTable.load(folder / "table.json")
    smallest = {kind: min(sizes) for kind in MODULE_KINDS if (sizes := taken.sizes(kind))}
    predicted_ms = taken.predict_ms({f"{layer}.{kind}": size for kind, size in smallest.items() for layer in range(2)})
    predictions = [predicted_ms, taken.modules_budget_ms(2.0), taken.predict_speedup(1.0)]
    assert all(map(math.isfinite, predictions)), "a table that was taken predicts no number"
    assert predicted_ms > 0, "a table that was taken predicts no time"


def plan(folder: Path, rng: Random) -> None:
    from ziplm_deploy.pruning.plan import PruningPlan

    _damage(folder / "plan.json", rng)
    assert PruningPlan.load(folder / "plan.json").predicted_ms > 0


def records(folder: Path, rng: Random) -> None:
    """Any of the other JSON files between stages."""
    from ziplm_deploy.compression.records import Int8Record
    from ziplm_deploy.engines.trial import RefusedFiles
    from ziplm_deploy.latency.record import BenchmarkRecord
    from ziplm_deploy.recovery.record import TrainingRecord
    from ziplm_deploy.reporting.records import FamilyReport
    from ziplm_deploy.run.manifest import Manifest
    from ziplm_deploy.tasks.record import Scores

    kinds: dict[str, Any] = {
        **{"benchmark": BenchmarkRecord, "report": FamilyReport, "accuracy": Scores, "refused": RefusedFiles},
        **{"int8": Int8Record, "training": TrainingRecord, "manifest": Manifest},
    }
    name = rng.choice(sorted(kinds))
    _damage(folder / f"{name}.json", rng)
    kinds[name].load(folder / f"{name}.json")


def member(folder: Path, rng: Random) -> None:
    """A folder of a family member, loaded and asked."""
    from ziplm_deploy.artifacts import file_hash
    from ziplm_deploy.models.inspection import inspect_model
    from ziplm_deploy.models.member_files import load

    place = folder / "member"
    name = rng.choice(("config.json", "ziplm_config.json", "pruned.safetensors"))
    _damage_checkpoint(place, name, rng)
    if name == "pruned.safetensors" and rng.random() < 0.8:  # somebody who knows the format
        about = json.loads((place / "ziplm_config.json").read_text(encoding="utf-8"))
        about["weights_sha256"] = file_hash(place / name)
        (place / "ziplm_config.json").write_text(json.dumps(about), encoding="utf-8")
    _ask(load(place))
    inspect_model(str(place))


def dense(folder: Path, rng: Random) -> None:
    """A checkpoint with its tokenizer, loaded and asked."""
    from ziplm_deploy.models.dense import load_dense
    from ziplm_deploy.recipe import ModelConfig

    place = folder / "dense"
    name = rng.choice(("config.json", "config.json", "model.safetensors", *TOKENIZER_FILES))
    _damage_checkpoint(place, name, rng)
    model, processor = load_dense(ModelConfig.model_validate(_model(folder)["model"]))
    _ask(model)
    processor("the cat", max_length=8, truncation=True)


def inspect(folder: Path, rng: Random) -> None:
    """``ziplm-deploy inspect`` of a checkpoint."""
    from ziplm_deploy.models.inspection import inspect_model

    _damage_checkpoint(folder / "dense", "config.json", rng)
    inspect_model(str(folder / "dense"))


def _damage_checkpoint(place: Path, name: str, rng: Random) -> None:
    path = place / name
    if name.endswith(".safetensors"):
        path.write_bytes(mutated_safetensors(path.read_bytes(), rng))
        return
    if rng.random() < 0.15 and name in ("config.json", "tokenizer_config.json"):
        auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
        fields = {**json.loads(path.read_text(encoding="utf-8")), "auto_map": auto_map}
        path.write_text(json.dumps(fields | ({"model_type": "evil"} if rng.random() < 0.5 else {})), encoding="utf-8")
        return
    _damage(path, rng)


def _ask(model: Any) -> None:
    import torch

    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def sentences(folder: Path, rng: Random) -> None:
    """A model of sentence-transformers, and the member that would be saved of it."""
    from ziplm_deploy.models.dense import load_dense
    from ziplm_deploy.models.member_files import load, save_member
    from ziplm_deploy.models.own_settings import with_own_settings
    from ziplm_deploy.recipe import ModelConfig

    place = folder / "sentences"
    _damage_checkpoint(place, rng.choice(SENTENCE_FILES), rng)
    settings = with_own_settings(ModelConfig.model_validate({"path": str(place), "task": "sentence-similarity"}))
    model, processor = load_dense(settings)
    processor("The Cat", max_length=8, truncation=True)
    save_member(folder / "saved", model, processor, settings, {})
    _ask(load(folder / "saved"))


def images(folder: Path, rng: Random) -> None:
    """An image model with the settings of its processor."""
    from ziplm_deploy.models.dense import load_dense
    from ziplm_deploy.recipe import ModelConfig

    name = rng.choice(("config.json", "preprocessor_config.json"))
    _damage_checkpoint(folder / "images", name, rng)
    model, processor = load_dense(ModelConfig(path=str(folder / "images"), task="image-classification"))
    del processor
    sizes = model.config.num_channels, model.config.image_size
    assert all(isinstance(size, int) for size in sizes), "a model without a size"


def database(folder: Path, rng: Random) -> None:
    """The levels of a parent, which a resumed run reads again."""
    from ziplm_deploy.pruning.database import Database

    path = folder / "database.safetensors"
    path.write_bytes(mutated_safetensors(path.read_bytes(), rng))
    Database.load(path)


def gguf(folder: Path, rng: Random) -> None:
    """A GGUF file: what stands before its weights is damaged."""
    from ziplm_deploy.models.gguf_source import check_gguf, load_gguf_config, load_gguf_model
    from ziplm_deploy.models.gguf_tokenizer import load_gguf_tokenizer

    path = folder / "model.gguf"
    content = bytearray(path.read_bytes())
    head = content.index(b"token_embd.weight")
    if rng.random() < 0.7:  # most other changes move all that follows
        content[rng.randrange(head)] ^= 1 << rng.randrange(8)
    else:
        content[:head] = mutated_bytes(bytes(content[:head]), rng)
    path.write_bytes(content)
    check_gguf(path)
    config = load_gguf_config(path)
    load_gguf_tokenizer(path)
    _ask(load_gguf_model(path, config))


def rows(folder: Path, rng: Random) -> None:
    """A data file, and the labelled rows that a task makes of it."""
    from ziplm_deploy.recipe import DataConfig, ModelConfig
    from ziplm_deploy.tasks import get_task

    path = folder / rng.choice(("rows.csv", "rows.tsv", "rows.json", "train.jsonl"))
    if path.suffix == ".json" and rng.random() < 0.6:
        _damage(path, rng)
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    task = get_task(ModelConfig.model_validate(_model(folder)["model"]))
    task.load_rows(DataConfig(calibration=str(path), n_calibration=8), "calibration", 0)


class OnnxWorkers:
    """A worker that lives as long as the files let it."""

    LIMIT_BYTES = 1900 << 20

    def __init__(self) -> None:
        self._worker: Any = None
        self.peak_bytes = 0

    def time(self, path: Path) -> None:
        """Load a file and run it, as ``ziplm-deploy benchmark`` does."""
        from ziplm_deploy.engines import WorkerOptions, get_engine

        if self._worker is None or not self._worker._process.running():
            options = WorkerOptions(seq_len=8, timeout_seconds=25.0, memory_limit_bytes=self.LIMIT_BYTES)
            self._worker = get_engine("onnxruntime").start_worker(options)
        self._worker.load("model", path)
        self._worker.time("model", n=1)
        self._worker.unload("model")

    def measure(self) -> None:
        """Note how much memory the worker has taken."""
        if self._worker is not None and self._worker._process.running():
            self.peak_bytes = max(self.peak_bytes, self._worker.peak_memory_bytes())

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


WORKERS = OnnxWorkers()


def onnx(folder: Path, rng: Random) -> None:
    """An ONNX file in a worker."""
    path = folder / rng.choice(("mlp.onnx", "int8.onnx"))
    path.write_bytes(mutated_onnx(path.read_bytes(), rng))
    try:
        WORKERS.time(path)
    finally:
        WORKERS.measure()


# Reader: its share of the cases.
READERS: dict[Reader, int] = {
    recipe: 5, table: 4, plan: 2, records: 5, run_folder: 2, member: 6, dense: 4, inspect: 3, images: 2, sentences: 4,
    database: 1, rows: 3, onnx: 5, **({gguf: 3} if find_spec("gguf") else {}),
}  # fmt: skip


@contextlib.contextmanager
def damaged_copy(corpus: Path, folder: Path) -> Iterator[Path]:
    """A copy of the corpus that a case may damage; says afterwards whether code in it ran."""
    shutil.copytree(corpus, folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
        assert not list(folder.rglob("ran")), "code of a folder ran"
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
