"""Workloads of causal language models: the calls of a request, their weights, bad input."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ziplm_deploy.engines import WorkerOptions
from ziplm_deploy.recipe import Environment, Workload


@given(st.integers(4, 2000), st.integers(1, 2000), st.floats(0, 10), st.floats(0, 0.1))
def test_a_latency_that_is_linear_in_the_cache_adds_up_exactly(
    prefill: int, decode: int, base_ms: float, slope_ms: float
) -> None:
    first, *decodes = Workload(prefill=prefill, decode=decode).calls
    assert (first.seq_len, first.cache_length, first.weight) == (prefill, 0, 1.0)
    expected = sum(base_ms + slope_ms * length for length in range(prefill, prefill + decode))
    found = sum(call.weight * (base_ms + slope_ms * (call.cache_length or 0)) for call in decodes)
    assert found == pytest.approx(expected)
    assert sum(call.weight for call in decodes) == pytest.approx(decode)
    assert all(call.seq_len == 1 for call in decodes)
    assert len(decodes) <= 3


def test_both_ways_to_write_it_are_one_workload() -> None:
    plain = Workload.model_validate({"prefill": 128, "decode": 64, "batch_size": 2})
    named = Workload.model_validate({"generate": {"prefill": 128, "decode": 64, "batch_size": 2}})
    assert plain == named == Workload.model_validate(plain.model_dump())
    assert (plain.seq_len, plain.has_several, plain.generates) == (192, True, True)
    assert plain.fingerprint != Workload(prefill=127, decode=65, batch_size=2).fingerprint
    assert plain.fingerprint != Workload(seq_len=192, batch_size=2).fingerprint


def test_workers_get_the_cached_tokens_of_every_call() -> None:
    options = WorkerOptions.from_environment(Environment(workload=Workload(prefill=16, decode=9)))
    assert options.calls == ((1, 16, 0), (1, 1, 16), (1, 1, 24))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prefill": 128}, "both prefill and decode"),
        ({"decode": 128}, "both prefill and decode"),
        ({"prefill": 16, "decode": 8, "lengths": {8: 1}}, "no lengths"),
        ({"prefill": 16, "decode": 8, "seq_len": 32}, "prefill and decode or seq_len"),
        ({"prefill": 0, "decode": 8}, "expected prefill as a number of tokens from 1"),
        ({"prefill": 16, "decode": "many"}, "expected decode as a number of tokens"),
        ({"prefill": "128", "decode": 64}, "expected prefill as a number of tokens"),
        ({"prefill": 128.0, "decode": 64}, "expected prefill as a number of tokens"),
        ({"prefill": True, "decode": 64}, "expected prefill as a number of tokens"),
        ({"prefill": 2, "decode": 1}, "4 to 8192 tokens of prefill and decode together, found 3"),
        ({"generate": [16, 8]}, "expected generate as"),
        ({"generate": {"prefill": 16, "decode": 8}, "batch_size": 2}, "expected generate as"),
        ({"prefill": 8192, "decode": 8192}, "of prefill and decode together, found 16384"),
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Workload.model_validate(fields)
