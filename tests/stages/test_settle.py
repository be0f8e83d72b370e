"""Aims settled on drafts, against a simulated machine whose speed differs from the table's promise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.pipeline import recipe
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.recipe import BenchmarkConfig, member_name
from ziplm_deploy.run.manifest import Correction
from ziplm_deploy.run.member import DENSE, Member, PrunedMember
from ziplm_deploy.run.run import Generation
from ziplm_deploy.stages import prune, settle


def member_of(target: float) -> PrunedMember:
    return PrunedMember(member_name(target), Path("run"), trained=False, target=target)


class Machine:
    """Drafts promise what they are asked for; measured is ``bias`` times that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, targets: tuple[float, ...], bias: float, noise: float = 0.005):
        self.bias, self.noise = bias, noise
        self.generation = Generation(Member(DENSE, Path("run"), trained=False), tuple(map(member_of, targets)))
        self.generations = [self.generation]
        self.corrections: dict[str, Correction] = {}
        self.drafted: dict[str, float] = {}
        self.recipe = SimpleNamespace(
            benchmark=BenchmarkConfig(),
            prune=SimpleNamespace(method="ziplm"),
            environment=SimpleNamespace(engine="onnxruntime"),
        )
        self.progress = SimpleNamespace(note=lambda text: None)
        self.folder = SimpleNamespace(
            correction=lambda name, key: self.corrections.get(name),
            set_correction=lambda name, key, correction: self.corrections.__setitem__(name, correction),
            settling=lambda parent: parent,
        )
        self.parent_of = lambda member: SimpleNamespace(planner=SimpleNamespace(budget_ms=self._budget_ms))
        for module in (settle, prune):
            monkeypatch.setattr(module, "member_key", lambda run, member: "key")
        monkeypatch.setattr(settle, "export_dense", lambda run: None)
        monkeypatch.setattr(settle, "dense_file", lambda run: None)
        monkeypatch.setattr(settle, "_draft", self._draft)
        monkeypatch.setattr(settle, "measure", self._measure)
        plan = SimpleNamespace(
            load=lambda path: SimpleNamespace(predicted_speedup=self.drafted[path.stem.removesuffix("-draft")])
        )
        monkeypatch.setattr(settle, "PruningPlan", plan)

    def _budget_ms(self, aim: float) -> float:
        if aim > 10.0:
            raise TargetUnreachableError("expected less", 10.0)
        return 1.0

    def _draft(self, run: Any, member: PrunedMember) -> None:
        correction = self.corrections.get(member.name)
        self.drafted[member.name] = correction.predicted_target if correction else member.target

    def _measure(self, *arguments: Any, **options: Any) -> Any:
        return SimpleNamespace(
            variant=lambda name: SimpleNamespace(speedup=self.bias * self.drafted[name]),
            itself=Ratio(1.0, 1 - self.noise, 1 + self.noise),
        )

    def run(self) -> None:
        settle.settle(self, self.generation)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [0.8, 0.97, 1.05])
def test_a_search_gets_the_budget_that_reaches_the_target(monkeypatch: pytest.MonkeyPatch, bias: float) -> None:
    machine = Machine(monkeypatch, (1.5, 3.0), bias)
    machine.run()
    for target in (1.5, 3.0):
        aim = machine.corrections[f"{target:g}x"].predicted_target
        assert aim * bias == pytest.approx(1.005 * target)
    before = dict(machine.corrections)
    machine.drafted.clear()
    machine.run()  # settled: nothing is measured again
    assert (machine.corrections, machine.drafted) == (before, {})


def test_a_later_generation_goes_by_what_the_one_before_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0,), bias=0.8)
    first = Generation(Member(DENSE, Path("run"), trained=False), (member_of(1.5),))
    machine.generations = [first, machine.generation]
    plan = SimpleNamespace(load=lambda path: SimpleNamespace(predicted_speedup=1.5))
    monkeypatch.setattr(prune, "PruningPlan", plan)
    record = SimpleNamespace(variant=lambda name: SimpleNamespace(speedup=1.5 * 0.8))
    monkeypatch.setattr(prune, "BenchmarkRecord", SimpleNamespace(load=lambda path: record))
    machine.folder.generation_benchmark = lambda parent: parent
    machine.run()
    assert machine.drafted == {}
    assert machine.corrections["2x"].predicted_target == pytest.approx(2.0 / 0.8)


def test_noise_and_targets_out_of_reach_leave_the_aim_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = Machine(monkeypatch, (2.0,), bias=0.8, noise=0.05)
    noisy.run()
    assert noisy.corrections == {"2x": Correction(2.0, settled=True)}
    far = Machine(monkeypatch, (9.0, 11.0), bias=0.8)
    far.run()
    assert far.corrections == {"9x": Correction(9.0, settled=True)}
    assert "11x" not in far.drafted


def test_what_was_corrected_before_is_not_settled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0,), bias=0.8)
    machine.corrections["2x"] = Correction(2.2, corrections=1)
    machine.run()
    assert machine.corrections["2x"] == Correction(2.2, corrections=1)
    started = Machine(monkeypatch, (2.0,), bias=0.8)
    started.corrections["2x"] = Correction(2.4)  # what a generation before has shown
    started.run()
    assert started.drafted["2x"] == 2.4
    assert started.corrections["2x"].predicted_target * 0.8 == pytest.approx(1.005 * 2.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"benchmark": {"max_corrections": 3}}, True),
        ({"benchmark": {"max_corrections": 0}}, False),
        ({"benchmark": {"max_corrections": 3}, "prune": {"method": "magnitude"}}, False),
        (
            {
                "benchmark": {"max_corrections": 3},
                "environment": {"engine": "deepsparse"},
                "export": {"shapes": "static", "opset": 14},
            },
            False,
        ),
    ],
)
def test_drafts_are_timed_where_they_save_a_search(changes: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    assert settle.settles(recipe(tmp_path, **changes)) is expected
