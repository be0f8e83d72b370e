"""Files between stages: whole or not at all, and checked when they are read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import sys
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest

import exporters.files
from tests.helpers.reports import benchmark_record, family_report, latency_table, plan, timing
from ziplm_deploy.artifacts import Artifact, atomic_path, content_key, write_bytes_with, write_text
from ziplm_deploy.engines.trial import RefusedFiles
from ziplm_deploy.errors import CorruptArtifactError, StorageError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable, PrunedSample
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Environment, Workload
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.tasks.record import Scores

PROFILES = Path(__file__).resolve().parent.parent / "profiles"
MEASURED: list[Artifact] = [latency_table(), benchmark_record(**{"2x": 2.0}), family_report()]
SCORES = Scores(metric="f1", scores={"f1": 0.9, "exact": 0.8}, n_rows=7, engine="onnxruntime", engine_version="1.0")
REFUSED = RefusedFiles(files={"2x int8": "the process died"})
ARTIFACTS: list[Artifact] = [*MEASURED, plan(2.0), SCORES, REFUSED]


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: artifact.KIND)
def test_saved_and_loaded_are_equal(tmp_path: Path, artifact: Artifact) -> None:
    path = tmp_path / "new" / "a.json"
    artifact.save(path)
    assert type(artifact).load(path) == artifact
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: artifact.KIND)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, artifact: Artifact, keep: float) -> None:
    path = tmp_path / "a.json"
    artifact.save(path)
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CorruptArtifactError, match=r"a\.json"):
        type(artifact).load(path)


@pytest.mark.parametrize("content", ["[]", "null", "7", '"text"', "{}", '{"kind": "latency_table"}'])
def test_json_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="make it again"):
        LatencyTable.load(path)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    plan(2.0).save(tmp_path / "a.json")
    with pytest.raises(CorruptArtifactError, match="kind 'pruning_plan'"):
        LatencyTable.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "change", [{"schema_version": 99}, {"schema_version": None}, {"kind": None}, {"extra": 1}, {"cells": 3}]
)
def test_changed_fields_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    latency_table().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError):
        LatencyTable.load(path)


def as_schema_1(path: Path) -> dict[str, Any]:
    """A saved file rewritten as the version before had it: batch size and tokens flat in ``environment``."""
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    environment = saved["environment"]
    del environment["huge_pages"]  # no file of that version has it
    flat = {**environment.pop("workload"), **environment}
    old = {**saved, "schema_version": 1, "environment": flat}
    path.write_text(json.dumps(old), encoding="utf-8")
    return old


@pytest.mark.parametrize("artifact", MEASURED, ids=lambda artifact: artifact.KIND)
def test_files_of_schema_1_are_brought_up_to_date_and_stay_as_they_are(tmp_path: Path, artifact: Any) -> None:
    path = tmp_path / "a.json"
    workload = Workload(batch_size=3, seq_len=17)
    artifact = artifact.model_copy(update={"environment": Environment(threads=2, workload=workload)})
    artifact.save(path)
    old = as_schema_1(path)
    assert old["environment"] == {"engine": "onnxruntime", "threads": 2, "batch_size": 3, "seq_len": 17}
    assert type(artifact).load(path) == artifact
    assert json.loads(path.read_text(encoding="utf-8")) == old


@pytest.mark.parametrize(
    "environment", [None, [], "onnxruntime", {"batch_size": "many"}, {"batch_size": 2, "workload": {"seq_len": 8}}]
)
def test_files_of_schema_1_with_a_damaged_environment_are_refused(tmp_path: Path, environment: Any) -> None:
    path = tmp_path / "a.json"
    latency_table().save(path)
    path.write_text(json.dumps({**as_schema_1(path), "environment": environment}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="wrong fields"):
        LatencyTable.load(path)


@pytest.mark.parametrize("version", [0, -1, 4, 99, 1.5, True, "2", None])
@pytest.mark.parametrize("artifact", MEASURED, ids=lambda artifact: artifact.KIND)
def test_other_schema_versions_are_refused(tmp_path: Path, artifact: Artifact, version: object) -> None:
    path = tmp_path / "a.json"
    artifact.save(path)
    path.write_text(json.dumps({**as_schema_1(path), "schema_version": version}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"of schema 3 .*make it again with this version"):
        type(artifact).load(path)


def test_a_schema_version_without_a_way_to_the_next_is_refused(tmp_path: Path) -> None:
    class Third(Artifact):
        KIND = "third"
        SCHEMA_VERSION = 3
        MIGRATIONS: ClassVar[Any] = {2: lambda fields: {"new": fields["old"]}}
        new: int

    path = tmp_path / "a.json"
    for version, readable in ((1, False), (2, True), (3, False)):  # of 3 the field is unknown
        path.write_text(json.dumps({"kind": "third", "schema_version": version, "old": 7}), encoding="utf-8")
        if readable:
            assert Third.load(path) == Third(new=7)
        else:
            with pytest.raises(CorruptArtifactError):
                Third.load(path)


def test_scores_from_before_they_had_a_kind_are_read(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text('{"spearman": 0.87, "pearson": 0.86, "mean_cosine": 0.99}', encoding="utf-8")
    scores = Scores.load(path)
    assert (scores.metric, scores.primary) == ("spearman", 0.87)
    assert scores.scores == {"spearman": 0.87, "pearson": 0.86, "mean_cosine": 0.99}
    assert (scores.n_rows, scores.engine, scores.engine_version) == (None, None, None)
    scores.save(path)
    assert Scores.load(path) == scores


def test_scores_from_before_outcomes_were_kept_are_read(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    head = '{"kind": "accuracy", "schema_version": 1, '
    body = '"metric": "f1", "scores": {"f1": 0.5}, "n_rows": 9, "engine": "onnxruntime", "engine_version": "1.0"}'
    path.write_text(head + body, encoding="utf-8")
    scores = Scores.load(path)
    assert (scores.primary, scores.n_rows, scores.examples, scores.outcomes_hash) == (0.5, 9, None, None)


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[]", '{"spearman": "good"}', '{"spearman": null}', '{"kind": "accuracy"}', '{"schema_version": 1}'),
        '{"kind": "accuracy", "schema_version": 1, "metric": "f1", "scores": {}, "n_rows": 1}',
        '{"kind": "accuracy", "schema_version": 0, "spearman": 0.87, "metric": "spearman"}',
        '{"kind": "refused_files", "schema_version": 1, "files": {}}',
    ],
)
def test_damaged_scores_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"accuracy\.json"):
        Scores.load(path)


def test_scores_hold_their_metric() -> None:
    with pytest.raises(ValueError, match="expected a score of f1, found exact"):
        Scores(metric="f1", scores={"exact": 0.8}, n_rows=1, engine="onnxruntime", engine_version="1.0")


@pytest.mark.parametrize("files", [{}, {"2x int8": "the process died"}])
def test_refused_files_from_before_they_had_a_kind_are_read(tmp_path: Path, files: dict[str, str]) -> None:
    path = tmp_path / "refused.json"
    path.write_text(json.dumps(files), encoding="utf-8")
    assert RefusedFiles.load(path) == RefusedFiles(files=files)


@pytest.mark.parametrize("content", ["[]", "", '{"2x": 1.0}', '{"kind": "refused_files"}', '{"kind": "accuracy"}'])
def test_damaged_lists_of_refused_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "refused.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"refused\.json"):
        RefusedFiles.load(path)


def test_missing_file_folder_and_pickle_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "a.json"
    pickled.write_bytes(pickle.dumps({"kind": "latency_table"}))
    for path in (pickled, tmp_path / "none.json", tmp_path):
        with pytest.raises(CorruptArtifactError):
            LatencyTable.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_bytes_with(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("atomic", [atomic_path, exporters.files.atomic_path])
def test_an_interrupt_at_any_moment_of_a_write_leaves_nothing(tmp_path: Path, atomic: Any) -> None:
    """Ctrl-C raises KeyboardInterrupt after whichever call it met: here after each one in turn."""

    def write(stop_at: int) -> int:
        count = 0

        def after_a_call(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "c_return"
            if event == "c_return" and count == stop_at:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(after_a_call)  # type: ignore[arg-type]
        try:
            with atomic(tmp_path / "a.txt") as temporary:
                temporary.write_text("new", encoding="utf-8")
        finally:
            sys.setprofile(None)
        return count

    moments = write(0)
    assert moments > 20
    for moment in range(1, moments):
        (tmp_path / "a.txt").unlink(missing_ok=True)
        with contextlib.suppress(KeyboardInterrupt):
            write(moment)
        assert set(os.listdir(tmp_path)) <= {"a.txt"}, moment


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, failing, full)
    with pytest.raises(StorageError, match="No space left on device; free disk space"):
        plan(2.0).save(tmp_path / "a.json")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="choose another output_dir"):
        plan(2.0).save(tmp_path / "runs" / "a.json")


def test_predictions_are_sums_of_cells() -> None:
    table = latency_table()
    assert table.predict_ms({"0.attention": 1, "0.ffn": 8, "1.attention": 0, "1.ffn": 16}) == pytest.approx(7.2)
    assert table.sum_dense_ms() == pytest.approx(10.0)
    assert table.sizes("ffn") == [0, 8, 16]
    with pytest.raises(KeyError):
        table.latency_ms("ffn", 9)


def test_budgets_and_predicted_speedups_agree() -> None:
    whole = PrunedSample(sizes={"0.attention": 1, "0.ffn": 8, "1.attention": 0, "1.ffn": 8}, timing=timing(7.0))
    for table in (latency_table(), latency_table(wholes=[whole])):
        for modules_ms in (0.4, 3.0, 8.0):
            assert table.modules_budget_ms(table.predict_speedup(modules_ms)) == pytest.approx(modules_ms)
        assert table.modules_budget_ms(table.dense.median_ms / table.base.median_ms * 1.01) < 0


@pytest.mark.parametrize("sizes", [{"0.ffn": 9}, {"2.ffn": 8}])
def test_whole_models_of_unknown_cells_or_layers_are_refused(sizes: dict[str, int]) -> None:
    whole = PrunedSample(sizes={"0.attention": 1, **sizes}, timing=timing(7.0))
    with pytest.raises(ValueError, match="whole models of measured cells"):
        latency_table(wholes=[whole])


def test_whole_models_correct_the_sums_of_cells() -> None:
    sizes = {"0.attention": 1, "0.ffn": 8, "1.attention": 0, "1.ffn": 8}  # 2 + 0.6 + 1.5 + 0.1 + 1.5
    full = {"0.attention": 2, "0.ffn": 16, "1.attention": 2, "1.ffn": 16}
    table = latency_table(wholes=[PrunedSample(sizes=sizes, timing=timing(5.7 * 1.1))], dense=timing(10.5))
    assert table.sum_ms(sizes) == pytest.approx(5.7)
    assert 5.7 * 1.07 < table.predict_ms(sizes) < 5.7 * 1.1  # near what was measured
    assert table.predict_ms(full) == pytest.approx(10.5, rel=0.003)
    between = {"0.attention": 2, "0.ffn": 8, "1.attention": 2, "1.ffn": 16}
    assert 1.01 < table.predict_ms(between) / table.sum_ms(between) < 1.1
    compressed = latency_table(wholes=table.wholes, dense=timing(30.0), unpruned=timing(10.2))
    assert compressed.predict_ms(full) == pytest.approx(10.2, rel=0.003)


@pytest.mark.parametrize(
    ("artifact", "newer"),
    [
        (latency_table(), ["form", "baseline_engine", "baseline_engine_version", "unpruned", "wholes"]),
        (benchmark_record(**{"2x": 2.0}), []),
    ],
    ids=lambda value: getattr(value, "KIND", ""),
)
def test_files_from_before_several_engines_are_read(tmp_path: Path, artifact: Artifact, newer: list[str]) -> None:
    path = tmp_path / "a.json"
    artifact.save(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in newer:
        del saved[name]
    for variant in saved.get("variants", []):
        del variant["engine"], variant["engine_version"]
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert type(artifact).load(path) == artifact


def test_the_published_table_is_read() -> None:
    table = LatencyTable.load(next(PROFILES.glob("*.json")))
    assert (table.baseline_engine, table.baseline_engine_version) == (table.engine, table.engine_version)
    assert (table.variant, table.form, table.unpruned, table.wholes) == ("fp32", "", None, [])


def test_fingerprints_of_tables_are_what_schema_1_held() -> None:
    """Content keys of runs from before there were workloads must stay as they are."""
    path = next(PROFILES.glob("*.json"))
    published = json.loads(path.read_text(encoding="utf-8"))
    assert published.pop("schema_version") == 1
    assert published.pop("kind") == "latency_table"
    fingerprint = LatencyTable.load(path).fingerprint
    newer = fingerprint.keys() - published.keys()  # fields that came later, with defaults
    assert newer == {"form", "baseline_engine", "baseline_engine_version", "unpruned", "wholes", "refused"}
    assert {name: value for name, value in fingerprint.items() if name not in newer} == published
    assert content_key(table=LatencyTable.load(path)) == content_key(table=fingerprint)


def test_keys_of_environments_are_what_they_were_before_there_were_workloads() -> None:
    flat = {"engine": "onnxruntime", "batch_size": 1, "seq_len": 128, "threads": 1}
    assert content_key(environment=Environment()) == content_key(environment=flat)


def test_the_largest_speedup_is_everything_dropped() -> None:
    assert latency_table().largest_speedup() == pytest.approx(10.0 / 2.4)


def test_the_largest_speedup_takes_a_size_that_is_faster_than_none() -> None:
    """Noise in the table of a tiny model: dropping its attention does not pay."""
    odd = latency_table()
    cells = [
        cell if (cell.kind, cell.size) != ("attention", 0) else cell.model_copy(update={"timing": timing(0.8)})
        for cell in odd.cells
    ]
    assert odd.model_copy(update={"cells": cells}).largest_speedup() == pytest.approx(10.0 / (2.0 + 2 * (0.6 + 0.1)))


def test_an_engine_of_its_own_is_kept() -> None:
    table = latency_table(baseline_engine="openvino", baseline_engine_version="2.0", variant="int8")
    assert (table.engine, table.baseline_engine, table.baseline_engine_version) == ("onnxruntime", "openvino", "2.0")
    elsewhere = benchmark_record().variants[0].model_copy(update={"engine": "openvino", "engine_version": "2.0"})
    here = benchmark_record(**{"2x": 2.0}).variants[1].model_copy(update={"engine": "", "engine_version": ""})
    record = BenchmarkRecord(**{**dict(benchmark_record()), "variants": [elsewhere, here]})
    assert [variant.engine for variant in record.variants] == ["openvino", "onnxruntime"]
    assert [variant.engine_version for variant in record.variants] == ["2.0", "1.0"]


def test_fingerprints_differ_with_cpu_and_flags() -> None:
    here = latency_table().machine
    assert here.fingerprint == here.model_copy(update={"memory_bytes": 1, "operating_system": "x"}).fingerprint
    assert here.fingerprint != here.model_copy(update={"isa_flags": ("avx",)}).fingerprint
    assert here.fingerprint != here.model_copy(update={"cpu_model": "B"}).fingerprint


def test_variants_are_found_by_name() -> None:
    record: BenchmarkRecord = benchmark_record(**{"2x": 2.0})
    assert record.variant("2x").speedup == 2.0
    with pytest.raises(StopIteration):
        record.variant("3x")


def test_kinds_are_distinct() -> None:
    kinds = [kind.KIND for kind in (BenchmarkRecord, FamilyReport, LatencyTable, PruningPlan, RefusedFiles, Scores)]
    assert len(set(kinds)) == len(kinds)
