"""Verdicts: was a target reached, is a file worth having, did training help?"""

from __future__ import annotations

from collections.abc import Sequence

from ziplm_deploy.compression.records import outside_budget
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.latency.verdict import Outcome, outcome
from ziplm_deploy.recipe import BenchmarkConfig, RecoverConfig
from ziplm_deploy.reporting.baselines import TRAINED_ON
from ziplm_deploy.reporting.facts import FileFacts
from ziplm_deploy.reporting.records import FileReport, MemberReport
from ziplm_deploy.reporting.table import MISSING, percent_text
from ziplm_deploy.tasks.resampling import Comparison, Decision

AGAIN = "measure again on a quiet machine with ziplm-deploy benchmark RECIPE --again"


def judge(
    measured: Ratio,
    itself: Ratio,
    target: float,
    settings: BenchmarkConfig,
    corrections: int,
    largest: float,
    slowed_by: str = "",
) -> tuple[Outcome, str]:
    """Verdict on a member and, if it is not "reached", the reason.

    ``itself``: the baseline over itself in the same benchmark; ``largest``: the speedup that
    the table predicts with every module at its fastest; ``slowed_by``: what the closed loop could not correct, because
    it happened to the file afterwards.
    """
    noise = too_noisy(itself, settings)
    if noise:
        return "undecided", noise
    found = outcome(measured, target, settings)
    if found == "missed":
        if target > largest:
            return "missed", f"the largest speedup that the latency table allows is {largest:.2f}x"
        closer = _why_not_closer(settings, corrections, "faster", f" (largest predicted: {largest:.2f}x)")
        return "missed", slowed_by or closer
    if found == "faster than asked":
        return found, _why_not_closer(settings, corrections, "slower", "")
    if found == "undecided":
        return found, (
            f"its interval holds the least speedup that counts as reached, {target * (1 - settings.tolerance):.2f}x; "
            f"{AGAIN}, or raise benchmark.max_processes"
        )
    return found, ""


def too_noisy(itself: Ratio, settings: BenchmarkConfig) -> str:
    """Why nothing can be said about timings of a benchmark; empty if its noise is within the tolerance."""
    if itself.floor <= settings.tolerance:
        return ""
    return (
        f"the baseline against itself is up to {itself.floor_text} from 1, more than benchmark.tolerance "
        f"({100 * settings.tolerance:g} %); {AGAIN}"
    )


def _why_not_closer(settings: BenchmarkConfig, corrections: int, wanted: str, detail: str) -> str:
    if settings.max_corrections == 0:
        return f"the recipe allows no corrections (benchmark.max_corrections: 0){detail}"
    if corrections >= settings.max_corrections:
        return f"all {settings.max_corrections} corrections of the closed loop were used{detail}"
    return f"no {wanted} plan fits the corrected budget: the levels are too far apart{detail}"


def was_fast_enough(speedup_in_loop: float | None, target: float, settings: BenchmarkConfig) -> str:
    """Reason of a miss for which the closed loop is not to blame: it found the member fast enough; empty if not."""
    if speedup_in_loop is None or speedup_in_loop < target * (1 - settings.tolerance):
        return ""
    return (
        f"it was fast enough ({speedup_in_loop:.2f}x) when the closed loop measured it, before it was trained or "
        f"compressed; {AGAIN}, or ask for a little more"
    )


def why_not_recommended(
    file: FileFacts,
    served_score: float | None,
    max_loss: float,
    before: Sequence[FileReport],
    noise: str,
    *,
    is_pruned: bool,
) -> str:
    """Reason why a file is not worth having; empty if it is, as the dense model's first file always is.

    ``before``: the member's files that were looked at already; ``max_loss``: accuracy budget of INT8; ``noise``: why
    no timing can be trusted, if none can; ``is_pruned``: the file is to be faster than the dense model's.
    """
    if noise and (before or is_pruned):
        return noise
    slow = is_pruned and file.timing.speedup_low <= 1
    than_dense = [f"not faster than the dense model beyond noise ({file.timing.speedup:.2f}x)"] if slow else []
    budget = _budget_reason(file, served_score, max_loss)
    is_changed = is_pruned or not file.variant.is_exported
    unscored = ["not scored: the recipe has no data.evaluation"] if is_changed and served_score is None else []
    return next(filter(None, [budget, *_not_faster(file, before), *than_dense, *unscored]), "")


def _budget_reason(file: FileFacts, served_score: float | None, max_loss: float) -> str:
    """Why a file does not surely hold its accuracy budget; empty if it does. Scores are asked where no interval is."""
    decision = budget_decision(file, max_loss)
    if decision is None:
        return outside_budget(file.int8, served_score, max_loss)
    kept = _kept(_of_source(file), max_loss)
    return {
        "met": "",
        "missed": f"outside the accuracy budget: {kept}",
        "undecided": f"undecided whether it holds the accuracy budget: {kept}",
    }[decision]


def budget_decision(file: FileFacts, max_loss: float) -> Decision | None:
    """Whether an INT8 file keeps its share of the float32 score; None for other files, or where nothing tells.

    Decided on the examples that its linears in float32 were not chosen by.
    """
    found = _of_source(file)
    return None if file.int8 is None or found is None else found.keeps(100 * (1 - max_loss))


def _of_source(file: FileFacts) -> Comparison | None:
    return None if file.uncertainty is None else file.uncertainty.of_source


def nothing_to_keep(members: Sequence[MemberReport], metric: str) -> list[str]:
    """A note where the dense model scores 0, as one that always answers the same does in F1 and Matthews' coefficient.

    ``members``: the dense model is the first.
    """
    if not members or members[0].served.accuracy.get(metric) != 0:
        return []
    return [
        f"the dense model's {metric} is 0, so that there is nothing for the others to keep: look at its answers and at "
        "the labels; if this run trained it (dense.train), train longer (dense.epochs)"
    ]


def judged_apart(members: Sequence[MemberReport], metric: str) -> list[str]:
    """A note where INT8 files are compared on fewer examples than others, because the rest chose among their forms."""
    counts = {
        (file.variant.is_int8, file.of_dense[metric].n_examples)
        for member in members
        for file in member.files
        if metric in file.of_dense
    }
    most = max((n for _, n in counts), default=0)
    fewer = {n for is_int8, n in counts if is_int8 and n < most}
    return [
        f"INT8 files whose form was taken because of its score stand beside the dense model and the baselines on the "
        f"{n} evaluation examples that did not choose; their scores are of all {most}"
        for n in sorted(fewer)
    ]


def undecided_budget(members: Sequence[MemberReport], max_loss: float) -> list[str]:
    """A note for every INT8 file of which too few examples were evaluated to say whether it holds its budget."""
    return [
        f"{member.name} {file.variant}: whether it holds the accuracy budget is undecided: "
        f"{_kept(file.of_source, max_loss)}; more evaluation examples decide it"
        for member in members
        for file in member.files
        if file.budget == "undecided"
    ]


def _kept(comparison: Comparison | None, max_loss: float) -> str:
    if comparison is None:
        return MISSING
    return (
        f"{percent_text(comparison)} of the float32 score on {comparison.n_examples} examples, where "
        f"{100 * (1 - max_loss):g} % is asked"
    )


def _not_faster(file: FileFacts, before: Sequence[FileReport]) -> list[str]:
    """Reasons why this file is not faster than the files it was made from. Only timings on the same engine are
    compared."""
    return [
        _why_not_faster(file, other)
        for source in file.variant.made_from
        for other in before
        if other.variant is source and other.engine == file.timing.engine
    ]


def _why_not_faster(file: FileFacts, other: FileReport) -> str:
    """Reason why a file is not worth having beside one that is nearer to the dense model; empty if it is faster."""
    timing = file.timing
    if timing.speedup_low > other.measured_high:
        return ""
    how = "slower" if timing.speedup < other.measured_low else "not faster beyond noise"
    return f"{how} than {other.file} on {timing.engine} ({timing.speedup:.2f}x against {other.measured_speedup:.2f}x)"


def taught_more_than_dense(recover: RecoverConfig, *, has_control: bool) -> list[str]:
    """A note where members learn what the dense model beside them did not in as many steps.

    Without labels, and with the dense model as their teacher, they do not: that model trained on so would have no loss
    and no gradient, and would stay as it is.
    """
    if not recover.teaches_more_than_dense:
        return []
    sources = [
        *(["labels (recover.task_weight)"] if recover.task_weight else []),
        *(["another teacher (recover.teacher)"] if recover.teacher is not None else []),
    ]
    fair = (
        f"read them beside {TRAINED_ON}, the dense model trained on as they were"
        if has_control
        else f"for a fair comparison add {TRAINED_ON} to benchmark.baselines"
    )
    return [
        f"members learned from {' and '.join(sources)}, the dense model did not for as many steps: of what they score "
        f"in percent of dense, that share is not pruning's; {fair}"
    ]


def harmed_by_training(members: Sequence[MemberReport], metric: str) -> list[str]:
    """A note for every member whose ``model.onnx`` scored higher, beyond noise, before it was trained."""
    notes = []
    for member in members:
        before, after = (scores.get(metric) for scores in (member.accuracy_before_training, member.exported_accuracy))
        effect = member.training_effect
        if before is not None and after is not None and effect is not None and effect.high < 0:
            notes.append(
                f"{member.name}: training lowered {metric} from {before:.4f} to {after:.4f} "
                f"({effect.difference:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]); try a smaller "
                "recover.learning_rate, or more steps"
            )
    return notes
