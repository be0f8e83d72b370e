"""What compression leaves beside its models, and the same in a few words for the report."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.compression.int8.judged import holds_budget
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.documents import score_text
from ziplm_deploy.recovery.record import TrainingRecord

_BECAME = {"float32": "stayed float32", "weight-only 8-bit form": "became weight-only 8-bit"}


class LinearSensitivity(BaseModel):
    """A linear, and what changes if it alone computes in INT8, or has 4-bit weights where the recipe says so."""

    name: str
    divergence: float  # of the model's answers from those before INT8
    activation_outliers: float  # largest magnitude over the one that 99.9 % of the inputs do not pass
    weight_outliers: float
    # divergence in each form, where the recipe asks for a mixture
    by_form: dict[str, float] = Field(default_factory=dict, exclude_if=lambda found: not found)
    gptq: bool = Field(False, exclude_if=lambda found: not found)  # rounds its 4-bit weights better than to the nearest


class LinearMixture(BaseModel):
    """Milliseconds of a request that all linears take together, as they were timed by themselves."""

    ms: float  # of the forms that were chosen
    int8_ms: float
    float32_ms: float


class LinearRanking(Artifact):
    """Linears of a float32 model, those first that INT8 hurts most."""

    KIND: ClassVar[str] = "linear_ranking"

    linears: list[LinearSensitivity]
    # by kind of place, how strongly inputs are made alike before: of the linears above, too
    smoothing: dict[str, float] = Field(default_factory=dict, exclude_if=lambda found: not found)


class Int8Record(Artifact):
    """How an INT8 file was made, and whether it holds its accuracy budget.

    ``scores`` and ``reference_score`` are of the half of the evaluation examples that candidates are compared on; no
    choice looks at the other half, so that what a file scores there is not too good.
    """

    KIND: ClassVar[str] = "int8_record"

    method: str
    backend: str
    ranges: str
    per_channel: bool
    weight_bits: int
    embeddings: bool = False  # word embeddings in 8 bits, too; files from before: float32
    n_linears: int
    fp32_linears: list[str]  # stayed float32 to hold the budget
    # Bits a weight: 8 to hold the budget, 4 because the recipe asks; or both as a mixture has them.
    weight_only: dict[str, int] = Field(default_factory=dict)
    reference_score: float | None  # of the file before INT8; None: no evaluation data, so no budget
    scores: list[float]  # of the candidates, in the order in which they were tried
    within_budget: bool | None  # by the examples that chose
    n_choosing: int | None = None  # evaluation examples that chose; None: all of them, in files from before
    whole_score: float | None = None  # on all evaluation examples, by the engine that judged
    whole_reference_score: float | None = None  # of the file before INT8, on all of them
    sensitivities: list[LinearSensitivity]  # the most sensitive first
    ruined_by_outliers: list[str]
    training: TrainingRecord | None = None
    smoothing: dict[str, float] = Field(default_factory=dict, exclude_if=lambda found: not found)
    # where forms were chosen by milliseconds
    mixture: LinearMixture | None = Field(None, exclude_if=lambda mixture: mixture is None)


def outside_budget(record: Int8Record | None, served_score: float | None = None, max_loss: float = 0.0) -> str:
    """Figures of a file that loses more accuracy than its budget allows; empty if it does not.

    ``served_score``: on the engine that serves, which may not be the one that candidates were judged on; ``max_loss``
    is relative to the score before INT8.
    """
    if record is None or record.reference_score is None:
        return ""
    if record.within_budget is False:
        best = score_text(max(record.scores))
        return f"outside the accuracy budget ({best} against {score_text(record.reference_score)})"
    reference = record.reference_score if record.whole_reference_score is None else record.whole_reference_score
    if served_score is None or served_score == record.whole_score:  # what was judged is what serves
        return ""
    if not holds_budget(served_score, reference, max_loss):
        found = f"{score_text(served_score)} against {score_text(reference)}"
        return f"outside the accuracy budget on the engine that serves ({found})"
    return ""


def spared_from_int8(record: Int8Record | None) -> str:
    """Why a file is slower than INT8 throughout; empty if no linear was spared to hold the budget."""
    spared = {} if record is None else _spared(record)
    if record is None or not spared:
        return ""
    counts = " and ".join(
        f"{len(names)} of {record.n_linears} linears {_BECAME[form]}" for form, names in spared.items()
    )
    return f"{counts} to hold the accuracy budget; raise compress.int8.max_loss or lower max_fp32_share"


def _spared(record: Int8Record) -> dict[str, list[str]]:
    """Linears that are not INT8 so that the budget holds, by their form; those of a mixture are what pays."""
    return {} if record.mixture else _other_forms(record)


def _other_forms(record: Int8Record) -> dict[str, list[str]]:
    """Linears that are neither INT8 nor 4-bit because the recipe asks, by their form."""
    eight = [name for name, bits in record.weight_only.items() if bits == 8]
    forms = {"float32": record.fp32_linears, "weight-only 8-bit form": eight}
    return {form: names for form, names in forms.items() if names}


def int8_note(title: str, record: Int8Record, max_loss: float, *, may_train: bool = True) -> str:
    """What to know about an INT8 file, with the names of the linears it is about; empty if nothing.

    ``may_train``: whether training with integers (``qat``) is made for such models, and may be advised.
    """
    others = {*record.fp32_linears, *record.weight_only} if record.mixture else set()
    ruined = [name for name in record.ruined_by_outliers if name not in others]
    outliers = f"outliers ruin {', '.join(ruined)}" if ruined else ""
    spared = _spared(record)
    kept = "; ".join(
        f"{_BECAME[form]} to hold the accuracy budget: {', '.join(names)}" for form, names in spared.items()
    )
    if record.within_budget is False and record.reference_score is not None:
        why = outliers or f"most sensitive are {', '.join(row.name for row in record.sensitivities[:3])}"
        ways = ["int8.method qat"] * may_train + ["int8.embeddings: false"] * bool(record.embeddings)
        return (
            f"{title}: {score_text(max(record.scores))}{_on_choosing(record)} is outside the accuracy budget (max_loss "
            f"{max_loss:g} of {score_text(record.reference_score)}), the best of {len(record.scores)} tried, with "
            f"{_counted(record)}; {why}; try {', '.join([*ways, 'a larger max_fp32_share'])}"
        )
    if kept:
        return f"{title}: {kept}"
    if outliers and record.within_budget is None:
        training = ", or try int8.method qat" if may_train else ""
        return f"{title}: {outliers}, and nothing judged its accuracy; give data.evaluation{training}"
    return ""


def _on_choosing(record: Int8Record) -> str:
    return "" if record.n_choosing is None else f" on the {record.n_choosing} examples that chose"


def _counted(record: Int8Record) -> str:
    forms = _other_forms(record)
    if record.mixture is not None:
        four = [name for name, bits in record.weight_only.items() if bits == 4]
        forms |= {"weight-only 4-bit form": four} if four else {}
    counts = [
        f"{len(names)} of {record.n_linears} linears in {form}: {', '.join(names)}" for form, names in forms.items()
    ]
    return " and ".join(counts) or f"0 of {record.n_linears} linears in float32"


def facts_of(sparsity: SparsityRecord | None, int8: Int8Record | None) -> dict[str, str]:
    """How a member's file was made, in words for a table cell; None: it is not sparse, or not INT8."""
    facts: dict[str, str] = {}
    if sparsity is not None:
        facts["zeros"] = f"{sparsity.sparsity:.1%} ({sparsity.pattern})"
    if int8 is not None:
        by = "" if int8.backend == "onnxruntime" else f" by {int8.backend}"
        embeddings = ", 8-bit embeddings" if int8.embeddings else ""
        facts["INT8"] = f"{int8.method}{by}, {int8.weight_bits}-bit weights{embeddings}"
        if int8.fp32_linears:
            facts["float32"] = f"{len(int8.fp32_linears)} of {int8.n_linears} linears"
        for bits in sorted(set(int8.weight_only.values()), reverse=True):
            count = list(int8.weight_only.values()).count(bits)
            facts[f"weight-only {bits}-bit"] = f"{count} of {int8.n_linears} linears"
        if int8.smoothing:
            facts["smoothed inputs"] = ", ".join(f"{kind} {strength:g}" for kind, strength in int8.smoothing.items())
        if int8.mixture is not None:
            ms = int8.mixture
            facts["forms by ms"] = f"linears {ms.ms:.1f} ms; INT8 {ms.int8_ms:.1f}, float32 {ms.float32_ms:.1f}"
        if int8.n_choosing is not None:
            looks = f"{len(int8.scores)} look{'s' if len(int8.scores) > 1 else ''}"
            facts["chosen by"] = f"{looks} at {int8.n_choosing} examples"
        if int8.within_budget is False:
            facts["budget"] = f"not held{_on_choosing(int8)}"
    return facts
