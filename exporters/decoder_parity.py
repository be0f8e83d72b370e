"""Check that the ONNX file of a causal language model answers like its torch model, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.parity import checked_difference, parity_session

_ADVICE = "export it again, or run it in a release of ONNX Runtime that its metadata name"


class _CachedCalls:
    """Calls of a file one after the other, each with the cache that the one before returned.

    ``seen``: for each row, which places of the cache hold its tokens, ``[batch, total]``. Files that take positions
    append to the cache, padding included; the others overwrite padding, so that a row's tokens stand together.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        self.session = parity_session(path)
        self.inputs = {item.name for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.seen = np.zeros((batch_size, 0), dtype=np.int64)
        self.past = {
            _past_of(item.name): np.zeros((batch_size, item.shape[1], 0, item.shape[3]), dtype=np.float32)
            for item in self.session.get_outputs()
            if item.name.startswith("present.")
        }

    def logits(self, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Logits of ``ids``, ``[batch, sequence]``, of which those are ``real`` that are 1 there, and not padding."""
        self.seen = np.concatenate([self.seen, real], axis=1)
        feed = {"input_ids": ids, "attention_mask": self.seen}
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.maximum(np.cumsum(self.seen, axis=1) - 1, 0)[:, -ids.shape[1] :]
        else:
            lengths = self.seen.sum(axis=1, keepdims=True)
            total = max(int(lengths.max()), self.seen.shape[1])
            self.seen = feed["attention_mask"] = (np.arange(total) < lengths).astype(np.int64)
        found: dict[str, np.ndarray] = dict(
            zip(self.outputs, self.session.run(self.outputs, feed | self.past), strict=True)
        )
        self.past = {_past_of(name): value for name, value in found.items() if name != "logits"}
        return found["logits"]


def check_decoder_parity(
    logits_of: Callable[[Tensor], Tensor],
    onnx_path: Path,
    prompts: Sequence[Sequence[int]],
    atol: float,
    n_steps: int = 4,
) -> float:
    """Largest absolute difference of logits over one batch of prompts and ``n_steps`` tokens after each.

    Prompts of different lengths are padded on the right. Torch answers for each row alone, without padding and without
    a cache; its likeliest token is what both go on with.

    Args:
        logits_of: logits ``[1, tokens, vocabulary]`` of ids ``[1, tokens]``.
        prompts: ids of each row, at least one.

    Raises:
        ParityMismatch: shapes differ, logits are not finite, or a difference is above ``atol``.
    """
    rows = [list(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = np.array([row + [row[-1]] * (longest - len(row)) for row in rows], dtype=np.int64)
    real = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=np.int64)
    calls = _CachedCalls(onnx_path, len(rows))
    largest = 0.0
    for step in range(n_steps + 1):
        found = calls.logits(ids, real)
        with torch.no_grad():
            expected = [logits_of(torch.tensor([row]))[0].float().numpy() for row in rows]
        for place, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
            name = f"logits of row {place} at token {len(row)}, {'prefill' if step == 0 else f'decode step {step}'}"
            # A file answers for the last token, or for all of this call; then padding comes behind.
            of_call = wanted[-1:] if found.shape[1] == 1 else wanted
            answers = found[place, : len(of_call)]
            largest = max(largest, checked_difference(name, of_call, answers, onnx_path, atol, _ADVICE))
            row.append(int(wanted[-1].argmax()))
        ids = np.array([[row[-1]] for row in rows], dtype=np.int64)
        real = np.ones_like(ids)
    return largest


def _past_of(name: str) -> str:
    return name.replace("present.", "past_key_values.", 1)
