"""Text from a member of a causal language model, with ONNX Runtime and ``tokenizers`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer  # type: ignore[import-untyped, unused-ignore]

from ziplm_deploy.documents import read_json
from ziplm_deploy.engines.session import cpu_session, refuse_if_too_old
from ziplm_deploy.engines.worker.cache import CachedModel, is_causal
from ziplm_deploy.errors import CorruptArtifactError, UsageError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how half a character decodes, until its other bytes have come


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; 1 draws as the model says.
        top_k: draw from so many of the likeliest only; 0: from all.
        top_p: draw from the fewest tokens whose probabilities add up to this.
        seed: of the draws.

    Raises:
        UsageError: a value that is no such number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                "expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, found "
                f"{self.temperature:g}, {self.top_k} and {self.top_p:g}; correct them"
            )


def load_runner(folder: Path | str, file: str = "model.onnx") -> TextGenerator:
    """Open a member of a causal language model to continue texts; arguments and errors of :class:`TextGenerator`."""
    return TextGenerator(folder, file)


def open_causal(folder: Path, file: str) -> Any:
    """A session of a member's ONNX file that continues texts.

    Raises:
        CorruptArtifactError: no such file.  EngineError: ONNX Runtime rejects it, or is too old for it.
        UsageError: it is of no causal language model with a cache.
    """
    if not (folder / file).is_file():
        instead = "run its model.gguf in llama.cpp" if (folder / "model.gguf").is_file() else "name a member's folder"
        raise CorruptArtifactError(f"expected {file} in {folder}, found none; {instead} of a run")
    session: Any = cpu_session(folder / file)
    if not is_causal(session):
        raise UsageError(
            f"expected a causal language model with a cache in {folder / file}, found outputs "
            f"{', '.join(entry.name for entry in session.get_outputs())}; members of encoders open in optimum"
        )
    refuse_if_too_old(session)
    return session


class TextGenerator:
    """A member's folder, opened to continue texts.

    Args:
        folder: of a member, with ``tokenizer.json``, ``config.json`` and the ONNX file.
        file: which of its ONNX files.

    Raises:
        CorruptArtifactError: a file is missing or damaged.
        UsageError: the ONNX file is of no causal language model with a cache.
        EngineError: ONNX Runtime rejects the file.
    """

    def __init__(self, folder: Path | str, file: str = "model.onnx") -> None:
        folder = Path(folder)
        self.session: Any = open_causal(folder, file)
        self.tokenizer = _tokenizer(folder)
        settings = [read_settings(folder / name) for name in ("config.json", "generation_config.json")]
        self.end_ids = frozenset().union(*(_ids(each.get("eos_token_id")) for each in settings))
        meta = self.session.get_modelmeta().custom_metadata_map
        self.max_length = int(meta.get("max_length") or settings[0].get("max_position_embeddings") or 0)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: str | Sequence[str] = (),
    ) -> Any:
        """What follows each prompt, without the prompt: a text for a text, a list for several.

        A continuation ends with an end token of the model, before the first text of ``stop``, or after
        ``max_new_tokens``.

        Raises:
            UsageError: no prompt, one without tokens, or prompt and continuation do not fit the model's window.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = self.continue_tokens(self._encoded(several), max_new_tokens, sampling, stop)
        return texts[0] if isinstance(prompts, str) else texts

    def continue_tokens(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """What follows prompts that are tokens already, such as those of a chat template; as :meth:`generate`."""
        texts = [""] * len(rows)
        for pieces in self._rounds(rows, max_new_tokens, sampling, stop):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of what follows a prompt, as they come; raises as :meth:`generate`."""
        for (piece,) in self._rounds(self._encoded([prompt]), max_new_tokens, sampling, stop):
            if piece:
                yield piece

    def _rounds(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: str | Sequence[str]
    ) -> Iterator[list[str]]:
        """New text of every row after each call; empty where a row has ended, or waits for the rest of a character."""
        self._check(rows, max_new_tokens)
        generator = np.random.default_rng(sampling.seed)
        counts = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), int(counts.max())), np.int64)
        for row, known in zip(ids, rows, strict=True):
            row[: len(known)] = known
        model = CachedModel(self.session, len(rows), int(counts.max()) + max_new_tokens)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        continued = [_Continuation(self.tokenizer, self.end_ids, stops, known) for known in rows]
        for step in range(max_new_tokens):
            logits = model.call(ids, counts)[:, -1]  # [rows, vocabulary]
            chosen = [_choose(each, sampling, generator) for each in logits]
            last = step == max_new_tokens - 1
            yield [row.add(token, last=last) for row, token in zip(continued, chosen, strict=True)]
            if all(row.ended for row in continued):
                return
            ids, counts = np.array(chosen, np.int64)[:, None], np.ones(len(rows), np.int64)

    def _encoded(self, prompts: list[str]) -> list[list[int]]:
        return [list(encoding.ids) for encoding in self.tokenizer.encode_batch(prompts)]

    def _check(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not rows or max_new_tokens < 1:
            raise UsageError(
                f"expected a prompt and max_new_tokens >= 1, found {len(rows)} prompts and {max_new_tokens}; correct "
                "them"
            )
        for number, row in enumerate(rows, 1):
            if not row:
                raise UsageError(f"expected tokens in every prompt, found none in number {number}; give some text")
            if self.max_length and len(row) + max_new_tokens > self.max_length:
                raise UsageError(
                    f"expected prompt and continuation within {self.max_length} tokens, found {len(row)} in prompt "
                    f"{number} and max_new_tokens {max_new_tokens}; shorten one of them"
                )


def text_behind(decode: Callable[[list[int]], str], before: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of tokens behind others. Decoded alone those of SentencePiece would lose the space that they begin with."""
    known = decode(list(before[-1:]))
    both = decode([*before[-1:], *tokens])
    is_whole = UNFINISHED not in known and both.startswith(known)
    return both[len(known) :] if is_whole else decode(list(tokens))


class _Continuation:
    """Tokens that follow one prompt, as text."""

    def __init__(
        self, tokenizer: Tokenizer, end_ids: frozenset[int], stop: tuple[str, ...], before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.end_ids, self.stop, self.before = tokenizer, end_ids, stop, before
        self.tokens: list[int] = []
        self.given = ""
        self.ended = False

    def add(self, token: int, *, last: bool) -> str:
        """The new text that a token completes."""
        if self.ended:
            return ""
        if token in self.end_ids:
            self.ended = True
        else:
            self.tokens.append(token)
        text = text_behind(self.tokenizer.decode, self.before, self.tokens)
        places = [place for place in (text.find(each) for each in self.stop if each) if place >= 0]
        if places:
            text, self.ended = text[: min(places)], True
        if not (self.ended or last):
            text = self._sure(text)
        piece = text[len(self.given) :]
        self.given = text
        return str(piece)

    def _sure(self, text: str) -> str:
        """What no later token changes: no half characters, and nothing that may become a text to stop before."""
        end = len(text.rstrip(UNFINISHED))
        for each in self.stop:
            for size in range(min(len(each) - 1, end), 0, -1):
                if text[:end].endswith(each[:size]):
                    end -= size
                    break
        return text[: max(end, len(self.given))]


def _choose(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token by logits ``[vocabulary]``."""
    if not sampling.temperature:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    order = order[: sampling.top_k] if sampling.top_k else order
    scaled = (logits[order].astype(np.float64) - logits.max()) / sampling.temperature
    shares = np.exp(scaled)
    shares /= shares.sum()
    kept = int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1
    shares = shares[:kept] / shares[:kept].sum()
    return int(generator.choice(order[:kept], p=shares))


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise CorruptArtifactError(
            f"expected a tokenizer in {path}, found: {error}; copy the member's folder again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_settings(path: Path) -> dict[str, Any]:
    """Fields of a JSON file; none where there is no such file.

    Raises:
        CorruptArtifactError: it holds no JSON.
    """
    if not path.is_file():
        return {}
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise CorruptArtifactError(f"expected JSON in {path}, found: {error}; copy the folder again") from error
    return fields if isinstance(fields, dict) else {}


def _ids(value: object) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {each for each in values if isinstance(each, int)}
