"""The ONNX files that a run times: which ones, under which name, on which engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ziplm_deploy.artifacts import content_key, write_text
from ziplm_deploy.engines import get_engine
from ziplm_deploy.engines.trial import ModelRefusedError, Trial
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import TimedFile, start_worker
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.recipe import EngineName, Variant, file_label
from ziplm_deploy.run.run import Run, Step


def files_of_generation(state: Run, targets: Iterable[float]) -> dict[str, TimedFile]:
    """The dense model and, for every target, a file as fast as the member will be."""
    variant = state.recipe.compress.target
    files: dict[str, Path] = {}
    for name in map(state.member_name, targets):
        exported = state.folder.pruned(name) / Variant.FP32.onnx_file
        files[name] = exported if variant is Variant.FP32 else state.folder.stand_in(name, variant)
    return {
        DENSE: _baseline(state, state.recipe.baseline_engine),
        **{name: _served(state, path) for name, path in files.items()},
    }


def refused_targets(state: Run, step: Step) -> dict[float, str]:
    """Targets of a step whose pruned files the engine cannot run, and what it said about them."""
    files = {name: subject for name, subject in files_of_generation(state, step.targets).items() if name != DENSE}
    path = state.folder.path / "pruning" / f"refused-of-{step.parent}.json"
    refused = _tried(state, trial_name(step), path, files)
    return {target: refused[name] for target in step.targets if (name := state.member_name(target)) in refused}


def trial_name(step: Step) -> str:
    """Name of the stage of :func:`refused_targets`."""
    return f"try pruned files of {step.parent}"


def files_of_family(state: Run) -> dict[str, TimedFile]:
    """Every file of every member that its engine can run; the dense model also where the members serve, if its baseline
    is elsewhere."""
    refused = refused_files(state)
    return {name: subject for name, subject in _all_files(state).items() if name not in refused}


def try_files(state: Run) -> None:
    """Find the files that the engine cannot run, if it is one that may end its process over them.

    Raises:
        EngineError: it cannot run a file that a target is about.
    """
    recipe, stage = state.recipe, "try files"
    files = {name: subject for name, subject in _all_files(state).items() if name != DENSE}
    refused = _tried(state, stage, _refused_path(state), files)
    for name in (file_label(state.member_name(target), recipe.compress.target) for target in recipe.speedups):
        if name in refused:
            state.folder.forget(stage)
            raise EngineError(refused[name])
    text = f"{recipe.environment.engine} cannot run these files, so they were not measured: {', '.join(refused)}"
    state.folder.set_note("refused files", text if refused else None)


def _tried(state: Run, stage: str, path: Path, files: dict[str, TimedFile]) -> dict[str, str]:
    """Names of the files that the engine cannot run, and what it said; a stage, which writes them to ``path``."""
    environment = state.recipe.environment
    engine = get_engine(environment.engine)
    if not engine.may_abort:
        return {}
    key = content_key(
        files={name: state.file_hash(subject.path) for name, subject in files.items()},
        engine=engine.version(),
        environment=environment,
    )

    def work() -> None:
        refused: dict[str, str] = {}
        with Trial(lambda: start_worker(TimedFile(path, environment.engine), environment)) as trial:
            for index, (name, subject) in enumerate(files.items()):
                try:
                    trial.run(subject.path)
                except ModelRefusedError as error:
                    refused[name] = str(error)
                state.progress.step(index + 1, len(files))
        write_text(path, json.dumps(refused, indent=1) + "\n")

    state.folder.stage(stage, key, [path], work)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def refused_files(state: Run) -> dict[str, str]:
    """Names of files that the engine cannot run, and what it said."""
    path, recipe = _refused_path(state), state.recipe
    if not recipe.compress.variants or not path.exists() or not get_engine(recipe.environment.engine).may_abort:
        return {}
    refused: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return refused


def _refused_path(state: Run) -> Path:
    return state.folder.path / "compression" / "refused.json"


def _all_files(state: Run) -> dict[str, TimedFile]:
    recipe = state.recipe
    subjects = {DENSE: _baseline(state, recipe.baseline_engine)}
    if recipe.baseline_engine != recipe.environment.engine:
        subjects[dense_as_served(state)] = _served(state, subjects[DENSE].path)
    for name in state.names:
        for variant in recipe.variants:
            if (name, variant) != (DENSE, Variant.FP32):
                subjects[file_label(name, variant)] = _served(state, state.folder.member(name) / variant.onnx_file)
    return subjects


def dense_as_served(state: Run) -> str:
    """Name of the dense model on the engine that the members run on."""
    return f"{DENSE} ({state.recipe.environment.engine})"


def _baseline(state: Run, engine: EngineName) -> TimedFile:
    return TimedFile(state.folder.member(DENSE) / Variant.FP32.onnx_file, engine)


def _served(state: Run, path: Path) -> TimedFile:
    return TimedFile(path, state.recipe.environment.engine)
