"""Published JSON schemas of the files that users read or write."""

from __future__ import annotations

from typing import Any

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.errors import UsageError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.reporting.records import FamilyReport

ARTIFACTS: dict[str, type[Artifact]] = {
    "benchmark": BenchmarkRecord,
    "plan": PruningPlan,
    "report": FamilyReport,
    "table": LatencyTable,
}


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema of a saved artifact, with its ``kind`` and ``schema_version``, or of a recipe.

    Raises:
        UsageError: no such kind; names those there are.
    """
    if kind == "recipe":
        return Recipe.model_json_schema(mode="validation")
    if kind not in ARTIFACTS:
        raise UsageError(
            f"expected one of {', '.join(sorted([*ARTIFACTS, 'recipe']))}, found {kind!r}; name one of them"
        )
    artifact = ARTIFACTS[kind]
    schema = artifact.model_json_schema(mode="serialization")
    schema["properties"] = {
        "kind": {"const": artifact.KIND},
        "schema_version": {"const": artifact.SCHEMA_VERSION},
        **schema["properties"],
    }
    schema["required"] = ["kind", "schema_version", *schema.get("required", [])]
    return schema
