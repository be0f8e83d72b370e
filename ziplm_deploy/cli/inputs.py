"""What the command line takes: recipes with their overrides, options as recipe sections, ONNX files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ziplm_deploy.errors import UsageError
from ziplm_deploy.machine import distributed
from ziplm_deploy.progress import ConsoleProgress, Progress
from ziplm_deploy.recipe import EngineName, Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from ziplm_deploy.latency.benchmark import TimedFile


def resolved_recipe(
    path: Path,
    output_dir: Path | None = None,
    speedups: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
) -> Recipe:
    """The recipe in a file, with what the command line says instead."""
    overrides: dict[str, Any] = {}
    if output_dir is not None:
        overrides["output_dir"] = str(output_dir)
    if speedups is not None:
        overrides["speedups"] = [part.strip() for part in speedups.split(",")]
    if seed is not None:
        overrides["seed"] = seed
    if path.suffix in {".onnx", ".safetensors", ".bin", ".pt", ".json"}:
        raise UsageError(f"expected a recipe (YAML), found {path}; see: ziplm-deploy recipe-reference")
    recipe = load_recipe(path, overrides)
    if threads is not None:
        fields = recipe.model_dump(mode="json")
        fields["environment"]["threads"] = threads
        recipe = parse_recipe(fields, source="command line")
    return recipe


def validated(section: type[Any], **values: Any) -> Any:
    """A recipe section from options; wrong values are reported by the recipe's own checks."""
    try:
        return section(**values)
    except ValidationError as error:
        found = "; ".join(f"--{str(e['loc'][-1]).replace('_', '-')}: {e['msg']}" for e in error.errors())
        raise UsageError(f"expected valid options, found {found}") from error


def onnx_files(paths: list[Path]) -> dict[str, Path]:
    """Names for ONNX files, as short as they can be without becoming equal."""
    for path in paths:
        if path.suffix != ".onnx":
            raise UsageError(f"expected only ONNX files (*.onnx) beside each other, found {path}; leave it out")
        if not os.path.isfile(path):  # False for a name too long for any file
            raise UsageError(f"expected an ONNX file at {path}, found none; check the path")
    candidates = (
        [path.stem for path in paths],
        [path.parent.name for path in paths],
        [str(path) for path in paths],
        [f"{index}: {path}" for index, path in enumerate(paths)],
    )
    names = next(names for names in candidates if len(set(names)) == len(paths) and all(names))
    return dict(zip(names, paths, strict=True))


def on_engines(
    files: dict[str, Path], engines: list[EngineName], memory_limit_bytes: int | None = None
) -> dict[str, TimedFile]:
    """Every file on every engine; they may come from anywhere, and a few bytes of graph can ask for any memory."""
    from ziplm_deploy.latency.benchmark import TimedFile

    return {
        f"{name} ({engine})" if len(engines) > 1 else name: TimedFile(path, engine, memory_limit_bytes)
        for engine in engines
        for name, path in files.items()
    }


def memory_limit_bytes(limit_gib: float | None) -> int | None:
    """What the process of a file from anywhere may take: as asked, or all that there is; None: not known."""
    from ziplm_deploy.machine.info import machine_info

    if limit_gib is not None and not 0 < limit_gib < float("inf"):
        raise UsageError(f"expected --memory-limit above 0 GiB, found {limit_gib:g}; correct it, or leave it out")
    return machine_info().memory_bytes or None if limit_gib is None else int(limit_gib * 2**30)


def console_progress(quiet: bool) -> Progress:
    """Progress on stderr; none if it is not wanted, or of the processes of a launch but the first."""
    return Progress() if quiet or not distributed.is_first() else ConsoleProgress()
