"""``ziplm-deploy inspect``: a model layer by layer, or every model type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.helpers.models import save_dense
from ziplm_deploy.cli.commands import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_lists_layers(tmp_path: Path) -> None:
    save_dense(tmp_path)
    found = json.loads(invoke("inspect", tmp_path, "--json").stdout)
    rows, kind = found["layers"], found["type"]
    assert (kind["model_type"], kind["prunable"]) == ("bert", True)
    assert "hidden size" in kind["dense"]
    assert [(row["layer"], row["heads"], row["ffn_width"]) for row in rows] == [(0, 4, 64), (1, 4, 64), (2, 4, 64)]
    assert "ffn_width" in invoke("inspect", tmp_path).stdout


def test_inspect_says_what_is_pruned_and_what_stays() -> None:
    printed = invoke("inspect", "bert").stdout
    assert "pruned: attention heads; FFN columns; whole attention blocks and FFNs" in printed
    assert "stays: hidden size, word and position embeddings" in printed
    assert "real weights" in printed
    result = invoke("inspect", "longformer")
    assert (result.exit_code, "overlapping windows" in result.stderr) == (2, True)


def test_inspect_lists_all_types() -> None:
    kinds = {row["model_type"]: row for row in json.loads(invoke("inspect", "--types", "--json").stdout)}
    assert len(kinds) > 100
    assert kinds["bert"]["prunable"]
    assert "experts" in kinds["mixtral"]["reason"]
    printed = invoke("inspect", "--types").stdout
    assert all(f" {name} " in printed for name in kinds)
    for arguments in ((), ("bert", "--types")):
        result = invoke("inspect", *arguments)
        assert (result.exit_code, "give one of them" in result.stderr) == (2, True)


def test_inspect_refuses_other_models_by_naming_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}', encoding="utf-8")
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert "bert" in result.stderr


@pytest.mark.parametrize(("content", "exit_code"), [("{", 1), ("[]", 1), ('{"model_type": "no-such-type"}', 2)])
def test_inspect_of_a_damaged_config(tmp_path: Path, content: str, exit_code: int) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert invoke("inspect", tmp_path).exit_code == exit_code
