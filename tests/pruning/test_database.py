"""Levels against data: relative errors, best bias, dead columns, damage on disk."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.levels import levels_of
from tests.helpers.models import random_entries, tiny_inputs, tiny_model
from ziplm_deploy.errors import CorruptArtifactError, NumericalError, StorageError
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import output_linear, prunable_modules
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.pruning.calibration import collect_statistics, iter_statistics
from ziplm_deploy.pruning.compensations import SMALL_SAMPLE_DAMPING
from ziplm_deploy.pruning.database import (
    Database,
    build_database,
    estimate_bytes,
    iter_levels,
    levels_bytes,
    save_levels,
)
from ziplm_deploy.pruning.kernels import obs
from ziplm_deploy.pruning.methods import METHODS
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.tensor_file import TensorFileWriter
from ziplm_deploy.recipe import MethodName, PruneConfig


def layer(r: int = 6, d: int = 12, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W [r, d], b [r], X [d, N] with correlated columns of non-zero mean; float64."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d, tokens, generator=generator, dtype=torch.float64) + 0.7
    X = torch.randn(d, d, generator=generator, dtype=torch.float64) @ X
    W = torch.randn(r, d, generator=generator, dtype=torch.float64)
    return W, torch.randn(r, generator=generator, dtype=torch.float64), X


def stats_of(X: Tensor) -> InputMoments:
    return InputMoments(X @ X.T / X.shape[1], X.mean(1), X.shape[1])


def columns_of(level: LevelWeights, group_size: int) -> Tensor:
    return (level.kept[:, None] * group_size + torch.arange(group_size)).flatten()


def error_on_data(level: LevelWeights, W: Tensor, b: Tensor, X: Tensor, group_size: int) -> float:
    """Σ‖Ŵx + b̂ - Wx - b‖² / Σ‖Wx + b‖²."""
    dense = W @ X + b[:, None]
    pruned = level.weight.double() @ X[columns_of(level, group_size)] + level.bias.double()[:, None]
    return float((pruned - dense).square().sum() / dense.square().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("group_size", [1, 3])
def test_relative_errors_are_those_on_the_data(method: MethodName, centred: bool, group_size: int) -> None:
    W, b, X = layer()
    n = 12 // group_size
    levels = levels_of((W, b, stats_of(X)), range(n + 1), method=method, centred=centred, group_size=group_size)
    assert list(levels) == ([n, 0] if method in ("layer-drop", "finer-cut") else list(range(n, -1, -1)))
    for size, level in levels.items():
        assert level.size == size
        assert level.weight.dtype == level.bias.dtype == torch.float32
        assert level.weight.is_contiguous()
        assert level.relative_error == pytest.approx(error_on_data(level, W, b, X, group_size), rel=1e-4, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_shapes_and_errors_for_any_layer(r: int, n: int, group_size: int, centred: bool, seed: int) -> None:
    W, b, X = layer(r, n * group_size, 40, seed)
    levels = levels_of((W, b, stats_of(X)), range(n + 1), centred=centred, group_size=group_size)
    for size, level in levels.items():
        assert level.kept.tolist() == sorted(set(level.kept.tolist()))
        assert level.weight.shape == (r, size * group_size)
        assert level.relative_error == pytest.approx(error_on_data(level, W, b, X, group_size), rel=1e-3, abs=1e-7)


def test_full_size_is_the_dense_layer_and_zero_is_what_was_promised() -> None:
    W, b, X = layer()
    for centred in (True, False):
        levels = levels_of((W, b, stats_of(X)), [12, 0], centred=centred)
        torch.testing.assert_close(levels[12].weight, W.float(), rtol=0, atol=0)
        torch.testing.assert_close(levels[12].bias, b.float(), rtol=0, atol=0)
        assert levels[12].relative_error == 0
        if centred:
            torch.testing.assert_close(levels[0].bias, (b + W @ X.mean(1)).float())
            assert levels[0].relative_error < 1
        else:
            assert levels[0].relative_error == 1
            assert not levels[0].bias.any()


def test_bias_is_the_best_for_the_weights() -> None:
    """No other bias lowers the error: the mean residual is zero."""
    W, b, X = layer()
    for level in levels_of((W, b, stats_of(X)), range(13)).values():
        pruned = level.weight.double() @ X[level.kept] + level.bias.double()[:, None]
        torch.testing.assert_close((W @ X + b[:, None] - pruned).mean(1), torch.zeros(6).double(), rtol=0, atol=1e-5)


def test_centred_beats_plain_beats_no_update() -> None:
    W, b, X = layer(r=8, d=16)
    errors = {
        name: sum(level.relative_error for level in levels_of((W, b, stats_of(X)), range(17), **options).values())
        for name, options in {
            "centred": {"centred": True},
            "plain": {"centred": False},
            "flap": {"method": "flap"},
            "magnitude": {"method": "magnitude"},
        }.items()
    }
    assert errors["centred"] < errors["plain"] < errors["magnitude"]
    assert errors["centred"] < errors["flap"]


def test_errors_grow_as_the_module_shrinks() -> None:
    W, b, X = layer(r=20, d=40, tokens=900)
    errors = [level.relative_error for level in levels_of((W, b, stats_of(X)), range(41)).values()]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(errors))


def test_levels_agree_with_the_kernel() -> None:
    W, b, X = layer()
    stats = stats_of(X)
    H, _, _ = obs.damp(stats.covariance(), 0.01)
    order, _ = obs.removal_order(H, W, 1)
    levels = levels_of((W, b, stats), [5])
    assert levels[5].kept.tolist() == sorted(order[7:].tolist())


@pytest.mark.parametrize("centred", [True, False])
def test_dead_columns_go_first_and_cost_nothing(centred: bool) -> None:
    W, b, X = layer()
    X[[2, 7]] = 0.0
    levels = levels_of((W, b, stats_of(X)), range(13), centred=centred)
    assert set(range(12)) - set(levels[10].kept.tolist()) == {2, 7}
    assert levels[10].relative_error < 1e-4  # nothing but damping
    assert all(bool(torch.isfinite(level.weight).all()) for level in levels.values())


def test_a_constant_column_moves_into_the_bias() -> None:
    W, b, X = layer()
    X[4] = 5.0
    levels = levels_of((W, b, stats_of(X)), [11], centred=True)
    assert 4 not in levels[11].kept
    assert error_on_data(levels[11], W, b, X, 1) < 1e-4


def test_a_module_without_any_signal() -> None:
    W = torch.randn(3, 4, dtype=torch.float64)
    stats = InputMoments(torch.zeros(4, 4).double(), torch.zeros(4).double(), 10)
    for centred in (True, False):
        levels = levels_of((W, None, stats), range(1, 5), centred=centred)
        assert all(level.relative_error == 0 for level in levels.values())
        assert all(bool(torch.isfinite(level.weight).all()) for level in levels.values())


def test_fewer_tokens_than_columns_still_works() -> None:
    W, b, X = layer(d=12, tokens=5)
    levels = levels_of((W, b, stats_of(X)), range(13))
    assert levels[6].relative_error == pytest.approx(error_on_data(levels[6], W, b, X, 1), rel=1e-3, abs=1e-8)


def test_bad_input_is_named() -> None:
    W, b, X = layer()
    stats = stats_of(X)
    with pytest.raises(ValueError, match=r"0\.\.12"):
        levels_of((W, b, stats), [13])
    with pytest.raises(ValueError, match="groups of 5"):
        levels_of((W, b, stats), [1], group_size=5)
    with pytest.raises(ValueError, match="float64"):
        dataclasses.replace(stats, mean=stats.mean.float())
    with pytest.raises(ValueError, match=r"\[d, d\]"):
        dataclasses.replace(stats, mean=stats.mean[:3])
    W[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="finite"):
        levels_of((W, b, stats), [3])


def small_database(method: MethodName = "ziplm") -> Database:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    stats = collect_statistics(model, [tiny_inputs(model, 8, 9)], modules, memory_limit_bytes=2**30)
    sizes = {m.name: [m.structures, m.structures // 2, 1, 0] for m in modules}
    return build_database(model, stats, sizes, PruneConfig(method=method))


def test_database_of_a_model_streamed_or_not(tmp_path: Path) -> None:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    batches = [tiny_inputs(model, 8, 9, seed) for seed in range(2)]
    sizes = {m.name: [m.structures, m.structures // 2, 0] for m in modules}
    seen: list[tuple[int, int]] = []
    stats = collect_statistics(model, batches, modules, memory_limit_bytes=2**30)
    whole = build_database(model, stats, sizes, PruneConfig(), progress=lambda *step: seen.append(step))
    stream = iter_statistics(model, batches, modules, memory_limit_bytes=150_000)
    streamed = build_database(model, stream, sizes, PruneConfig())
    assert list(whole.modules) == [m.name for m in modules]
    assert seen == [(i + 1, len(modules)) for i in range(len(modules))]
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for module in modules:  # few tokens for a module's columns raise the damping
        columns = module.structures * module.group_size
        expected = max(0.01, SMALL_SAMPLE_DAMPING * columns / n_tokens)
        assert whole.damping[module.name] == pytest.approx(expected)
    assert whole.damping["0.ffn"] > 0.01
    assert whole.damping["0.attention"] == pytest.approx(0.01)
    for module in modules:
        level = whole.modules[module.name][module.structures]
        torch.testing.assert_close(level.weight, output_linear(model, module).weight.detach(), rtol=0, atol=0)
        assert whole.errors(module.name) == streamed.errors(module.name)
    written = tmp_path / "written.safetensors"
    save_levels(written, iter_levels(model, stats, sizes, PruneConfig()), sizes)
    whole.save(tmp_path / "saved.safetensors")
    assert written.read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
    assert sum(levels_bytes(module, sizes[module.name], 32) for module in modules) == whole.size_bytes


def test_levels_of_a_shrunk_ffn_are_those_of_the_sub_matrix() -> None:
    dense = tiny_model("bert")
    batches = [tiny_inputs(dense, 16, 9, seed) for seed in range(4)]
    entry = random_entries(dense, {"0.ffn": 24})["0.ffn"]
    model = resize(dense, {"0.ffn": entry})
    module = prunable_modules(dense)[1]
    whole = collect_statistics(dense, batches, [module], memory_limit_bytes=2**30)["0.ffn"]
    part = InputMoments(whole.hessian[entry.kept][:, entry.kept], whole.mean[entry.kept], whole.n_tokens)
    expected = levels_of((entry.weight, entry.bias, part), [24, 15, 6, 0])
    modules = prunable_modules(model)
    stats = collect_statistics(model, batches, modules, memory_limit_bytes=2**30)
    sizes = {m.name: [m.structures] for m in modules} | {"0.ffn": [24, 15, 6, 0]}
    found = build_database(model, stats, sizes, PruneConfig()).modules["0.ffn"]
    assert list(found) == list(expected)
    assert torch.equal(found[24].weight, entry.weight)
    assert found[24].relative_error == 0.0
    for size, level in expected.items():
        assert torch.equal(found[size].kept, level.kept)
        torch.testing.assert_close(found[size].weight, level.weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found[size].bias, level.bias, atol=1e-4, rtol=1e-3)
        assert found[size].relative_error == pytest.approx(level.relative_error, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_dropped_modules_need_no_statistics_and_keep_their_only_level(method: MethodName, tmp_path: Path) -> None:
    dense = tiny_model("bert")
    entries = random_entries(dense, {"0.attention": 3, "0.ffn": 0, "1.attention": 0, "2.ffn": 20})
    model = resize(dense, entries)
    modules = prunable_modules(model)
    stats = collect_statistics(model, [tiny_inputs(model, 8, 9)], modules, memory_limit_bytes=2**30)
    assert list(stats) == ["0.attention", "1.ffn", "2.attention", "2.ffn"]
    sizes = {m.name: sorted({m.structures, m.structures // 2, 0}, reverse=True) for m in modules}
    database = build_database(model, stats, sizes, PruneConfig(method=method))
    assert list(database.modules) == [m.name for m in modules]  # also the order of plans
    database.save(tmp_path / "database.safetensors")
    for each in (database, Database.load(tmp_path / "database.safetensors")):
        for name in ("0.ffn", "1.attention"):
            (level,) = each.modules[name].values()
            assert (level.size, level.relative_error, name in each.scores) == (0, 0.0, False)
            assert torch.equal(level.bias, entries[name].bias)
    assert {name: max(levels) for name, levels in database.modules.items()} == {m.name: m.structures for m in modules}
    of_dense = estimate_bytes(prunable_modules(dense), {m.name: [m.structures, 0] for m in prunable_modules(dense)}, 32)
    assert estimate_bytes(modules, sizes, 32) < of_dense
    assert estimate_bytes(modules, sizes, 32) < estimate_bytes(modules, sizes, 32, fisher=True)
    widths = [8 * (module.structures * module.group_size) ** 2 for module in modules]
    for limit, held in ((0, max(widths)), (max(widths) + 1, max(widths) + 1), (2**40, sum(widths))):
        given = estimate_bytes(modules, sizes, 32, memory_limit_bytes=limit)
        assert given == estimate_bytes(modules, sizes, 32) - sum(widths) + held


def test_a_model_without_any_layer_left_has_a_database() -> None:
    dense = tiny_model("bert")
    model = resize(dense, random_entries(dense, {m.name: 0 for m in prunable_modules(dense)}))
    modules = prunable_modules(model)
    stats = iter_statistics(model, [tiny_inputs(model)], modules, memory_limit_bytes=2**30)
    database = build_database(model, stats, {m.name: [0] for m in modules}, PruneConfig())
    assert [list(levels) for levels in database.modules.values()] == [[0]] * 6


def test_missing_statistics_and_failures_name_the_module() -> None:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    stats = collect_statistics(model, [tiny_inputs(model)], modules, memory_limit_bytes=2**30)
    sizes = {m.name: [m.structures, 1] for m in modules}
    broken = dict(stats)
    broken["1.ffn"] = dataclasses.replace(stats["1.ffn"], mean=stats["1.ffn"].mean * float("nan"))
    with pytest.raises(NumericalError, match=r"1\.ffn"):
        build_database(model, broken, sizes, PruneConfig())
    del stats["2.ffn"]
    with pytest.raises(ValueError, match=r"2\.ffn"):
        build_database(model, stats, sizes, PruneConfig())


@pytest.mark.parametrize("method", ["ziplm", "flap"])
def test_save_and_load_give_the_same(tmp_path: Path, method: MethodName) -> None:
    database = small_database(method)
    path = tmp_path / "deep" / "database.safetensors"
    database.save(path)
    loaded = Database.load(path)
    assert loaded.damping == database.damping
    assert list(loaded.modules) == list(database.modules)  # order of modules is the order of the search space
    assert set(loaded.scores) == (set(database.modules) if method == "flap" else set())
    for name, levels in database.modules.items():
        assert list(loaded.modules[name]) == list(levels)
        for size, level in levels.items():
            other = loaded.modules[name][size]
            assert other.relative_error == level.relative_error
            for part in ("kept", "weight", "bias"):
                assert torch.equal(getattr(other, part), getattr(level, part))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def saved(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "database.safetensors"
    small_database().save(path)
    return path, path.read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: float) -> None:
    path, content = saved(tmp_path)
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptArtifactError, match="prune stage"):
        Database.load(path)


def rewrite_header(path: Path, content: bytes, change: str, value: object) -> None:
    """Change one field of the database's metadata, leaving the file valid safetensors."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    head = json.loads(header["__metadata__"]["database"])
    head[change] = value
    header["__metadata__"]["database"] = json.dumps(head)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "value"),
    [("schema_version", 99), ("kind", "plan"), ("errors", None), ("errors", {"0.ffn": {"63": 0.5}}), ("damping", [])],
)
def test_other_schemas_and_damaged_indices_are_refused(tmp_path: Path, change: str, value: object) -> None:
    path, content = saved(tmp_path)
    rewrite_header(path, content, change, value)
    with pytest.raises(CorruptArtifactError):
        Database.load(path)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError):
        Database.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CorruptArtifactError):
        Database.load(tmp_path / "text")


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        small_database().save(tmp_path / "file" / "database.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFileWriter, "add", no_space)
    with pytest.raises(StorageError, match="No space left"):
        small_database().save(tmp_path / "database.safetensors")
    assert not list(tmp_path.iterdir())
