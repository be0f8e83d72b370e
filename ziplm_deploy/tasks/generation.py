"""Causal language modelling, judged by perplexity: examples are windows of a stream of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks.base import Task, Which
from ziplm_deploy.tasks.batching import Batch, Example, as_float32, encode, training_examples, unpadded
from ziplm_deploy.tasks.data import Row, cell, read_text, sample_rows
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.losses import IGNORED, cross_entropy
from ziplm_deploy.tasks.metrics import Floats, Metric, ratio_of_sums
from ziplm_deploy.tasks.outcomes import Outcomes

CONTEXT = 512  # tokens of a window, where the model takes as many
SPAN = 32  # tokens in a row by which text is known again, wherever windows begin
MIN_WINDOW = 2  # tokens: the second is the first that anything predicts
FEATURES_PER_ROW = 16  # positions compared a window: vocabulary-wide logits are large

_Prediction = tuple[int, Tensor, Tensor]  # a window's index, logits [scored, vocabulary], tokens [scored] that followed


def inverse_perplexity(outcomes: Outcomes, counts: Floats) -> Floats:
    """Geometric mean of the probability of a token, 1 / perplexity, so that more is better and 1 is best."""
    means = ratio_of_sums("log_likelihood", "scored")(outcomes, counts)
    return np.asarray(np.exp(means), dtype=np.float64)


class TextGeneration(Task):
    """Rows as loaded: ``{"text"}``, one a document; settled: ``{"input_ids", "scored_from"}``, one a window.

    Documents may also be ``{"messages"}``, conversations, or ``{"ids"}``, tokens that a model has written.

    Windows are cut from all documents one after the other, each after the first behind an end-of-text token, without
    start tokens. A plain text file is one document, every line break included. Tokens before position ``scored_from``
    of a window were scored in the window before.
    """

    name = "text-generation"
    metric_name = "inverse_perplexity"
    metrics: Mapping[str, Metric] = {
        "inverse_perplexity": inverse_perplexity,
        "next_token_accuracy": ratio_of_sums("right", "scored"),
    }
    auto_class = "AutoModelForCausalLM"
    ort_class = "ORTModelForCausalLM"
    output_names = ("logits",)
    is_causal = True
    cuts_texts = False
    text_columns = (("text",), ("content",), ("messages",))
    token_outputs = frozenset({"logits"})

    def load_rows(self, data: DataConfig, which: Which, seed: int) -> list[Row]:
        """Documents in their order, all of them: how many windows are drawn decides :meth:`settle_rows`."""
        source, _ = self.source(data, which)
        text = None if source is None else read_text(source)
        if text is None:
            return self.sample(self.all_rows(data, which), which, None, seed)
        if not text.strip():
            raise DataError(f"expected text in {source}, found only blanks; give a file with some")
        return [{"text": text}]

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        columns = self.columns(raw, data)
        if len(columns) != 1:
            raise DataError(f"expected one text column, found data.text_columns {columns}; name one")
        name, kind = columns[0], list if columns[0] == "messages" else str
        documents = [cell(row, name, kind, number, "text") for number, row in enumerate(raw, 1)]
        key = "messages" if kind is list else "text"
        rows: list[Row] = [{key: each} for each in documents if each and (kind is list or each.strip())]
        if not rows:
            raise DataError(f"expected text in column {name!r}, found only blank rows; give another column")
        return rows

    def settle_rows(self, rows: list[Row], data: DataConfig, which: Which, seed: int, processor: Any) -> list[Row]:
        context = window_tokens(data, processor)
        stride = min(data.stride or context, context) if which == "evaluation" else context
        windows = _windows(_stream(rows, processor), context, stride)
        count = data.n_examples(which, len(windows))
        drawn = sample_rows(windows, count, seed, field=f"n_{which}", shuffle=which != "evaluation")
        return windows[: len(drawn)] if which == "evaluation" else drawn  # the first ones, as perplexities are given

    def shared(self, rows: list[Row], others: list[Row]) -> tuple[int, int]:
        """Windows of which at least half the spans of tokens stand in other windows, wherever; and all windows."""
        size = max(1, min(SPAN, min((len(row["input_ids"]) for row in rows), default=1) // 2))
        spans = [_spans(row["input_ids"], size) for row in rows]
        known = np.unique(np.concatenate(spans)) if spans else np.zeros(0, np.uint64)
        seen = np.zeros(len(known), bool)
        for row in others:  # one after the other: training text may be long
            found = _spans(row["input_ids"], size)
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            seen[places[known[places] == found]] = True
        return sum(bool(seen[np.searchsorted(known, each)].mean() >= 0.5) for each in spans), len(rows)

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        """Tokens of every window."""
        return [len(row["input_ids"]) for row in rows]

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        return {}  # the head spans the vocabulary; the text is its own label

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        return data.tensors(_examples(data.rows), sort=sort)

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """Windows as they are; ``labels`` [1, length]: the tokens themselves, -100 for those scored elsewhere."""
        labels = [[IGNORED] * row["scored_from"] + row["input_ids"][row["scored_from"] :] for row in rows]
        return training_examples(_examples(rows), labels)

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean cross-entropy of each token given those before it."""
        (labels,) = self.labels(batch)
        return cross_entropy(outputs["logits"][:, :-1], labels[:, 1:])

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Logits [positions, vocabulary] at positions that are spread evenly over each window."""
        return outputs["logits"][_spread(batch)]

    def state(self, model: nn.Module, batch: Batch) -> Tensor:
        """Inputs of the head, [positions, hidden], at the positions of :meth:`features` only."""
        body: Any = model.base_model
        hidden: Tensor = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return hidden[_spread(batch)]

    def features_of_state(self, model: nn.Module, state: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(state)  # type: ignore[operator]
        return logits

    def distilled(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Logits [tokens, vocabulary] at every token."""
        return outputs["logits"][batch["attention_mask"].bool()]

    def shortened(self, rows: list[Row], context: int | None) -> list[Row]:
        return [{**row, "input_ids": row["input_ids"][:context]} for row in rows]

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        """Tokens ``scored`` in each window, those that were the likeliest (``right``), ``log_likelihood`` of all."""
        found = _WindowOutcomes(len(data.rows))
        for prediction in self._predictions(function, data):
            found.add(*prediction)
        return found.outcomes()

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        """Windows with one token scored, of the mean likelihood both."""
        likelihood = outcomes["log_likelihood"].sum() / outcomes["scored"].sum()
        one = np.array([1, 1])
        return Outcomes({"scored": one, "right": np.array([1, 0]), "log_likelihood": np.full(2, likelihood)})

    def fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> dict[str, float]:
        """How often the likeliest token is the dense model's, and the mean KL divergence from it, in nats a token."""
        return self._closeness(self._predictions(function, data), self._predictions(dense, dense_data))

    def outcomes_and_fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> tuple[Outcomes, dict[str, float]]:
        found = _WindowOutcomes(len(data.rows))

        def counted() -> Iterator[_Prediction]:
            for prediction in self._predictions(function, data):
                found.add(*prediction)
                yield prediction

        fidelity = self._closeness(counted(), self._predictions(dense, dense_data))
        return found.outcomes(), fidelity

    def _closeness(self, own: Iterable[_Prediction], dense: Iterable[_Prediction]) -> dict[str, float]:
        agreed, divergence, n_tokens = 0, 0.0, 0
        for (_, logits, targets), (_, wanted, _) in zip(own, dense, strict=True):
            agreed += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
            divergence += float(self.divergence(logits, wanted)) * len(targets)
            n_tokens += len(targets)
        return {"next_token_agreement": agreed / n_tokens, "divergence": divergence / n_tokens}

    @staticmethod
    def _predictions(function: ModelFunction, data: EvaluationSet) -> Iterator[_Prediction]:
        """For each window its index, the logits ``[scored, vocabulary]`` and the tokens ``[scored]`` that followed."""
        for indices, inputs in data.batches(_examples(data.rows)):
            logits = function(inputs)["logits"]  # [batch, length, vocabulary]
            for position, index in enumerate(indices):
                row = data.rows[index]
                ids, first = torch.tensor(row["input_ids"]), max(1, row["scored_from"])
                own = logits[position, unpadded(len(ids), logits.shape[1], data.processor)]
                yield index, torch.from_numpy(as_float32(own[first - 1 : -1])), ids[first:]


class _WindowOutcomes:
    """What a model does with each of ``n`` windows, counted as its answers come."""

    def __init__(self, n: int) -> None:
        self._scored, self._right = (np.zeros(n, np.int64) for _ in range(2))
        self._log_likelihood = np.zeros(n)

    def add(self, index: int, logits: Tensor, targets: Tensor) -> None:
        likelihoods = logits.log_softmax(-1)
        self._scored[index], self._right[index] = len(targets), int((logits.argmax(-1) == targets).sum())
        self._log_likelihood[index] = float(likelihoods.gather(1, targets[:, None]).double().sum())

    def outcomes(self) -> Outcomes:
        return Outcomes({"scored": self._scored, "right": self._right, "log_likelihood": self._log_likelihood})


def window_tokens(data: DataConfig, processor: Any) -> int:
    """Tokens of a window of text: those asked for, or as many as the model takes of ``CONTEXT``."""
    return min(data.context or CONTEXT, int(processor.model_max_length))


def _spread(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns of the positions whose logits are compared.

    Not the first of a row, whose activations are mostly of another size: it would count far more than it does among
    all tokens.
    """
    chosen = []
    for row in map(torch.nonzero, batch["attention_mask"]):
        after = row[1:] if len(row) > 1 else row
        chosen.append(after[torch.linspace(0, len(after) - 1, min(len(after), FEATURES_PER_ROW)).long()])
    rows = torch.cat([torch.full_like(each, index) for index, each in enumerate(chosen)])
    return rows[:, 0], torch.cat(chosen)[:, 0]


def _examples(rows: list[Row]) -> list[Example]:
    return [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in rows]


def _spans(ids: list[int], size: int) -> NDArray[np.uint64]:
    """A number for every ``size`` tokens in a row."""
    tokens = np.array(ids, np.uint64) + np.uint64(1)
    found = np.zeros(max(0, len(tokens) - size + 1), np.uint64)
    for place in range(size):  # a polynomial of the tokens, modulo 2**64
        found = found * np.uint64(6364136223846793005) + tokens[place : place + len(found)]
    return found


def _stream(rows: list[Row], processor: Any) -> list[int]:
    """Token ids of all documents one after the other."""
    encoded = [row["ids"] for row in rows if "ids" in row] or _encoded(rows, processor)
    end = [] if processor.eos_token_id is None else [int(processor.eos_token_id)]
    stream: list[int] = []
    for number, ids in enumerate(encoded):
        stream += (end if number else []) + ids
    return stream


def _encoded(rows: list[Row], processor: Any) -> list[list[int]]:
    texts = [row["text"] if "text" in row else _chat(row["messages"], processor) for row in rows]
    encoded = encode(processor, texts, add_special_tokens=False, truncation=False, verbose=False)
    return list(encoded["input_ids"])


def _chat(messages: list[Any], processor: Any) -> str:
    """The text of a conversation, as the model's own template writes it."""
    if not getattr(processor, "chat_template", None):
        raise DataError(
            "expected a tokenizer with a chat template for conversations (column messages), found none; give texts"
        )
    try:
        return str(processor.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs of whoever made the model, and raise what they please
        raise DataError(
            f"expected messages that the tokenizer's chat template takes, found: {error}; correct the column messages"
        ) from error


def _windows(stream: list[int], context: int, stride: int) -> list[Row]:
    """Rows of ``context`` tokens that start ``stride`` apart; a rest that fills no window is left out.

    Raises:
        DataError: too little text for any window.
    """
    if len(stream) < MIN_WINDOW:
        raise DataError(f"expected at least {MIN_WINDOW} tokens of text, found {len(stream)}; give more text")
    if len(stream) < context:
        return [{"input_ids": stream, "scored_from": 0}]
    starts = range(0, len(stream) - context + 1, stride)
    return [
        {"input_ids": stream[start : start + context], "scored_from": context - stride if start else 0}
        for start in starts
    ]
