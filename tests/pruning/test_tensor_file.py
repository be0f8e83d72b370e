"""Files of tensors written one by one: safetensors reads them, whatever the order of sizes and kinds of numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.helpers.models import tiny_inputs, tiny_model
from ziplm_deploy.errors import NumericalError
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.pruning import database as database_module
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_levels, iter_levels, save_levels
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.tensor_file import PADDING, TensorFileWriter
from ziplm_deploy.recipe import PruneConfig

TENSORS = {
    "odd": torch.arange(3, dtype=torch.float32),
    "indices": torch.arange(5),
    "empty": torch.zeros(4, 0),
    "matrix": torch.arange(12.0).reshape(3, 4).T,
    "exact": torch.tensor([0.1], dtype=torch.float64),
}


def written(path: Path, names: list[str], room: int = 2048) -> Path:
    with path.open("wb") as file:
        writer = TensorFileWriter(file, room)
        for name in names:
            writer.add(name, TENSORS[name])
        writer.finish({"about": 'a "quoted" word'})
    return path


@pytest.mark.parametrize(
    "names", [["odd", "indices", "empty", "matrix", "exact"], ["indices", "matrix"], ["empty"], []]
)
def test_safetensors_reads_what_was_written(names: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", names)
    found = safetensors.torch.load_file(path)
    assert set(found) - {PADDING} == set(names)
    assert (PADDING in found) == ("odd" in names), "numbers of 8 bytes begin at a multiple of 8"
    for name in names:
        assert found[name].dtype == TENSORS[name].dtype
        assert torch.equal(found[name], TENSORS[name])
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"about": 'a "quoted" word'}
        assert all(torch.equal(file.get_tensor(name), TENSORS[name]) for name in names)


def test_a_header_without_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a header of 104 bytes at most, found"):
        written(tmp_path / "a", list(TENSORS), room=100)


def test_other_kinds_of_numbers_are_an_error(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file, pytest.raises(ValueError, match=r"expected half of .*found torch"):
        TensorFileWriter(file, 100).add("half", torch.zeros(2, dtype=torch.bfloat16))


def test_levels_are_written_one_module_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    sizes = {m.name: [m.structures, m.structures // 2, 0] for m in modules}
    stats = collect_statistics(model, [tiny_inputs(model, 8, 9)], modules, memory_limit_bytes=2**30)
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        gc.collect()
        counts.append(sum(found() is not None for found in alive))
        found, damping = build_levels(*arguments, **settings)
        alive.extend(weakref.ref(level.weight) for level in found.values())
        return found, damping

    monkeypatch.setattr(database_module, "build_levels", watched)
    built = iter_levels(model, iter(stats.items()), sizes, PruneConfig())
    save_levels(tmp_path / "a.safetensors", built, sizes)
    assert len(alive) == 3 * len(modules)
    assert counts == [0] * len(modules), "levels before are gone"


def test_an_error_half_way_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    sizes = {m.name: [m.structures, 0] for m in modules}
    stats = collect_statistics(model, [tiny_inputs(model, 8, 9)], modules, memory_limit_bytes=2**30)

    def stream() -> Iterator[tuple[str, InputMoments]]:
        yield next(iter(stats.items()))
        raise NumericalError("1.ffn: nothing helps")

    path = tmp_path / "a.safetensors"
    path.write_text("as it was")
    with pytest.raises(NumericalError, match="nothing helps"):
        save_levels(path, iter_levels(model, stream(), sizes, PruneConfig()), sizes)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]
