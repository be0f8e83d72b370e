"""The order in which training goes through its examples."""

from __future__ import annotations

import torch

from ziplm_deploy.recovery.examples import LengthGrouped


def test_grouping_by_length_is_a_permutation_that_depends_on_the_epoch() -> None:
    lengths = torch.randint(1, 50, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGrouped(lengths, 10, seed=1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    assert first == again != list(sampler)
    assert sorted(first) == list(range(500))
    spread = [
        max(lengths[i] for i in first[k : k + 10]) - min(lengths[i] for i in first[k : k + 10])
        for k in range(0, 500, 10)
    ]
    assert sum(spread) / len(spread) < 10
