"""Text that the dense model writes itself, to calibrate and train on where there is none ("self-data").

The scheme is that of LLM-QAT (Liu et al., 2023, section 2.1): a text begins with a token drawn at random, goes on with
a few of the likeliest, and then with tokens drawn as the model has them, up to its end or a window's length. Every text
is plain: it begins behind the token that begins or separates texts, no chat template is around it, and special tokens
are never drawn.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor

from exporters import max_tokens
from ziplm_deploy.artifacts import Artifact, write_text
from ziplm_deploy.errors import CorruptArtifactError, RecipeError
from ziplm_deploy.models.causal import end_tokens
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import GeneratedConfig
from ziplm_deploy.tasks.batching import encode


class SampledTexts(Artifact):
    """Texts as tokens, without those that begin or end them, and the same for people to read."""

    KIND: ClassVar[str] = "sampled_texts"

    ids: list[list[int]]
    texts: list[str]
    seconds: float  # that sampling took

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))

    def save(self, path: Path) -> None:
        # Compact: with indentation every token would get a line.
        head = {"kind": self.KIND, "schema_version": self.SCHEMA_VERSION}
        write_text(path, json.dumps({**head, **self.model_dump(mode="json")}, ensure_ascii=False) + "\n")


def read_texts(folder: Path) -> SampledTexts:
    """All texts of a folder with batches of them.

    Raises:
        CorruptArtifactError: there are none, or a file is damaged.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem))  # by number
    if not paths:
        raise CorruptArtifactError(f"expected sampled texts in {folder}, found none; run the same command again")
    return _joined([SampledTexts.load(path) for path in paths])


def _joined(batches: list[SampledTexts]) -> SampledTexts:
    return SampledTexts(
        ids=[ids for batch in batches for ids in batch.ids],
        texts=[text for batch in batches for text in batch.texts],
        seconds=sum(batch.seconds for batch in batches),
    )


class TextSampler:
    """A causal language model that writes texts for windows of ``context`` tokens, on a GPU if there is one.

    Raises:
        RecipeError: ``first_token: model`` for a tokenizer without a token that begins or separates texts.
    """

    def __init__(self, model: Any, processor: Any, config: GeneratedConfig, context: int) -> None:
        self._processor, self._config = processor, config
        self._wanted = config.n_windows * context  # tokens
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model if self._device.type == "cpu" else copy.deepcopy(model).to(self._device)
        self._start = start_ids(processor)
        if config.first_token == "model" and not self._start:
            raise RecipeError(
                "expected a tokenizer with a token that begins or separates texts for data.generated.first_token: "
                "model, found none; set it to vocabulary"
            )
        self._length = min(context, max_tokens(model) - len(self._start))  # tokens that a text has at most
        self._between = 0 if processor.eos_token_id is None else 1  # tokens between two texts in windows
        self._ends = sorted(end_tokens(self._model, processor))
        special = special_ids(processor)
        n_known, n_embedded = len(processor), self._model.get_input_embeddings().num_embeddings
        self._plain = [token for token in range(min(n_known, n_embedded)) if token not in special]
        self._never = sorted({*special, *range(n_known, n_embedded)} - set(self._ends))

    def sample(self, seed: int, parts: Path, progress: Progress) -> SampledTexts:
        """Texts that fill the windows; batches go to the folder ``parts``, from which a killed sampling goes on.

        What is sampled depends on the seed, not on whether it was interrupted.
        """
        found: list[SampledTexts] = []
        done = -self._between  # nothing stands behind the last text
        while done < self._wanted:
            path = parts / f"{len(found)}.json"
            if not path.exists():
                # no more texts than are needed if none of them ends early
                size = min(self._config.batch_size, math.ceil((self._wanted - done) / (self._length + self._between)))
                self._batch(size, int(np.random.SeedSequence([seed, len(found)]).generate_state(1)[0])).save(path)
            found.append(SampledTexts.load(path))
            done += found[-1].n_tokens + self._between * len(found[-1].ids)
            progress.step(min(done, self._wanted), self._wanted)
        return _joined(found)

    def _batch(self, size: int, seed: int) -> SampledTexts:
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(seed)
            prompts = self._prompts(size)  # [size, prompt]
            with _own_settings_aside(self._model):
                written = self._model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    generation_config=self._settings(prompts.shape[1]),
                    logits_processor=transformers.LogitsProcessorList([self._scheme()]),
                )  # [size, prompt + tokens]
        ids = [self._until_end(row) for row in written[:, len(self._start) :].tolist()]
        texts = [self._processor.decode(each) for each in ids]
        return SampledTexts(ids=ids, texts=texts, seconds=time.perf_counter() - began)

    def _prompts(self, size: int) -> Tensor:
        start = torch.tensor(self._start, dtype=torch.int64).expand(size, -1)
        if self._config.first_token == "model":
            return start.to(self._device)
        first = torch.tensor(self._plain)[torch.randint(len(self._plain), (size, 1))]
        return torch.cat([start, first], dim=1).to(self._device)

    def _settings(self, n_prompt: int) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
            do_sample=True,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            top_k=0,
            max_new_tokens=len(self._start) + self._length - n_prompt,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,
            use_cache=True,
        )

    def _scheme(self) -> transformers.LogitsProcessor:
        first = len(self._start) + 1  # tokens of the sequence when the first one of the text is there
        return _Scheme(self._never, self._ends, first, first + self._config.greedy_tokens)

    def _until_end(self, row: list[int]) -> list[int]:
        ends = (position for position, token in enumerate(row) if token in self._ends)
        return row[: next(ends, len(row))]


class _Scheme(transformers.LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Scores in which some tokens are never drawn, and the likeliest always from ``first`` up to ``until`` tokens.

    No text ends before it has ``until`` tokens, its start included.
    """

    def __init__(self, never: list[int], ends: list[int], first: int, until: int) -> None:
        self._never, self._ends, self._first, self._until = never, ends, first, until

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n_tokens = input_ids.shape[1]
        scores = scores.clone()  # [batch, vocabulary]
        scores[:, self._never] = -torch.inf
        if n_tokens < self._until:
            scores[:, self._ends] = -torch.inf
        if self._first <= n_tokens < self._until:
            likeliest = scores.argmax(dim=1, keepdim=True)
            scores = torch.full_like(scores, -torch.inf).scatter(1, likeliest, 0.0)
        return scores


def start_ids(processor: Any) -> list[int]:
    """The token that texts begin behind: what the tokenizer puts there, else the end of another text; or none."""
    begin, end = processor.bos_token_id, processor.eos_token_id
    if begin is not None and encode(processor, "a")["input_ids"][:1] == [begin]:
        return [int(begin)]
    return [] if end is None else [int(end)]


def special_ids(processor: Any) -> set[int]:
    """Tokens that are no text: start, end, padding, and those of chat templates."""
    added = {int(token) for token, content in processor.added_tokens_decoder.items() if content.special}
    return added | set(processor.all_special_ids)


@contextlib.contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Let a model's own generation settings not fill in what is left open: nobody wants its repetition penalty here."""
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        yield
    finally:
        model.generation_config = own
