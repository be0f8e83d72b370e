"""The grid of a table: which cells and whole models it holds, always the same ones."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from ziplm_deploy.latency.grid import WHOLE_SHARES, Grid, cell_id
from ziplm_deploy.models.shape import ModelShape
from ziplm_deploy.recipe import ProfileConfig


def grid(n_layers: int = 6, n_heads: int = 12, width: int = 1536, **settings: float) -> Grid:
    """By default that of MiniLM-L6."""
    shape = ModelShape(
        model_type="bert",
        n_layers=n_layers,
        hidden_size=32 * n_heads,
        n_heads=n_heads,
        head_dim=32,
        intermediate_size=width,
    )
    return Grid(shape, ProfileConfig(**settings))  # type: ignore[arg-type]


def cells_in(sizes: dict[str, int]) -> set[str]:
    return {cell_id(name.split(".")[1], size) for name, size in sizes.items()}


def test_sizes_are_all_heads_and_shrinking_widths() -> None:
    small = grid(n_heads=4, width=64, width_ratio=0.4)
    assert small.cell_sizes == {"attention": [4, 3, 2, 1, 0], "ffn": [64, 24, 8, 0]}
    names = [f"attention {size}" for size in (4, 3, 2, 1)] + ["both dropped"] + [f"ffn {size}" for size in (64, 24, 8)]
    assert list(small.cell_ids) == names
    assert small.cell_ids["ffn 24"] == ("ffn", 24)


def test_a_table_needs_its_references_and_gives_whole_models_a_process_each() -> None:
    small = grid(n_heads=4, width=64)
    assert small.needed_ids == {"none", "base", "dense", "unpruned", "both dropped", "attention 4", "ffn 64"}
    assert small.whole_ids == {"dense", "unpruned", "whole 0", "whole 1", "whole 2", "whole 3"}


def test_an_error_counts_as_often_as_its_layers_fit_into_the_whole_model() -> None:
    deep = grid(n_layers=12, stack_depth=4)
    assert [deep.multiplicity(name) for name in ("dense", "base", "whole 2", "none", "ffn 1536")] == [1, 1, 1, 3, 3]


def test_stacks_of_decode_cells_are_as_large_as_asked_within_the_depth_of_the_model() -> None:
    shape = ModelShape(model_type="llama", n_layers=30, hidden_size=64, n_heads=4, head_dim=16, intermediate_size=1000)
    deep = Grid(shape, ProfileConfig(stack_depth=4), {"attention": 100.0, "ffn": 10.0}, stack_bytes=60_000)
    depths = {size: deep.depth("ffn", size) for size in (1000, 500, 100, 0)}
    assert depths == {1000: 6, 500: 12, 100: 30, 0: 30}  # 10,000, 5,000, 1,000 and no bytes a layer
    assert deep.depth("attention", 4) == 30
    assert deep.largest_depth == 30
    assert deep.multiplicity("ffn 1000") == 5.0
    assert Grid(shape, ProfileConfig(stack_depth=4)).depth("ffn", 100) == 4
    assert Grid(shape, ProfileConfig(stack_depth=4), {"attention": 1.0, "ffn": 1e6}, 10).depth("ffn", 1000) == 4


def test_whole_models_are_uneven_and_ever_smaller() -> None:
    deep = grid(n_layers=12)
    full = {"attention": 12, "ffn": 1536}
    samples = deep.pruned_samples.values()
    shares = [float(np.mean([size / full[name.split(".")[1]] for name, size in each.items()])) for each in samples]
    assert shares == pytest.approx(WHOLE_SHARES, abs=0.12)
    assert shares == sorted(shares, reverse=True)
    for sizes in samples:
        assert 2 < len(cells_in(sizes)) == len(cells_in(sizes) & deep.cell_ids.keys())


def test_the_whole_models_of_a_shape_are_those_of_tables_measured_before() -> None:
    """Another choice would give the same shape another table, and predictions that do not compare."""
    listed = json.dumps(grid().pruned_samples, sort_keys=True)
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == "88eda2da81ce0259"
    assert grid().pruned_samples == grid().pruned_samples
