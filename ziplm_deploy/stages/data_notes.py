"""What a reader of scores and speedups must know about the data: lengths, overlaps, how labels were read."""

from __future__ import annotations

from typing import Any, Literal

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.models.location import public_name
from ziplm_deploy.run.run import Run
from ziplm_deploy.tasks.batching import length_limit
from ziplm_deploy.tasks.generation import SPAN
from ziplm_deploy.tasks.lengths import TokenLengths

Which = Literal["calibration", "evaluation"]


def leave_data_notes(run: Run) -> None:
    """Count tokens and compare the data sets; once for the same examples."""
    run.folder.set_note("pooling", _pooling_note(run))
    run.folder.set_note("truncated", _truncated_note(run))
    run.folder.set_note("labels", _evaluation_note(run))
    run.folder.set_note("training labels", _training_note(run))
    keys = _keys(run)
    if {name: found.key for name, found in run.folder.lengths.items()} == keys:
        return
    rows = {name: getattr(run.data, f"{name}_rows") for name in keys}
    lengths = {name: counted for name, key in keys.items() if (counted := _lengths(run, rows[name], key)) is not None}
    _note_lengths(run, lengths)
    overlap = _overlap_note(run, rows["evaluation"], rows["calibration"]) if "evaluation" in rows else None
    run.folder.set_note("overlap", overlap)


def note_other_evaluation(run: Run) -> None:
    """What :func:`leave_data_notes` leaves about evaluation data, where these are others than at the last run.

    Calibration and training data may be gone by then; which of their examples stand in others is not known.
    """
    if run.recipe.data.evaluation is None or run.data.awaits_texts or "evaluation" not in run.folder.lengths:
        return
    key = _keys(run)["evaluation"]
    if run.folder.lengths["evaluation"].key == key:
        return
    run.folder.set_note("labels", _evaluation_note(run))
    counted = _lengths(run, run.data.evaluation_rows, key)
    names: tuple[Which, ...] = ("calibration", "evaluation")
    known = {**run.folder.lengths, "evaluation": counted}
    lengths = {name: found for name in names if (found := known.get(name)) is not None}
    _note_lengths(run, lengths)
    run.folder.set_note("overlap", None)


def _note_lengths(run: Run, lengths: dict[Which, TokenLengths]) -> None:
    run.folder.record(lengths=lengths)
    run.folder.set_note("cut texts", _cut_note(run, lengths))
    run.folder.set_note("lengths", _length_note(run, lengths))


def _keys(run: Run) -> dict[Which, str]:
    """What the lengths of each data set, and notes about it, depend on."""
    shapes, data = run.recipe.export.shapes, run.data
    several = {"several": True} if run.recipe.environment.workload.has_several else {}
    keys: dict[Which, str] = {"calibration": content_key(calibration=data.calibration_key, shapes=shapes, **several)}
    if run.recipe.data.evaluation is not None:
        spans = {"spans": SPAN} if run.task.is_causal else {}
        train = {"train": data.train_hash, "columns": data.train_columns} if _trains(run) else {}
        calibration = keys["calibration"]
        keys["evaluation"] = content_key(
            evaluation=data.evaluation_key, calibration=calibration, shapes=shapes, **train, **spans
        )
    return keys


def _trains(run: Run) -> bool:
    return run.trains or run.recipe.dense.train or run.recipe.compress.trains


def _evaluation_note(run: Run) -> str | None:
    """What may surprise about how labels are read that scores compare with."""
    if run.recipe.data.evaluation is None:
        return None
    return run.task.label_note(run.data.raw_evaluation_rows, run.dense.model.config)


def _training_note(run: Run) -> str | None:
    """What may surprise about how labels are read that a loss compares with."""
    if not (_trains(run) and run.learns_classes):
        return None
    reading = run.task.label_reading(run.data.raw_train_rows, run.dense.model.config)
    return None if reading is None or reading.note is None else f"training data: {reading.note}"


def _pooling_note(run: Run) -> str | None:
    """What embeddings were taken to be where nobody says it."""
    model = run.recipe.model
    if run.names_pooling or not model.makes_embeddings:
        return None
    length = "of length 1" if model.normalize else "not normalized"
    what = f"{model.pooling} of all token vectors" if run.task.input_kind == "text" else "vector of the class token"
    return (
        f"neither the recipe nor a file of {public_name(model.path)} names a pooling: embeddings are the "
        f"{what}, {length}; if the model was trained with another one, name it in "
        "model.pooling"
    )


def _truncated_note(run: Run) -> str | None:
    """Note on embeddings of which sentence-transformers keeps the first numbers only."""
    if run.truncated is None:
        return None
    found = "give data.retrieval to score both" if run.recipe.data.retrieval is None else "retrieval is scored of both"
    return (
        f"sentence-transformers cuts embeddings of {public_name(run.recipe.model.path)} to their first {run.truncated} "
        f"numbers (truncate_dim): other scores, and what model.onnx answers, are of whole embeddings; {found}"
    )


def _lengths(run: Run, rows: list[dict[str, Any]], key: str) -> TokenLengths | None:
    """Lengths of the examples; None for images."""
    counts = run.task.token_lengths(rows, run.dense.processor)
    if not counts:
        return None
    limit = length_limit(run.dense.processor, run.data.seq_len)
    return TokenLengths.of(counts, limit, key, are_cut=run.task.cuts_texts)


def _cut_note(run: Run, lengths: dict[Which, TokenLengths]) -> str | None:
    parts = [
        f"{found.cut / found.examples:.1%} of the {name} texts ({found.cut:,} of {found.examples:,}, the longest "
        f"{found.longest:,} tokens)"
        for name, found in lengths.items()
        if found.cut
    ]
    if not parts:
        return None
    limit = next(iter(lengths.values())).limit
    workload = run.recipe.environment.workload
    larger = (
        "a larger environment.workload.seq_len" if workload.lengths is None else "longer environment.workload.lengths"
    )
    return (
        f"{' and '.join(parts)} are longer than {limit} tokens and were cut: scores, dense ones too, are those of cut "
        f"texts; with {larger} they stay whole, where the model has positions for them"
    )


def _length_note(run: Run, lengths: dict[Which, TokenLengths]) -> str | None:
    name: Which = "evaluation" if "evaluation" in lengths else "calibration"
    found = lengths.get(name)
    is_filled_up = run.recipe.model.pooling == "pooler"  # to a length that nobody may choose
    if found is None or not found.are_short or is_filled_up or run.recipe.environment.workload.has_several:
        return None
    if run.recipe.export.shapes == "static":
        meaning = "files with static shapes fill every request up to that, so that a smaller seq_len serves them faster"
    else:
        meaning = "requests as short as these take another time and may gain less"
    return (
        f"half of the {name} texts have no more than {found.median} tokens, 90 % no more than {found.p90}, and "
        f"speedups are those of requests with {run.recipe.environment.workload.seq_len}: {meaning}"
    )


def _overlap_note(run: Run, evaluation: list[dict[str, Any]], calibration: list[dict[str, Any]]) -> str | None:
    """Which other data hold examples of the evaluation, and how many."""
    others = {"calibration": calibration}
    if _trains(run):
        others["training"] = run.data.train_rows if run.task.is_causal else run.data.raw_train_rows
    parts = []
    for name, rows in others.items():
        shared, among = run.task.shared(evaluation, rows)
        if shared:
            parts.append(f"{shared:,} of {among:,} evaluation examples stand in the {name} data, too")
    if not parts:
        return None
    return f"{'; '.join(parts)}: scores on examples that were seen before promise too much for others"
