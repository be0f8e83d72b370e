"""The package's surface, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ziplm_deploy

EXPECTED = [
    "BenchmarkRecord",
    "FamilyReport",
    "LatencyTable",
    "PruningPlan",
    "Recipe",
    "TimedFile",
    "TowerPairs",
    "TrainingRecord",
    "ZipLMError",
    "benchmark",
    "compare",
    "compress",
    "export",
    "inspect_model",
    "load",
    "load_generation_model",
    "load_harness_model",
    "load_recipe",
    "load_runner",
    "machine_info",
    "pair_towers",
    "profile",
    "prune",
    "recover",
    "report",
    "run_recipe",
]


def test_the_surface_is_exact_and_sorted() -> None:
    assert ziplm_deploy.__all__ == EXPECTED == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_name_resolves_to_something_documented(name: str) -> None:
    value = getattr(ziplm_deploy, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(ziplm_deploy)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        ziplm_deploy.frobnicate  # noqa: B018


@pytest.mark.parametrize("module", ["ziplm_deploy", "ziplm_deploy.cli.commands", "ziplm_deploy.artifacts"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'datasets', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_texts_are_continued_without_torch() -> None:
    code = (
        "import sys, ziplm_deploy\n"
        "ziplm_deploy.load_runner\n"
        "heavy = {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_names_stay_functions_after_their_modules_are_imported() -> None:
    code = (
        "import ziplm_deploy.run.run, ziplm_deploy.api, ziplm_deploy.reporting.collect, ziplm_deploy as z\n"
        "assert all(callable(getattr(z, name)) for name in z.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
