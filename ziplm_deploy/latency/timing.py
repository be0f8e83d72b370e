"""TODO latency.timing."""

from __future__ import annotations

from pydantic import BaseModel


class Timing(BaseModel):
    """Summary of repeated timings of one thing, in milliseconds."""

    median_ms: float
    low_ms: float  # bootstrap 95 % interval of the median
    high_ms: float
    p90_ms: float
    p99_ms: float
    n: int
