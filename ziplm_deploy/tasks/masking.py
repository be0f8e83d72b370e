"""Masked language modelling, judged by how often the hidden token is found."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks.base import Task, Which
from ziplm_deploy.tasks.batching import (
    Batch,
    Example,
    as_float32,
    tokenize,
    training_examples,
    unpadded,
)
from ziplm_deploy.tasks.data import Row, cell
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.losses import IGNORED
from ziplm_deploy.tasks.metrics import Metric, ratio_of_sums
from ziplm_deploy.tasks.outcomes import Outcomes

MASKED_FRACTION = 0.15  # as in pre-training of BERT
FEATURES_PER_ROW = 8  # masked positions compared a sequence: vocabulary-wide logits are large


class FillMask(Task):
    """Rows: ``{"text"}``. A text is always masked at the same places (seeded by its token ids)."""

    name = "fill-mask"
    metric_name = "masked_accuracy"
    metrics: Mapping[str, Metric] = {
        "masked_accuracy": ratio_of_sums("right", "masked"),
        "masked_log_likelihood": ratio_of_sums("log_likelihood", "masked"),
    }
    unscaled_metrics = frozenset({"masked_log_likelihood"})
    auto_class = "AutoModelForMaskedLM"
    ort_class = "ORTModelForMaskedLM"
    output_names = ("logits",)
    text_columns = (("text",), ("sentence",))
    token_outputs = frozenset({"logits"})

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._mask_id: int | None = None  # of the tokenizer last encoded with; tells features() where to look

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        columns = self.columns(raw, data)
        if len(columns) != 1:
            raise DataError(f"expected one text column, found data.text_columns {columns}; name one")
        texts = [cell(row, columns[0], str, number, "text") for number, row in enumerate(raw, 1)]
        rows: list[Row] = [{"text": text} for text in texts if text.strip()]
        if not rows:
            raise DataError(f"expected text in column {columns[0]!r}, found only blank rows; give another column")
        return rows

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        return {}  # the head spans the vocabulary; the text is its own label

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        """Inputs with 15 % of the tokens replaced by the mask token, as the model is used."""
        masked, _ = self._mask(data.tokenize(), data.processor)
        return data.tensors(masked, sort=sort)

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """Inputs masked as :meth:`encode` masks them; ``labels`` [1, length]: the hidden tokens, -100 elsewhere."""
        return training_examples(*self._mask(tokenize(processor, rows, max_length), processor))

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        """Tokens ``masked`` in each text, those found ``right``, and the ``log_likelihood`` of all of them."""
        masked, targets = self._mask(data.tokenize(), data.processor)
        masked_tokens, right = (np.zeros(len(masked), np.int64) for _ in range(2))
        log_likelihood = np.zeros(len(masked))
        for indices, inputs in data.batches(masked):
            logits = function(inputs)["logits"]
            for position, index in enumerate(indices):
                target = np.array(targets[index])
                hidden = np.flatnonzero(target != IGNORED)
                if not len(hidden):
                    continue
                tokens = unpadded(len(target), logits.shape[1], data.processor)
                wanted = torch.from_numpy(target[hidden])
                chosen = torch.from_numpy(as_float32(logits[position, tokens][hidden]))  # [hidden, vocab]
                scores = chosen.log_softmax(-1)
                masked_tokens[index], right[index] = len(wanted), int((scores.argmax(-1) == wanted).sum())
                log_likelihood[index] = float(scores.gather(1, wanted[:, None]).sum())
        if not masked_tokens.any():
            raise DataError(
                "expected texts with tokens to mask, found none; give longer ones or raise environment.workload.seq_len"
            )
        return Outcomes({"masked": masked_tokens, "right": right, "log_likelihood": log_likelihood})

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        """Texts with one token masked, of the mean likelihood both."""
        likelihood = outcomes["log_likelihood"].sum() / outcomes["masked"].sum()
        one = np.array([1, 1])
        return Outcomes({"masked": one, "right": np.array([1, 0]), "log_likelihood": np.full(2, likelihood)})

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Logits [positions, vocabulary] at the first masked positions of each sequence."""
        masked = batch["input_ids"].eq(self._require_mask_id())  # [batch, length]
        chosen = masked & (masked.cumsum(1) <= FEATURES_PER_ROW)
        return outputs["logits"][chosen]

    def _require_mask_id(self) -> int:
        if self._mask_id is None:
            raise RuntimeError(
                "FillMask.features needs batches that this object's encode() or examples() made; call one first"
            )
        return self._mask_id

    def _mask(self, examples: list[Example], processor: Any) -> tuple[list[Example], list[list[int]]]:
        """Examples with masked ids, and the hidden ids (-100 elsewhere), both [examples][length]."""
        if processor.mask_token_id is None:
            raise DataError(
                f"expected a tokenizer with a mask token for fill-mask, found {type(processor).__name__} without; use "
                "the tokenizer that the model was pre-trained with"
            )
        self._mask_id = int(processor.mask_token_id)
        special = set(processor.all_special_ids)
        masked: list[Example] = []
        targets: list[list[int]] = []
        for example in examples:
            ids = example["input_ids"]
            candidates = [position for position, token in enumerate(ids) if token not in special]
            count = min(len(candidates), max(1, round(MASKED_FRACTION * len(candidates))))
            hidden = set(random.Random(str(ids)).sample(candidates, count))
            masked.append({**example, "input_ids": [self._mask_id if p in hidden else t for p, t in enumerate(ids)]})
            targets.append([token if position in hidden else IGNORED for position, token in enumerate(ids)])
        return masked, targets
