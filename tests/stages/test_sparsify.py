"""Steps towards the sparsity of a member."""

from __future__ import annotations

import pytest

from ziplm_deploy.recipe import CompressConfig
from ziplm_deploy.stages.sparsify import sparsity_steps


def test_gradual_sparsity_grows_by_the_same_factor() -> None:
    settings = {"train": {"mode": "gradual"}, "sparsity": {"sparsity": 0.875, "passes": 3}, "variants": ["sparse"]}
    steps = sparsity_steps(CompressConfig.model_validate(settings))
    assert [step.sparsity for step in steps] == pytest.approx([0.5, 0.75, 0.875])
    assert {step.passes for step in steps} == {1}
    distil = CompressConfig.model_validate({**settings, "train": {"mode": "distil"}})
    assert sparsity_steps(distil) == [distil.sparsity]
