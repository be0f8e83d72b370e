"""Docstrings are there, and their first sentences stand alone; spelling is Oxford's.

A reader who lands by search has no line before the docstring. So its first sentence begins with a noun or a verb, never
with a word that leans on what was said before. Who needs one: every module, every public class, function and method,
but for

- what a base class in the packages has explained (an override), and hooks that a framework calls by a fixed name;
- methods that do one thing in one line: their name and that line say it;
- the only public thing in a module, if it is a class: the module's docstring is about it.

Whoever has a docstring keeps these rules, also if it needs none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("ziplm_deploy", "exporters") for path in (ROOT / package).rglob("*.py"))
GUIDES = sorted((ROOT / "ziplm_deploy" / "guides").rglob("*.md"))
LEANING = ("Of", "That", "As", "Until", "Beside", "The same", "Those of")
# Called by name by torch, transformers, typer and logging, which say what they are for.
HOOKS = {
    "forward",
    "backward",
    "compute_loss",
    "set_epoch",
    "on_train_begin",
    "on_step_end",
    "on_save",
    "invoke",
    "emit",
}
# Words whose -ise is no suffix. All others that end like this are -ize here.
TRULY_ISE = set(
    re.findall(
        r"\w+",
        """
        advise arise comprise compromise concise devise disguise elementwise exercise expertise imprecise likewise
        madvise merchandise noise otherwise precise premise promise raise revise rise supervise surprise wise
        """,
    )
)
STAGE_NAME = "quantise"  # of a stage in manifests: to rename it would start everybody's runs anew

Definition = ast.ClassDef | ast.FunctionDef
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in node.body if isinstance(each, ast.FunctionDef)]


def inherited(node: ast.ClassDef) -> set[str]:
    """Names of methods of the base classes in the packages, and of theirs."""
    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    found: set[str] = set()
    for base in (CLASSES[name] for name in bases if name in CLASSES and name != node.name):
        found |= {method.name for method in methods_of(base)} | inherited(base)
    return found


def is_one_line(method: ast.FunctionDef) -> bool:
    return len(method.body) == 1 and isinstance(method.body[0], ast.Return | ast.Expr | ast.Assign)


def in_need(tree: ast.Module) -> Iterator[Definition]:
    """Definitions of a module that need a docstring, by the rule of this file."""
    public = [
        node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    for node in public:
        if isinstance(node, ast.FunctionDef) or len(public) > 1:
            yield node
        if isinstance(node, ast.ClassDef):
            explained = inherited(node) | HOOKS
            for method in methods_of(node):
                if not (method.name.startswith("_") or method.name in explained or is_one_line(method)):
                    yield method


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and docstring of everything in a module that has one, private things included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "(module)"), text


def test_every_module_says_what_is_in_it() -> None:
    assert [named(path) for path, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_whatever_is_public_has_a_docstring() -> None:
    silent = [
        f"{named(path)}:{node.lineno} {node.name}"
        for path, tree in TREES.items()
        for node in in_need(tree)
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_first_sentences_stand_alone() -> None:
    leaning = [
        f"{named(path)} {name}: {text[:60]}"
        for path, tree in TREES.items()
        for name, text in docstrings(tree)
        if re.match(rf"({'|'.join(LEANING)})\b", text)
    ]
    assert leaning == []


def test_first_sentences_are_sentences() -> None:
    """They begin with a capital letter, a name, a number or a formula, and the paragraph ends with a full stop."""
    broken = [
        f"{named(path)} {name}: {text[:60]}"
        for path, tree in TREES.items()
        for name, text in docstrings(tree)
        if not re.search(r"[.:?…)`]$", text.split("\n\n")[0]) or re.match(r"\W*$", text)
    ]
    assert broken == []


def test_nothing_is_left_to_do() -> None:
    assert [named(path) for path in FILES + GUIDES if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text("utf-8"))] == []


def british(text: str) -> list[str]:
    """Words of a text, parts of identifiers included, with an -ise that Oxford spells -ize."""
    words = re.findall(r"[A-Z]?[a-z]+", text)
    suffix = re.compile(r"(.+)is(e|ed|es|er|ers|ing|ation|ations)$")
    found = []
    for word in words:
        match = suffix.match(word.lower())
        if match and match[1] + "ise" not in TRULY_ISE:
            found.append(word)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("raise the noise, otherwise promised precisely", []),
        ("def quantise_file(): ...", ["quantise"]),
        ("class Optimiser: normalisation", ["Optimiser", "normalisation"]),
        ("Optimizer, normalization, initialized, analyse, license", []),
    ],
)
def test_british_finds_what_oxford_spells_otherwise(text: str, found: list[str]) -> None:
    assert british(text) == found


def test_spelling_is_oxfords() -> None:
    stage = ROOT / "ziplm_deploy" / "stages" / "quantize.py"
    found = {
        named(path): words
        for path in FILES + GUIDES
        if (words := british(path.read_text(encoding="utf-8"))) and not (path == stage and words == [STAGE_NAME])
    }
    assert found == {}
