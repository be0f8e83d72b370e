"""What evaluation remembers: sentence embeddings, which two scores read, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from ziplm_deploy.stages.evaluate import cache_embeddings


@pytest.mark.parametrize(("name", "calls_expected"), [("sentence_embedding", 2), ("logits", 3)])
def test_only_embeddings_are_kept(name: str, calls_expected: int) -> None:
    calls = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        return {name: inputs["input_ids"].sum(axis=1), "last_hidden_state": np.zeros(3)}

    remembered = cache_embeddings(run)
    one, other = ({"input_ids": np.full((2, 3), value), "mask": np.ones((2, 3))} for value in (1, 2))
    first = remembered(one)[name]
    np.testing.assert_array_equal(remembered(one)[name], first)
    assert not np.array_equal(remembered(other)[name], first)
    assert len(calls) == calls_expected
