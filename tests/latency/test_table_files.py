"""Tables, plans and benchmarks from anywhere: impossible figures are refused before anything is planned with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.reports import benchmark_record, latency_table, plan
from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.errors import CorruptArtifactError

IMPOSSIBLE_MS = [float("nan"), float("inf"), 0.0, -5.0, "fast", None]
Change = Callable[[dict[str, Any]], object]


def refused(folder: Path, artifact: Artifact, change: Change) -> bool:
    """Whether a file of this artifact is refused once it is changed, and was read before."""
    path = folder / "a.json"
    artifact.save(path)
    type(artifact).load(path)
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="wrong fields") as caught:
        type(artifact).load(path)
    return len(str(caught.value)) < 5000


@pytest.mark.parametrize("ms", IMPOSSIBLE_MS)
@pytest.mark.parametrize("field", ["median_ms", "low_ms", "high_ms", "p90_ms", "p99_ms"])
@pytest.mark.parametrize("place", ["base", "dense", "cell"])
def test_times_are_finite_and_positive(tmp_path: Path, place: str, field: str, ms: object) -> None:
    def change(fields: dict[str, Any]) -> None:
        timing = fields["cells"][1]["timing"] if place == "cell" else fields[place]
        timing[field] = ms

    assert refused(tmp_path, latency_table(), change)


@pytest.mark.parametrize("name", ["n_layers", "hidden_size", "n_heads", "head_dim", "intermediate_size"])
@pytest.mark.parametrize("size", [0, -3, 10**9, 1.5, "twelve", None])
def test_shapes_are_those_of_models(tmp_path: Path, name: str, size: object) -> None:
    assert refused(tmp_path, latency_table(), lambda fields: fields["shape"].update({name: size}))


@pytest.mark.parametrize(
    "cell", [{"kind": "ffn", "size": 8}, {"kind": "ffn", "size": -1}, {"kind": "ffn", "size": 17}, {"kind": "moe"}]
)
def test_cells_are_distinct_and_of_the_shape(tmp_path: Path, cell: dict[str, Any]) -> None:
    assert refused(
        tmp_path, latency_table(), lambda fields: fields["cells"].append({**fields["cells"][0], "size": 3, **cell})
    )


def test_many_wrong_cells_are_told_in_a_few_lines(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["cells"] = [{"kind": "x" * 500, "size": -1, "timing": {}}] * 2000

    assert refused(tmp_path, latency_table(), change)


@pytest.mark.parametrize(
    "change",
    [
        {"predicted_ms": float("nan")},
        {"predicted_ms": 0.0},
        {"predicted_speedup": -1.0},
        {"speedup_target": float("inf")},
        {"budget_ms": float("nan")},
        {"sizes": {"0.ffn": -1}},
        {"sizes": {"first": 1}},
    ],
)
def test_plans_are_possible(tmp_path: Path, change: dict[str, Any]) -> None:
    assert refused(tmp_path, plan(2.0), lambda fields: fields.update(change))


@pytest.mark.parametrize(
    "change",
    [{"p50_ms": 0.0}, {"throughput_per_second": float("inf")}, {"samples_ms": [1.0, -1.0]}, {"peak_memory_bytes": -1}],
)
def test_timings_of_files_are_possible(tmp_path: Path, change: dict[str, Any]) -> None:
    assert refused(tmp_path, benchmark_record(**{"2x": 2.0}), lambda fields: fields["variants"][1].update(change))
