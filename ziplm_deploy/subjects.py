"""The ONNX files that a run times: which ones, under which name, on which engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ziplm_deploy.benchmarking import Subject
from ziplm_deploy.compression.variants import ONNX_FILES, label
from ziplm_deploy.parents import DENSE
from ziplm_deploy.run import Run


def in_closed_loop(state: Run, targets: Iterable[float]) -> dict[str, Subject]:
    """The dense model and, for every target, a file as fast as the member will be."""
    variant = state.recipe.compress.target
    files: dict[str, Path] = {}
    for name in map(state.member_name, targets):
        exported = state.folder.pruned(name) / ONNX_FILES["fp32"]
        files[name] = exported if variant == "fp32" else state.folder.stand_in(name, variant)
    return {DENSE: _baseline(state), **{name: _served(state, path) for name, path in files.items()}}


def in_the_end(state: Run) -> dict[str, Subject]:
    """Every file of every member; the dense model also where the members serve, if its baseline is elsewhere."""
    recipe = state.recipe
    subjects = {DENSE: _baseline(state)}
    if recipe.baseline_engine != recipe.environment.engine:
        subjects[dense_as_served(state)] = _served(state, subjects[DENSE].path)
    for name in state.names:
        for variant in recipe.variants:
            if (name, variant) != (DENSE, "fp32"):
                subjects[label(name, variant)] = _served(state, state.folder.member(name) / ONNX_FILES[variant])
    return subjects


def dense_as_served(state: Run) -> str:
    """Name of the dense model on the engine that the members run on."""
    return f"{DENSE} ({state.recipe.environment.engine})"


def _baseline(state: Run) -> Subject:
    path = state.folder.member(DENSE) / ONNX_FILES["fp32"]
    return Subject(path, state.recipe.baseline_engine, state.recipe.export.shapes)


def _served(state: Run, path: Path) -> Subject:
    return Subject(path, state.recipe.environment.engine, state.recipe.export.shapes)
