"""The closed loop against a simulated machine whose speed differs from the table's promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ziplm_deploy.errors import EngineError, TargetUnreachableError
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.recipe import BenchmarkConfig, Variant, member_name
from ziplm_deploy.run.manifest import Correction
from ziplm_deploy.run.member import DENSE, Member, PrunedMember
from ziplm_deploy.run.run import Generation
from ziplm_deploy.stages import closed_loop, prune


def member_of(target: float) -> PrunedMember:
    return PrunedMember(member_name(target), Path("run"), trained=False, target=target)


def record_of(measured: Callable[[str], float], half_width: float = 0.005, noise: float = 0.005) -> SimpleNamespace:
    """A benchmark with intervals of that half width, as a fraction, around what is measured of each member."""

    def variant(name: str) -> SimpleNamespace:
        value = measured(name)
        return SimpleNamespace(speedup=value, ratio=Ratio(value, value * (1 - half_width), value * (1 + half_width)))

    return SimpleNamespace(variant=variant, itself=Ratio(1.0, 1 - noise, 1 + noise))


class Machine:
    """Members are plans with any predicted speedup; the measured one is ``bias`` times it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, targets: tuple[float, ...], bias: float, limit: float = 100.0):
        self.bias, self.limit, self.trains = bias, limit, False
        self.dense_member = Member(DENSE, Path("run"), trained=False)
        self.pruned_members = tuple(map(member_of, targets))
        self.generations = [Generation(self.dense_member, self.pruned_members)]
        self.predicted = {member.name: member.target for member in self.pruned_members}
        self.corrections: dict[str, Correction] = {}
        self.notes: dict[str, str | None] = {}
        self.measurements, self.was_measured_again = 0, False
        self.recipe = SimpleNamespace(
            benchmark=BenchmarkConfig(),
            target=Variant.FP32,
            environment=SimpleNamespace(engine="deepsparse"),
        )
        self.progress = SimpleNamespace(note=lambda text: None)
        self.folder = SimpleNamespace(
            correction=lambda name, key: self.corrections.get(name),
            set_correction=lambda name, key, correction: self.corrections.__setitem__(name, correction),
            unmake=lambda stage: None,
            set_note=lambda topic, text, member: self.notes.__setitem__(f"{topic} of {member}", text),
            generation_benchmark=lambda parent: parent,
        )
        planner = SimpleNamespace(changes=self._changes, budget_ms=lambda aim: self._changes(None, aim))
        self.parent_of = lambda member: SimpleNamespace(planner=planner)
        load = SimpleNamespace(load=lambda path: SimpleNamespace(predicted_speedup=self.predicted[path.stem], sizes={}))
        for stage in (closed_loop, prune):
            monkeypatch.setattr(stage, "member_key", lambda run, member: "key")
            monkeypatch.setattr(stage, "PruningPlan", load)
        monkeypatch.setattr(closed_loop, "prune_member", self._prune)
        monkeypatch.setattr(closed_loop, "export_pruned", lambda run, member: None)
        monkeypatch.setattr(closed_loop, "is_measured_again", lambda run: self.was_measured_again)
        monkeypatch.setattr(closed_loop, "measure_again", lambda run: "measured again")
        monkeypatch.setattr(closed_loop, "measure_generation", lambda run, generation: self.measure())
        monkeypatch.setattr(closed_loop, "refused_members", lambda run, generation: self.refused(generation.members))

    def refused(self, members: tuple[PrunedMember, ...]) -> dict[PrunedMember, str]:
        return {}

    def _changes(self, plan: Any, predicted_target: float) -> bool:
        if predicted_target > self.limit:
            raise TargetUnreachableError("expected less", self.limit)
        return True

    def _prune(self, run: Any, member: PrunedMember) -> None:
        self.predicted[member.name] = self.corrections[member.name].predicted_target

    def measure(self) -> Any:
        self.measurements += 1
        return record_of(lambda name: self.bias * self.predicted[name])

    def run(self) -> Any:
        return closed_loop.reach_targets(self, self.generations[0])  # type: ignore[arg-type]


def test_members_inside_the_tolerance_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (1.5, 2.0), bias=0.99)
    machine.run()
    assert (machine.measurements, machine.corrections) == (1, {})


def test_half_of_the_tolerance_is_kept_for_the_final_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0,), bias=0.986)
    assert machine.run().variant("2x").speedup >= 0.99 * 2.0
    assert machine.measurements == 2


@pytest.mark.parametrize(("half_width", "noise"), [(0.05, 0.005), (0.005, 0.3)])
def test_a_measurement_that_leaves_it_open_corrects_nothing(
    monkeypatch: pytest.MonkeyPatch, half_width: float, noise: float
) -> None:
    machine = Machine(monkeypatch, (2.0,), bias=0.97 if half_width > 0.01 else 0.5)
    record = record_of(lambda name: machine.bias * machine.predicted[name], half_width, noise)
    machine.measure = lambda: record  # type: ignore[method-assign]
    machine.run()
    assert machine.corrections == {}


@pytest.mark.parametrize("bias", [0.7, 0.9, 1.2, 1.6])
def test_a_biased_table_is_corrected_until_the_target_is_measured(monkeypatch: pytest.MonkeyPatch, bias: float) -> None:
    machine = Machine(monkeypatch, (1.5, 2.0, 4.0), bias=bias)
    record = machine.run()
    for target in (1.5, 2.0, 4.0):
        assert 0.98 * target <= record.variant(f"{target:g}x").speedup <= 1.1 * target
    assert machine.measurements == 2


def test_a_target_beyond_reach_is_given_up_and_the_others_are_still_served(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0, 8.0), bias=0.8, limit=9.0)
    record = machine.run()
    assert record.variant("2x").speedup >= 1.96
    assert "8x" not in machine.corrections


def test_corrections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0,), bias=0.5)
    monkeypatch.setattr(closed_loop, "prune_member", lambda run, member: None)  # nothing ever helps
    machine.run()
    assert machine.corrections["2x"].corrections == machine.recipe.benchmark.max_corrections


def test_a_member_that_was_fast_enough_is_not_given_up_for_a_missed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0,), bias=1.0)
    machine.predicted["2x"] = 3.0
    # aims below 2.6 fall off a cliff: the loop's own proportional corrections always miss
    record = record_of(lambda name: 3.0 if machine.predicted[name] >= 2.6 else 1.5)
    machine.measure = lambda: record  # type: ignore[method-assign]
    machine.corrections["2x"] = Correction(3.0)
    assert machine.run().variant("2x").speedup == 3.0


@pytest.mark.parametrize(("bias", "aim"), [(0.9, 4.0 / 0.9), (1.0, None), (1.3, None)])
def test_a_gradual_step_starts_from_what_the_one_before_has_shown(
    monkeypatch: pytest.MonkeyPatch, bias: float, aim: float | None
) -> None:
    machine = Machine(monkeypatch, (2.0, 4.0), bias=bias)
    two, four = machine.pruned_members
    machine.generations = [Generation(machine.dense_member, (two,)), Generation(two, (four,))]
    measured = record_of(lambda name: bias * machine.predicted[name])
    monkeypatch.setattr(prune, "BenchmarkRecord", SimpleNamespace(load=lambda path: measured))
    prune.start_from_last_bias(machine, machine.generations[0])  # type: ignore[arg-type]
    assert machine.corrections == {}
    prune.start_from_last_bias(machine, machine.generations[1])  # type: ignore[arg-type]
    found = machine.corrections.get("4x")
    assert (found and found.predicted_target) == (aim and pytest.approx(aim))
    if found:
        assert found.corrections == 0  # all corrections are still to be had
        machine.corrections["4x"] = Correction(4.9, 2)
        prune.start_from_last_bias(machine, machine.generations[1])  # type: ignore[arg-type]
        assert machine.corrections["4x"].predicted_target == 4.9
        machine.corrections.clear()
        machine.limit = 4.2  # the larger aim is out of reach, the target itself is not
        prune.start_from_last_bias(machine, machine.generations[1])  # type: ignore[arg-type]
        assert machine.corrections == {}


def test_noise_says_nothing_to_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (2.0, 4.0), bias=0.9)
    two, four = machine.pruned_members
    machine.generations = [Generation(machine.dense_member, (two,)), Generation(two, (four,))]
    noisy = record_of(lambda name: 0.9 * machine.predicted[name], noise=0.3)
    monkeypatch.setattr(prune, "BenchmarkRecord", SimpleNamespace(load=lambda path: noisy))
    prune.start_from_last_bias(machine, machine.generations[1])  # type: ignore[arg-type]
    assert machine.corrections == {}
    slowed = SlowedMachine(monkeypatch, slowdown=1.25)
    slowed.run()
    final = record_of(lambda name: slowed.predicted[name.removesuffix(" int8")] / 1.25, noise=0.3)
    assert not closed_loop.compensate_float32(slowed, final)  # type: ignore[arg-type]
    assert closed_loop.compensate_float32(slowed, slowed.final())  # type: ignore[arg-type]


class AbortingMachine(Machine):
    """Its engine cannot run members predicted within ``bad``; a budget for less than ``coarse`` gives that plan."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        bad: tuple[float, float],
        *,
        bias: float = 1.0,
        limit: float = 100.0,
        coarse: float = 0.0,
    ):
        super().__init__(monkeypatch, (1.5, 2.0), bias=bias, limit=limit)
        self.bad, self.coarse = bad, coarse

    def refused(self, members: tuple[PrunedMember, ...]) -> dict[PrunedMember, str]:
        return {
            member: "the process died"
            for member in members
            if self.bad[0] <= self.predicted[member.name] <= self.bad[1]
        }

    def _prune(self, run: Any, member: PrunedMember) -> None:
        super()._prune(run, member)
        if member.target == 2.0:
            self.predicted["2x"] = max(self.predicted["2x"], self.coarse)


@pytest.mark.parametrize("upper", [2.0, 2.05])
def test_a_member_that_the_engine_cannot_run_gives_way_to_a_slightly_faster_one(
    monkeypatch: pytest.MonkeyPatch, upper: float
) -> None:
    machine = AbortingMachine(monkeypatch, (1.9, upper))
    assert upper < machine.run().variant("2x").speedup <= upper * closed_loop.ABOVE_REFUSED
    assert machine.corrections.keys() == {"2x"}
    assert machine.corrections["2x"].corrections == 0  # all corrections are still to be had
    assert machine.measurements == 1
    assert machine.notes["sidesteps of 1.5x"] is None
    assert "deepsparse could not run" in str(machine.notes["sidesteps of 2x"])


def test_the_next_plan_is_above_what_the_refused_one_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = AbortingMachine(monkeypatch, (1.9, 2.15), coarse=2.15)
    machine.predicted["2x"] = 2.15  # 7 % above its target: steps from the target would find the same plan
    machine.recipe.benchmark = BenchmarkConfig(overshoot=0.2)
    assert machine.run().variant("2x").speedup == pytest.approx(2.15 * closed_loop.ABOVE_REFUSED)
    assert machine.corrections["2x"].refused_plans == 1


def test_a_correction_does_not_go_back_to_a_plan_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = AbortingMachine(monkeypatch, (1.9, 2.0), bias=1.3)  # measured 2.6x and more: too fast, but the least
    record = machine.run()
    assert record.variant("2x").speedup == pytest.approx(1.3 * 2.0 * closed_loop.ABOVE_REFUSED)
    assert machine.corrections["2x"].refused_plans == 1


@pytest.mark.parametrize(("upper", "limit"), [(50.0, 100.0), (2.0, 2.01)])
def test_sidesteps_are_bounded(monkeypatch: pytest.MonkeyPatch, upper: float, limit: float) -> None:
    machine = AbortingMachine(monkeypatch, (1.9, upper), limit=limit)
    forgotten: list[str] = []
    machine.folder.unmake = forgotten.append
    with pytest.raises(EngineError, match=r"the process died\n2x: this was the last"):
        machine.run()
    assert machine.predicted["2x"] <= 2.0 * closed_loop.ABOVE_REFUSED**closed_loop.MAX_REFUSED_PLANS * 1.0001
    assert forgotten == ["try pruned files of dense"]  # another attempt tries them again


class SlowedMachine(Machine):
    """INT8 files in which linears stay in float32, and which are ``slowdown`` times slower for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slowdown: float, kept: str = "3 of 12", limit: float = 100.0):
        super().__init__(monkeypatch, (2.0, 4.0), bias=1.0, limit=limit)
        self.slowdown = slowdown
        self.recipe.target = Variant.INT8
        monkeypatch.setattr(closed_loop, "BenchmarkRecord", SimpleNamespace(load=lambda path: self.measure()))
        monkeypatch.setattr(closed_loop, "int8_record", lambda file: file.member.name)
        monkeypatch.setattr(closed_loop, "spared_from_int8", lambda name: kept if name == "4x" else "")

    def final(self) -> Any:
        def measured(name: str) -> float:
            plain = name.removesuffix(" int8")
            return self.predicted[plain] / (self.slowdown if plain == "4x" else 1.0)

        return record_of(measured)

    def finish(self) -> int:
        """As the pipeline does it; how often there was room to be made."""
        self.run()
        rooms = 0
        while closed_loop.compensate_float32(self, self.final()):  # type: ignore[arg-type]
            rooms += 1
            for member in self.pruned_members:
                if member.name in self.corrections:
                    self._prune(self, member)
            self.run()
        return rooms


def test_linears_that_stay_in_float32_are_made_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowedMachine(monkeypatch, slowdown=1.3)
    assert machine.finish() == 1
    assert 4.0 <= machine.final().variant("4x int8").speedup <= 4.1
    assert machine.predicted["2x"] == 2.0
    assert machine.corrections["4x"].float32_slowdown == pytest.approx(1.3)
    ended = machine.final()
    assert closed_loop.reported(machine, ended) == "measured again"  # type: ignore[arg-type,comparison-overlap]
    machine.was_measured_again, machine.slowdown = True, 2.0  # what is reported is not selected, whatever it says
    assert closed_loop.reported(machine, ended) is ended  # type: ignore[arg-type]
    assert not closed_loop.compensate_float32(machine, machine.final())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slowdown", "kept", "limit"), [(1.01, "3 of 12", 100.0), (1.3, "", 100.0), (1.3, "3 of 12", 5.0)]
)
def test_no_room_is_made_without_need_or_hope(
    monkeypatch: pytest.MonkeyPatch, slowdown: float, kept: str, limit: float
) -> None:
    machine = SlowedMachine(monkeypatch, slowdown, kept, limit)
    assert machine.finish() == 0
    assert machine.corrections == {}
    final = machine.final()
    assert closed_loop.reported(machine, final) is final  # type: ignore[arg-type]


def test_room_is_made_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowedMachine(monkeypatch, slowdown=1.3)
    final = record_of(lambda name: 1.8)  # whatever is tried
    machine.final = lambda: final  # type: ignore[method-assign]
    assert machine.finish() == closed_loop.MAX_FLOAT32_RESTARTS


def test_a_file_that_is_faster_than_its_stand_in_does_not_loosen_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowedMachine(monkeypatch, slowdown=0.99)
    machine.predicted["4x"] = 3.8  # given up there, and still too slow in the end
    assert closed_loop.compensate_float32(machine, machine.final())  # type: ignore[arg-type]
    assert machine.corrections["4x"].float32_slowdown == 1.0
    assert machine.corrections["4x"].predicted_target > 4.0


def test_trained_members_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowedMachine(monkeypatch, slowdown=1.3)
    machine.trains = True
    assert machine.finish() == 0
