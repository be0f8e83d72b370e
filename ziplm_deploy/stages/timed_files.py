"""The files that a run times: which ones, under which name, on which engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.engines import get_engine
from ziplm_deploy.engines.trial import ModelRefusedError, RefusedFiles, Trial
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import TimedFile, start_worker
from ziplm_deploy.recipe import file_label
from ziplm_deploy.run import gguf
from ziplm_deploy.run.member import DENSE, ModelFile, PrunedMember
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.baselines import made_baselines
from ziplm_deploy.stages.formats import measured_gguf_files

PLAIN_PAGES = f"{DENSE} (plain pages)"


def files_of_generation(run: Run, generation: Generation) -> dict[str, TimedFile]:
    """The dense model and, for every target of a generation, a file as fast as the member will be."""
    variant = run.recipe.target
    files = {DENSE: dense_file(run)}
    for member in generation.members:
        path = member.as_pruned.path if variant.is_exported else member.stand_in(variant)
        files[member.name] = TimedFile(path, run.recipe.environment.engine)
    return files


def refused_members(run: Run, generation: Generation) -> dict[PrunedMember, str]:
    """Members of a generation whose files the engine cannot run, and what it said about them."""
    files = {name: file for name, file in files_of_generation(run, generation).items() if name != DENSE}
    path = run.folder.refused_of(generation.parent.name)
    refused = _tried(run, trial_name(generation), path, files)
    return {member: refused[member.name] for member in generation.members if member.name in refused}


def trial_name(generation: Generation) -> str:
    """Name of the stage of :func:`refused_members`."""
    return f"try pruned files of {generation.parent.name}"


def files_of_family(run: Run) -> dict[str, TimedFile]:
    """Every file of every member that its engine can run; the dense model also where the members serve, if its baseline
    is elsewhere, and without huge pages, if those are asked for; what users get from it without pruning; and members in
    llama.cpp, where the recipe asks for it."""
    refused = refused_files(run)
    files = {name: file for name, file in _all_files(run).items() if name not in refused}
    if run.recipe.environment.huge_pages:
        files[PLAIN_PAGES] = replace(dense_file(run), plain_pages=True)
    files |= {made.name: TimedFile(made.paths[0], made.page.engine) for made in made_baselines(run)}
    return files | {file.label: TimedFile(file.path, gguf.ENGINE) for file in measured_gguf_files(run)}


def try_files(run: Run) -> None:
    """Find the files that the engine cannot run, if it is one that may end its process over them.

    Raises:
        EngineError: it cannot run a file that a target is about.
    """
    recipe, stage = run.recipe, "try files"
    if not recipe.compress.variants:
        run.folder.set_note("refused files", None)
        return
    files = {name: file for name, file in _all_files(run).items() if name != DENSE}
    refused = _tried(run, stage, run.folder.refused_files, files)
    for name in (file_label(member.name, recipe.target) for member in run.pruned_members):
        if name in refused:
            run.folder.unmake(stage)
            raise EngineError(refused[name])
    text = f"{recipe.environment.engine} cannot run these files, so they were not measured: {', '.join(refused)}"
    run.folder.set_note("refused files", text if refused else None)


def _tried(run: Run, stage: str, path: Path, files: Mapping[str, TimedFile]) -> dict[str, str]:
    """Names of the files that the engine cannot run, and what it said; a stage, which writes them to ``path``."""
    environment = run.recipe.environment
    engine = get_engine(environment.engine)
    if not engine.may_abort:
        return {}
    key = content_key(
        files={name: run.file_hash(file.path) for name, file in files.items()},
        engine=engine.version(),
        environment=environment.fingerprint,
    )

    def work() -> None:
        refused: dict[str, str] = {}
        with Trial(lambda: start_worker(TimedFile(path, environment.engine), environment)) as trial:
            for index, (name, file) in enumerate(files.items()):
                try:
                    trial.run(file.path)
                except ModelRefusedError as error:
                    refused[name] = str(error)
                run.progress.step(index + 1, len(files))
        RefusedFiles(files=refused).save(path)

    run.folder.make(stage, key, [path], work)
    return RefusedFiles.load(path).files


def refused_files(run: Run) -> dict[str, str]:
    """Names of files that the engine cannot run, and what it said."""
    path, recipe = run.folder.refused_files, run.recipe
    if not recipe.compress.variants or not path.exists() or not get_engine(recipe.environment.engine).may_abort:
        return {}
    return RefusedFiles.load(path).files


def runnable_files(run: Run) -> list[ModelFile]:
    """Files of all members that the engine can run, the exported ones first; the dense model's own is always one."""
    refused = refused_files(run)
    files = [member.file(variant) for member in run.members for variant in run.recipe.variants]
    return [file for file in files if file.label not in refused]


def _all_files(run: Run) -> dict[str, TimedFile]:
    recipe = run.recipe
    files = {DENSE: dense_file(run)}
    if recipe.baseline_engine != recipe.environment.engine:
        files[dense_as_served(run)] = TimedFile(files[DENSE].path, recipe.environment.engine)
    for member in run.members:
        for variant in recipe.variants:
            file = member.file(variant)
            if file.label != DENSE:
                files[file.label] = TimedFile(file.path, recipe.environment.engine)
    return files


def dense_as_served(run: Run) -> str:
    """Name of the dense model on the engine that the members run on."""
    return f"{DENSE} ({run.recipe.environment.engine})"


def dense_file(run: Run) -> TimedFile:
    """What all speedups are over."""
    return TimedFile(run.dense_member.as_exported.path, run.recipe.baseline_engine)
