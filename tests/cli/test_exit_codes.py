"""Exit codes of judged targets: reached, missed, undecided."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import invoke, replace, write_recipe
from tests.helpers.reports import benchmark_record, family_report, member


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (("reached", "faster than asked"), 0),
        (("reached", "undecided"), 4),
        (("undecided", "missed"), 3),
    ],
)
@pytest.mark.parametrize("command", ["run", "report"])
def test_an_undecided_target_is_exit_4_and_a_missed_one_goes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, verdicts: tuple[str, ...], code: int
) -> None:
    members = [member(f"{number}x", verdict=verdict) for number, verdict in enumerate(verdicts, 2)]
    replace(monkeypatch, "run_recipe" if command == "run" else "report", family_report(member("dense"), *members))
    result = invoke(command, write_recipe(tmp_path))
    assert result.exit_code == code, result.stderr
    assert ("undecided: " in result.stderr) == ("undecided" in verdicts)


@pytest.mark.parametrize(
    ("speedup", "floor", "code"), [(2.0, 0.0, 0), (2.0, 0.3, 4), (1.7, 0.0, 3), (1.7, 0.3, 4), (1.96, 0.0, 4)]
)
def test_a_benchmark_judges_the_targets_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedup: float, floor: float, code: int
) -> None:
    record = benchmark_record(**{"2x": speedup})
    record.variant("2x").__dict__.update(speedup_low=speedup - 0.01, speedup_high=speedup + 0.01)
    record.__dict__.update(aa_low=1 - floor, aa_high=1 + floor)
    replace(monkeypatch, "benchmark", record)
    result = invoke("benchmark", write_recipe(tmp_path))
    assert result.exit_code == code, result.stderr
