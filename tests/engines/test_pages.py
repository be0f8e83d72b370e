"""An engine is one page in ``engines/worker``, and that folder runs where the package is not installed."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.engines import CHECKPOINT_ENGINES, ENGINES, Engine, WorkerHandle, WorkerOptions, base, get_engine
from ziplm_deploy.engines.worker.facts import page_of
from ziplm_deploy.recipe import Environment, choices

# A page as a contributor would write it: the model is not even read.
PAGE = '''
"""An engine that answers at once."""

import argparse
import sys

from .facts import EngineFacts

FACTS = EngineFacts("numpy", may_abort=True)


class Sessions:
    def __init__(self, options):
        self.version = "knows ziplm_deploy" if "ziplm_deploy" in sys.modules else "1.0"

    def load(self, path):
        return Session()


class Session:
    def get_inputs(self):
        return [argparse.Namespace(name="input_ids", type="tensor(int64)", shape=["batch", "tokens"])]

    def get_outputs(self):
        return [argparse.Namespace(name="output", type="tensor(int64)", shape=["batch", "tokens"])]

    def run(self, names, inputs):
        return [inputs["input_ids"] + 1]
'''

# What the package does with it: the list, the choice in a recipe, the facts, a process that answers.
PROGRAM = """
import sys, numpy
from pathlib import Path
from ziplm_deploy.engines import ENGINES, WorkerOptions, get_engine
from ziplm_deploy.recipe import parse_recipe

raw = {"name": "x", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}
recipe = parse_recipe({**raw, "environment": {"engine": "quick-one"}})
engine = get_engine(recipe.environment.engine)
assert engine.may_abort and engine.version() == numpy.__version__
with engine.start_worker(WorkerOptions()) as worker:
    worker.load("a", Path(sys.argv[1]))
    assert worker.infer("a", {"input_ids": numpy.ones((1, 2), int)})["output"].tolist() == [[2, 2]]
    assert len(worker.time("a", n=3)) == 3
print(*ENGINES, worker.version)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mlp(tmp_path / "a.onnx", 8)


@pytest.fixture
def copied_worker(tmp_path: Path) -> Path:
    """The worker's folder elsewhere, with one page more."""
    folder = tmp_path / "elsewhere" / "worker"
    shutil.copytree(base.WORKER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "quick_one_session.py").write_text(PAGE, encoding="utf-8")
    return folder


def test_a_page_more_is_an_engine_more(tmp_path: Path, model: Path) -> None:
    package = tmp_path / "checkout" / "ziplm_deploy"
    shutil.copytree(choices.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "engines" / "worker" / "quick_one_session.py").write_text(PAGE, encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{PROGRAM}", encoding="utf-8")
    done = subprocess.run([sys.executable, str(program), str(model)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["deepsparse", "llamacpp", "onnxruntime", "openvino", "quick-one", "1.0"]


def test_pages_are_listed_without_being_imported(copied_worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied_worker / "broken_session.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.setattr(choices, "PACKAGE", copied_worker.parent)
    found = choices.page_names("worker", suffix="_session")
    assert found == ("broken", "deepsparse", "llamacpp", "onnxruntime", "openvino", "quick-one")
    assert all((copied_worker / f"{page_of(name)}.py").is_file() for name in found)


def test_every_page_is_an_engine_that_a_recipe_may_name() -> None:
    for name in ENGINES:
        engine = get_engine(name)
        assert isinstance(engine, Engine)
        assert (engine.name, Environment(engine=name).engine) == (name, name)
        assert engine.facts.install or engine.facts.has_own_environment  # or nobody could bring it


def test_what_runs_checkpoints_is_no_engine_of_a_recipe() -> None:
    assert CHECKPOINT_ENGINES == ("torch",)
    assert not set(CHECKPOINT_ENGINES) & set(ENGINES)
    assert get_engine("torch").version()
    with pytest.raises(ValidationError, match="torch"):
        Environment(engine="torch")


def test_a_worker_needs_no_package_around_it(
    copied_worker: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-I", str(copied_worker), "--probe", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[1])["ms"]) == 5
    monkeypatch.setattr(base, "WORKER", copied_worker)
    with WorkerHandle("quick-one", sys.executable, WorkerOptions()) as worker:
        worker.wait_until_ready()
        assert worker.version == "1.0"


def test_files_of_the_worker_do_not_hide_packages(copied_worker: Path, model: Path) -> None:
    (copied_worker / "onnxruntime.py").write_text("raise ImportError('the wrong one')", encoding="utf-8")
    done = subprocess.run([sys.executable, str(copied_worker), "--probe", str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_worker_imports_numpy_its_engine_and_its_own_files_only() -> None:
    allowed = {"numpy", "onnx", "transformers", "xllamacpp", *ENGINES, *CHECKPOINT_ENGINES, *sys.stdlib_module_names}
    for path in base.WORKER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, path.name
