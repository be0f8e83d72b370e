"""Results are written at the end of minutes of work: a path that cannot be written is refused at their beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.cli.commands import app
from ziplm_deploy.latency import benchmark as benchmarking


@pytest.mark.parametrize("place", ["", "file/r.json", "n" * 300, "/proc/none/r.json"])
def test_the_output_of_a_benchmark_is_checked_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def compare(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(benchmarking, "compare", compare)
    (tmp_path / "file").write_text("", encoding="utf-8")
    model = write_mlp(tmp_path / "model.onnx", 8)
    result = CliRunner().invoke(app, ["benchmark", str(model), "-o", str(tmp_path / place)])
    assert result.exit_code == 1
    assert "error: expected" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.onnx"]
