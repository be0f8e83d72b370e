"""A member's ONNX file as a language model of lm-evaluation-harness (Gao et al., 2021); needs its package."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ziplm_deploy.engines.generator import Sampling, load_runner, read_settings
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import UsageError
from ziplm_deploy.tasks.evaluation_set import TOKENS_AT_ONCE, ModelFunction

MAX_NEW_TOKENS = 256  # where a task names no limit, as in the harness

# The harness's own: texts of context and continuation, tokens of the context, tokens of the continuation.
_Scored = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A member's ONNX file as a model that ``lm_eval.simple_evaluate`` takes, run by ONNX Runtime.

    Contexts that do not fit the model's window lose their beginning.

    Args:
        folder: of a member, with ``tokenizer.json``, ``config.json`` and the ONNX file.
        file: which of its ONNX files.

    Raises:
        CorruptArtifactError: a file is missing or damaged.
        UsageError: the ONNX file is of no causal language model with a cache.
        EngineError: ONNX Runtime rejects the file.
    """

    def __init__(self, folder: Path | str, file: str = "model.onnx") -> None:
        super().__init__()
        self._path = Path(folder) / file
        self.generator = load_runner(folder, file)
        self._settings = read_settings(Path(folder) / "config.json")
        self.max_length = self.generator.max_length or TOKENS_AT_ONCE

    @functools.cached_property
    def _answer(self) -> ModelFunction:
        """Logits of all tokens, by a session of its own, which tasks of continuations alone do without."""
        return onnx_runner(self._path)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.generator.end_ids:
            raise UsageError(
                "expected an eos_token_id in config.json or generation_config.json of the member, found none; add it"
            )
        return min(self.generator.end_ids)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the one that begins texts, or else the one that ends them."""
        first = self._settings.get("bos_token_id")
        return first if isinstance(first, int) else self.eot_token_id

    @functools.cached_property
    def _begin(self) -> str | None:
        """The start token that the tokenizer puts before a text, and nothing else around it; None where it does not."""
        first, tokenizer = self._settings.get("bos_token_id"), self.generator.tokenizer
        around, bare = (tokenizer.encode("a", add_special_tokens=asked).ids for asked in (True, False))
        return tokenizer.id_to_token(first) if isinstance(first, int) and around == [first, *bare] else None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; with the start token that its tokenizer puts before texts, unless it is not asked for.

        So the harness has it for models of transformers, too. A text that begins with that token gets no second one.
        """
        if add_special_tokens is None:
            add_special_tokens = self._begin is not None and not string.startswith(self._begin)
        return list(self.generator.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def _loglikelihood_tokens(self, requests: Sequence[_Scored], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would give."""
        rows = [self._window(context, continuation) for _, context, continuation in requests]
        results: dict[int, tuple[float, bool]] = {}
        for part in _parts([len(row) for row in rows]):
            width = max(len(rows[index]) for index in part)
            ids, mask = (np.zeros((len(part), width), np.int64) for _ in range(2))
            for place, index in enumerate(part):
                ids[place, : len(rows[index])] = rows[index]
                mask[place, : len(rows[index])] = 1
            logits = self._answer({"input_ids": ids, "attention_mask": mask})["logits"]  # [part, width, vocabulary]
            for place, index in enumerate(part):
                targets = np.array(requests[index][2][-self.max_length :])
                last = len(rows[index])
                results[index] = _likelihood(logits[place, last - len(targets) : last], targets)
        return [results[index] for index in range(len(rows))]

    def _window(self, context: list[int], continuation: list[int]) -> list[int]:
        """What the model reads to predict a continuation: all but its last token, the end of it that fits."""
        if not context or not continuation:
            raise UsageError(
                f"expected tokens in context and continuation, found {len(context)} and {len(continuation)}; check "
                "the task's texts"
            )
        return [*context, *continuation][-(self.max_length + 1) :][:-1]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once with as much before it as the window holds."""
        windows: list[_Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((("", ""), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of a task's stop texts; greedy, or drawn where the task says so."""
        texts = []
        for context, settings in (request.args for request in requests):
            until = settings.get("until") or []
            limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)
            ids = self.tok_encode(context)
            kept = ids[-(self.max_length - limit) :]
            if limit >= self.max_length or not kept:
                raise UsageError(
                    f"expected a text to go on from and max_gen_toks below the window of {self.max_length} tokens, "
                    f"found {len(kept)} tokens and {limit}; lower max_gen_toks of the task"
                )
            drawn = bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0
            sampling = Sampling(
                temperature=float(settings.get("temperature", 1.0)) if drawn else 0.0,
                top_k=int(settings.get("top_k", 0)) if drawn else 0,
                top_p=float(settings.get("top_p", 1.0)) if drawn else 1.0,
            )
            stops = [until] if isinstance(until, str) else list(until)
            texts += self.generator.continue_tokens([kept], limit, sampling, stops)
        return texts


def _parts(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows that go through the model together: of nearly one length, the longest first."""
    part: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if part and (len(part) + 1) * lengths[part[0]] > TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def _likelihood(logits: np.ndarray, targets: np.ndarray) -> tuple[float, bool]:
    """Log-likelihood of tokens [n] by logits [n, vocabulary], and whether each is the likeliest."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    chosen = np.take_along_axis(wide, targets[:, None], -1)[:, 0] - np.log(np.exp(wide).sum(-1))
    return float(chosen.sum()), bool((wide.argmax(-1) == targets).all())
