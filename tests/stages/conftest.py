"""Whole runs here are not about the table that they begin with: tests/latency measures tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.latency import profile as latency
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.stages import profile

TABLES: dict[str, LatencyTable] = {}  # by what they were asked for


@pytest.fixture(autouse=True, scope="module")
def tables_are_measured_once() -> Iterator[None]:
    """Runs that ask for the same table share one measurement of it; each still writes and reads its own file.

    Its whole models have one process each instead of several.
    """

    def measured_once(request: TableRequest, *arguments: Any, **options: Any) -> LatencyTable:
        key = content_key(
            shape=request.shape,
            graph=request.graph,
            environment=request.environment,
            baseline=request.baseline,
            treatment=[request.treatment.variant, request.treatment.description],
            profile=request.profile,
            export=request.export,
        )
        if key not in TABLES:
            TABLES[key] = latency.measure_table(request, *arguments, **options)
        return TABLES[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WHOLE_PROCESSES", 1)
        patch.setattr(profile, "measure_table", measured_once)
        yield
