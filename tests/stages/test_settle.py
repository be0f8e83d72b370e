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

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        targets: tuple[float, ...],
        bias: float,
        *,
        gradual: bool = False,
    ) -> None:
        self.bias, self.noise = bias, 0.005
        self.pruned_members = tuple(map(member_of, targets))
        self.dense_member = Member(DENSE, Path("run"), trained=False)
        self.generations = [Generation(self.dense_member, self.pruned_members)]
        if gradual:
            parents = (self.dense_member, *self.pruned_members[:-1])
            pairs = zip(parents, self.pruned_members, strict=True)
            self.generations = [Generation(parent, (member,)) for parent, member in pairs]
        self.corrections: dict[str, Correction] = {}
        self.timed: list[str] = []
        self.recipe = SimpleNamespace(
            benchmark=BenchmarkConfig(),
            prune=SimpleNamespace(method="ziplm"),
            environment=SimpleNamespace(engine="onnxruntime"),
        )
        self.progress = SimpleNamespace(note=lambda text: None, step=None)
        self.made: set[tuple[str, str]] = set()
        self.folder = SimpleNamespace(
            correction=lambda name, key: self.corrections.get(name),
            set_correction=lambda name, key, correction: self.corrections.__setitem__(name, correction),
            settling=folder / "settling.json",
            make=self._make,
        )
        planner = SimpleNamespace(budget_ms=self._budget_ms, draft=self._draft, resized=lambda sizes: None)
        self.parent = self.parent_of = lambda member: SimpleNamespace(planner=planner)
        for module in (settle, prune):
            monkeypatch.setattr(module, "member_key", lambda run, member: "key")
        monkeypatch.setattr(settle, "export_dense", lambda run: None)
        monkeypatch.setattr(settle, "dense_file", lambda run: None)
        monkeypatch.setattr(settle, "export_to_be_timed", lambda *arguments: None)
        monkeypatch.setattr(settle, "_draft_key", lambda run, member: f"{member.target} on {self.recipe.environment}")
        monkeypatch.setattr(settle, "compare", self._compare)

    def _make(self, stage: str, key: str, outputs: list[Path], work: Any) -> None:
        if (stage, key) not in self.made:
            work()
            self.made.add((stage, key))

    def _budget_ms(self, aim: float) -> float:
        if aim > 10.0:
            raise TargetUnreachableError("expected less", 10.0)
        return 1.0

    def _draft(self, target: float, aim: float, progress: Any) -> Any:
        self._budget_ms(aim)
        return SimpleNamespace(predicted_speedup=target, sizes={})

    def _compare(self, files: Any, *arguments: Any, **options: Any) -> Any:
        self.timed += [name for name in files if name != DENSE]
        return SimpleNamespace(
            variant=lambda name: SimpleNamespace(speedup=self.bias * float(name[:-1])),
            itself=Ratio(1.0, 1 - self.noise, 1 + self.noise),
        )

    def run(self, generation: int = 0) -> None:
        settle.settle(self, self.generations[generation])  # type: ignore[arg-type]


@pytest.mark.parametrize(("bias", "noise"), [(0.8, 0.0), (0.97, 0.03), (1.05, 0.0)])
def test_a_search_gets_the_budget_that_reaches_the_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bias: float, noise: float
) -> None:
    machine = Machine(monkeypatch, tmp_path, (1.5, 3.0), bias)
    machine.noise = noise  # above the tolerance, yet less than twice: a draft only aims
    machine.run()
    for target in (1.5, 3.0):
        aim = machine.corrections[f"{target:g}x"].predicted_target
        assert aim * bias == pytest.approx(1.005 * target)
    before = dict(machine.corrections)
    machine.run()  # settled: nothing is measured again
    assert (machine.corrections, machine.timed) == (before, ["1.5x", "3x"])


def test_drafts_of_all_generations_are_timed_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, (1.5, 2.0, 3.0), bias=0.8, gradual=True)
    machine.run()
    assert machine.timed == ["1.5x", "2x", "3x"]
    assert list(machine.corrections) == ["1.5x"]  # the others have no parent yet
    for generation in (1, 2):
        machine.run(generation)
    assert machine.timed == ["1.5x", "2x", "3x"]
    aims = {name: found.predicted_target for name, found in machine.corrections.items()}
    assert aims == pytest.approx({f"{target:g}x": 1.005 * target / 0.8 for target in (1.5, 2.0, 3.0)})


def test_a_new_target_times_its_own_draft_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for gradual in (False, True):
        Machine(monkeypatch, tmp_path, (1.5, 3.0), bias=0.8, gradual=gradual).run()
        more = Machine(monkeypatch, tmp_path, (1.5, 2.0, 3.0), bias=0.8, gradual=gradual)
        more.run()
        assert more.timed == ["2x"]
        more.recipe.environment = SimpleNamespace(engine="openvino")
        more.corrections.clear()
        more.run()
        assert more.timed == ["2x", "1.5x", "2x", "3x"]
        (tmp_path / "settling.json").unlink()


def test_where_noise_hides_drafts_a_generation_goes_by_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, (1.5, 2.0), bias=0.8, gradual=True)
    machine.noise = 0.05
    machine.run()
    assert machine.corrections == {}
    plan = SimpleNamespace(load=lambda path: SimpleNamespace(predicted_speedup=1.5))
    monkeypatch.setattr(prune, "PruningPlan", plan)
    record = SimpleNamespace(variant=lambda name: SimpleNamespace(speedup=1.5 * 0.8), itself=Ratio(1.0, 0.99, 1.01))
    monkeypatch.setattr(prune, "BenchmarkRecord", SimpleNamespace(load=lambda path: record))
    machine.folder.generation_benchmark = lambda parent: parent
    machine.run(1)
    assert machine.timed == ["1.5x", "2x"]
    assert machine.corrections["2x"].predicted_target == pytest.approx(2.0 / 0.8)


def test_targets_out_of_reach_are_left_to_the_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    far = Machine(monkeypatch, tmp_path, (9.0, 11.0), bias=0.8)
    far.run()
    assert far.timed == ["9x"]
    assert far.corrections == {}  # what the table would have to promise for 9x is out of reach, too
    (tmp_path / "settling.json").unlink()
    none = Machine(monkeypatch, tmp_path, (11.0,), bias=0.8)
    none.run()
    assert none.timed == []


def test_what_was_corrected_before_is_not_settled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, (2.0,), bias=0.8)
    machine.corrections["2x"] = Correction(2.2, corrections=1)
    machine.run()
    assert machine.corrections["2x"] == Correction(2.2, corrections=1)
    assert machine.timed == []


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
