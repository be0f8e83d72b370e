"""The rooms of the house import downwards only, and only those that may know a whole run import it.

Imports are read from the syntax tree, so that those under ``TYPE_CHECKING`` and inside functions count, too.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ziplm_deploy"
# From the ground up: a room imports only from those before it.
FLOORS = (
    "errors",
    "progress",
    "guides",
    "documents",
    "artifacts",
    "machine",
    "recipe",
    "tasks",
    "models",
    "engines",
    "latency",
    "pruning",
    "recovery",
    "compression",
    "baselines",
    "reporting",
    "run",
    "stages",
    "pipeline",
    "api",
    "cli",
)
ENTRANCES = ("__init__", "__main__")  # they open every room on demand, and no room imports them
KNOW_A_RUN = {"run", "stages", "pipeline", "api"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Modules of this package that a module imports anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ziplm_deploy.") for alias in node.names if "ziplm_deploy." in alias.name}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found |= _targets(name, node, alias.name)
    return found - {name}


def _targets(name: str, node: ast.ImportFrom, imported_name: str) -> set[str]:
    if node.level:
        here = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
        for _ in range(node.level - 1):
            here = here.rpartition(".")[0]
        base = ".".join(filter(None, (here, node.module)))
    elif node.module == "ziplm_deploy" or (node.module or "").startswith("ziplm_deploy."):
        base = (node.module or "").removeprefix("ziplm_deploy").removeprefix(".")
    else:
        return set()
    whole = f"{base}.{imported_name}".removeprefix(".")
    return {whole if whole in MODULES else base or "__init__"}


GRAPH = {name: imported(name) for name in MODULES}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in MODULES} - set(ENTRANCES) == set(FLOORS)


def test_rooms_import_downwards_only() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in sorted(others)
        if room(name) in FLOORS and (room(other) in ENTRANCES or FLOORS.index(room(other)) > FLOORS.index(room(name)))
    ]
    assert not upward, "\n".join(upward)


def test_modules_import_in_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_libraries_know_no_run() -> None:
    knowing = {name for name, others in GRAPH.items() if any(room(other) == "run" for other in others)}
    assert {room(name) for name in knowing} <= KNOW_A_RUN, sorted(knowing)


def test_the_package_knows_the_exporters_and_not_the_other_way_round() -> None:
    for path in sorted((ROOT / "exporters").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) ziplm_deploy", text, re.MULTILINE), path.name


def test_few_files_lie_flat() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10


BESIDE = [path for folder in ("exporters", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [*MODULES.values(), *BESIDE], ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = 100 if path == PACKAGE / "pipeline.py" else 400
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, node.name
