"""How the house is built: rooms, imports between them, circles, and lengths of files and functions.

``python benchmarks/layout.py [TREE ...]``: one row a checkout, default: this one. Imports under ``TYPE_CHECKING`` and
inside functions count. Nothing is imported or run, so that trees of other versions can be compared.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("ziplm_deploy", "exporters")


@dataclass(frozen=True)
class Layout:
    """Counts of one tree. A room is a folder, or a file that lies flat in the package."""

    rooms: int
    flat_files: int
    arrows: int  # pairs of rooms of which one imports the other
    circles: int  # groups of rooms that import each other
    module_circles: int  # groups of files that import each other
    file_lines: list[int]
    function_lines: list[int]

    def row(self) -> list[str]:
        lengths = [f"{statistics.median(lines):g} / {max(lines)}" for lines in (self.file_lines, self.function_lines)]
        counts = (self.rooms, self.flat_files, self.arrows, self.circles, self.module_circles, len(self.file_lines))
        return [*map(str, counts), *lengths]


TITLES = ["rooms", "flat files", "arrows", "circles of rooms", "of files", "files", "lines a file", "lines a function"]


def modules(tree: Path) -> dict[str, Path]:
    """Dotted names of all files of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((tree / package).rglob("*.py")):
            name = ".".join(path.relative_to(tree).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a module imports anywhere in its text."""
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                depth = node.level - (known[name].stem == "__init__")
                base = ".".join([*parts[: len(parts) - depth], *filter(None, [node.module])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                if target in known and target != name:
                    yield target


def room(name: str) -> str:
    parts = name.split(".")
    return parts[0] if parts[0] == "exporters" else ".".join(parts[:2])


def circles(graph: dict[str, set[str]]) -> int:
    """Strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    count = 0

    def visit(node: str) -> None:
        nonlocal count
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            count += len(stack) - place > 1
            del stack[place:]

    for node in graph:
        if node not in index:
            visit(node)
    return count


def layout(tree: Path) -> Layout:
    known = modules(tree)
    entrances = {"ziplm_deploy", "ziplm_deploy.__main__"}  # open every room on demand
    graph = {name: set(imports(name, known)) - entrances for name in known if name not in entrances}
    of_rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        of_rooms.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    texts = [path.read_text(encoding="utf-8") for path in known.values()]
    functions = [
        (node.end_lineno or 0) - node.lineno + 1
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return Layout(
        rooms=len(of_rooms),
        flat_files=len(list((tree / PACKAGES[0]).glob("*.py"))),
        arrows=sum(map(len, of_rooms.values())),
        circles=circles(of_rooms),
        module_circles=circles(graph),
        file_lines=[text.count("\n") for text in texts if text],
        function_lines=functions,
    )


def main() -> int:
    print("| tree | " + " | ".join(TITLES) + " |")
    print("|---" * (len(TITLES) + 1) + "|")
    for tree in map(Path, sys.argv[1:] or ["."]):
        print(f"| {tree.resolve().name} | " + " | ".join(layout(tree).row()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
