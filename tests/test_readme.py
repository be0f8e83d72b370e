"""What the documents say holds: generated parts are current; commands, recipes, Python, files in them are real."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

import ziplm_deploy
from ziplm_deploy.cli.commands import app
from ziplm_deploy.errors import UsageError
from ziplm_deploy.guides import first_sentence, guide_names, read_guide, recipe_names, recipe_text
from ziplm_deploy.recipe import parse_recipe, recipe_reference

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ROOT / "ziplm_deploy" / "guides"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / ".github").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "profiles" / "README.md",
    *sorted(GUIDES.rglob("*.md")),
]
TASKS = [
    *(
        "sentence-similarity",
        "text-classification",
        "multi-label-classification",
        "text-regression",
        "question-answering",
        "token-classification",
    ),
    *("fill-mask", "image-classification", "image-feature-extraction", "reranking"),
]
MAX_LINES = 150  # of README
FIRST_WORDS = ("Of", "That", "As", "Until", "Beside", "The same")  # with which no sentence that stands alone begins
BASE = {
    "name": "base",
    "model": {"path": "./model", "task": "text-classification"},
    "data": {"calibration": "train.csv"},
    "speedups": [2],
}
FOLDERS = ("ziplm_deploy/", "exporters/", "benchmarks/", "profiles/", "tests/", ".ci/", ".github/")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=named)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language; "" for those that name none, which hold commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for name, body in found if name == language]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


# Generated parts


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    """The program that fills the documents, which is no package."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(folder)
    for name in ("common", "summary"):
        sys.modules.pop(name, None)


@every_document
def test_generated_parts_are_current(tables: ModuleType, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run: python benchmarks/tables.py"
    assert path in tables.DOCUMENTS or "<!-- table:" not in text


def test_every_table_stands_somewhere(tables: ModuleType) -> None:
    found = [name for path in tables.DOCUMENTS for name in tables.MARK.findall(path.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(tables.TABLES), "each in one place"


def test_a_table_may_stand_in_several_places(tables: ModuleType) -> None:
    mark = "<!-- table:recipe -->\nSTALE\n<!-- end:recipe -->"
    filled = tables.fill(f"a\n{mark}\nb\n{mark}\nc")
    assert filled.count(recipe_reference()) == 2
    assert "STALE" not in filled
    assert tables.fill(filled) == filled


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table:nothing -->\n<!-- end:nothing -->",
        "<!-- table:recipe -->\nno end",
        "<!-- end:recipe -->\n<!-- table:recipe -->",
        "<!-- table:recipe -->\n<!-- end:figures -->",
    ],
)
def test_wrong_markers_are_errors(tables: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="known"):
        tables.fill(text)


# Commands


def command_lines(text: str) -> list[str]:
    """Every call of the command line in a document: in blocks of commands, and alone between backticks."""
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]
    lines += [span for span in spans if not re.fullmatch(r"ziplm-deploy [a-z-]+", span)]
    calls = []
    for line in lines:
        for part in re.split(r"&&|\||>", line):
            part = re.sub(r"^(accelerate launch|torchrun) .*?-m ziplm_deploy\b", "ziplm-deploy", part.strip())
            if re.match(r"ziplm-deploy\s+\S", part):
                calls.append(part)
    return calls


def command_names(text: str) -> set[str]:
    """Commands that a document calls, or only names between backticks."""
    return {line.split()[1] for line in command_lines(text)} | set(re.findall(r"`ziplm-deploy ([a-z-]+)`", text))


def all_commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def parse_command(line: str) -> None:
    """Parse a line as the program would, without running it; click raises what is wrong with it."""
    name, *arguments = shlex.split(line, comments=True)[1:]
    commands = all_commands()
    assert name in commands, f"{line}: no command {name}; there are {', '.join(commands)}"
    commands[name].make_context(name, list(arguments))


def test_commands_are_found_and_wrong_ones_are_refused() -> None:
    block = "```\npip install x && ziplm-deploy doctor  # why\ntorchrun --x 2 -m ziplm_deploy run a\n```\n"
    text = f"`ziplm-deploy run a.yaml`, `ziplm-deploy report`\n\n{block}"
    assert command_lines(text) == ["ziplm-deploy doctor  # why", "ziplm-deploy run a", "ziplm-deploy run a.yaml"]
    assert command_names(text) == {"doctor", "run", "report"}
    parse_command("ziplm-deploy run a.yaml --speedups 2,3  # a comment")
    for wrong in ("ziplm-deploy run", "ziplm-deploy run a.yaml --no-such-option", "ziplm-deploy run a.yaml --seed x"):
        with pytest.raises(Exception, match=r"(?i)missing|no such option|valid integer"):
            parse_command(wrong)
    with pytest.raises(AssertionError, match="no command"):
        parse_command("ziplm-deploy fly")


@every_document
def test_every_command_line_parses(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert command_names(text) <= set(all_commands())
    for line in command_lines(text):
        parse_command(line)


def test_the_documents_name_every_command() -> None:
    named_somewhere = {name for path in DOCUMENTS for name in command_names(path.read_text(encoding="utf-8"))}
    assert set(all_commands()) <= named_somewhere


# Recipes


def merged(base: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    """``fragment`` over ``base``, section by section."""
    result = dict(base)
    for key, value in fragment.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


@every_document
def test_every_yaml_block_is_a_recipe_or_a_part_of_one(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8"), "yaml"):
        parse_recipe(merged(BASE, yaml.safe_load(block)), source=named(path))


@pytest.mark.parametrize("name", recipe_names())
def test_every_ready_recipe_is_valid_alone(name: str) -> None:
    recipe = parse_recipe(yaml.safe_load(recipe_text(name)), source=name)
    assert name not in TASKS or recipe.model.task == name
    assert recipe_text(name).startswith("# "), "says what it is for"


def test_every_task_has_a_ready_recipe() -> None:
    assert set(TASKS) < set(recipe_names())


def test_quickstart_recipe_is_valid() -> None:
    parse_recipe(yaml.safe_load((ROOT / "benchmarks" / "quickstart.yaml").read_text(encoding="utf-8")))


# Python


def names_of(module: str) -> set[str]:
    loaded = importlib.import_module(module)
    return set(getattr(loaded, "__all__", ())) | set(dir(loaded))


def missing_names(code: str) -> list[str]:
    """Names of this package that a piece of code uses and that do not exist."""
    missing, tree = [], ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("ziplm_deploy", "exporters"):
            module = node.module or ""
            if importlib.util.find_spec(module) is None:
                missing.append(module)
            else:
                missing += [f"{module}.{alias.name}" for alias in node.names if alias.name not in names_of(module)]
        elif isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.startswith("ziplm_deploy")]
            missing += [name for name in own if importlib.util.find_spec(name) is None]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ziplm_deploy":
            missing += [] if node.attr in ziplm_deploy.__all__ else [f"ziplm_deploy.{node.attr}"]
    return missing


def test_names_that_do_not_exist_are_found() -> None:
    code = (
        "import ziplm_deploy\nfrom ziplm_deploy.errors import DataError, Nothing\nziplm_deploy.load\nziplm_deploy.fly"
    )
    assert missing_names(code) == ["ziplm_deploy.errors.Nothing", "ziplm_deploy.fly"]


@every_document
def test_every_python_block_compiles_and_its_names_exist(path: Path) -> None:
    for number, block in enumerate(blocks(path.read_text(encoding="utf-8"), "python")):
        compile(block, f"{named(path)}, block {number}", "exec")
        assert missing_names(block) == []


def test_the_guide_names_the_whole_public_interface() -> None:
    text = read_guide("python-api")
    functions = [name for name in ziplm_deploy.__all__ if name.islower()]
    assert [name for name in functions if f"{name}(" not in text] == []


# Files and links


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_every_link_leads_somewhere(path: Path) -> None:
    text = without_blocks(path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{target} in {named(path)}"
        assert not anchor or anchor in anchors(linked), f"{target} in {named(path)}"


@every_document
def test_every_path_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for span in re.findall(r"`([^`\n]+)`", without_blocks(text)):
        for word in span.split():
            if word.startswith(FOLDERS) and not re.search(r"[A-Z]{3,}\b(?!\.md)|[*…{<]", word):
                assert (ROOT / word.rstrip(".,")).exists(), f"{word} in {named(path)}"


# Form


def test_readme_is_short_and_has_one_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert len(re.findall(r"!\[[^\]]*\]\((?!https://img)", text)) == 1


def test_readme_names_every_guide() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in guide_names() if f"ziplm_deploy/guides/{name}.md" not in text] == []


@pytest.mark.parametrize("name", guide_names())
def test_first_sentence_of_a_guide_stands_alone(name: str) -> None:
    sentence = first_sentence(name)
    assert read_guide(name).startswith("# ")
    assert re.search(r"[.!?]$", sentence)
    assert "\n" not in sentence
    assert not re.match(rf"({'|'.join(FIRST_WORDS)})\b", sentence), sentence


def test_unknown_guides_and_recipes_are_errors_that_list_the_known() -> None:
    with pytest.raises(UsageError, match=r"quickstart.*found 'quickstrat'"):
        read_guide("quickstrat")
    with pytest.raises(UsageError, match=r"fill-mask.*found 'fillmask'"):
        recipe_text("fillmask")
    for outside in ("../errors", "/etc/passwd", "", "quickstart.md"):
        with pytest.raises(UsageError, match="expected a guide"):
            read_guide(outside)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=named)
def test_issue_forms_have_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert form["name"]
    assert form["description"]
    kinds = {"markdown", "textarea", "input", "checkboxes"}
    for field in form["body"]:
        assert field["type"] in kinds
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids)
    assert "doctor" in ids, "every report says on which machine"
    if path.stem == "wrong_prediction":
        assert {"doctor", "profile", "benchmark"} <= set(ids)
