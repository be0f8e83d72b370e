"""A member's ONNX file behind ``generate()`` of transformers, with its beams, streamers and logits processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ziplm_deploy.engines.generator import open_causal, read_settings
from ziplm_deploy.engines.worker.cache import CachedModel
from ziplm_deploy.errors import CorruptArtifactError, UsageError

ROOM = 256  # tokens a buffer of the cache has beyond what it holds, when it is made or outgrown


def load_generation_model(folder: Path | str, file: str = "model.onnx") -> GenerationModel:
    """Open a member of a causal language model for ``generate()`` of transformers; as :class:`GenerationModel`."""
    return GenerationModel(folder, file)


class GenerationModel(GenerationMixin):  # type: ignore[misc, unused-ignore]
    """A member's ONNX file with ``generate()`` of transformers, run by ONNX Runtime.

    Rows of a batch may be padded on either side. The cache stays inside: a call whose rows go on from rows of the call
    before by one token, in whatever order, computes that token alone. Two threads need two of these.

    Args:
        folder: of a member, with ``config.json`` and the ONNX file.
        file: which of its ONNX files.

    Raises:
        CorruptArtifactError: a file is missing or damaged.
        UsageError: the ONNX file is of no causal language model with a cache.
        EngineError: ONNX Runtime rejects the file.
    """

    main_input_name = "input_ids"
    _is_stateful = True  # no assisted decoding: that goes back to a shorter cache
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, folder: Path | str, file: str = "model.onnx") -> None:
        folder = Path(folder)
        self.session: Any = open_causal(folder, file)
        settings = read_settings(folder / "config.json")
        if not isinstance(settings.get("model_type"), str):
            raise CorruptArtifactError(f"expected a model_type in {folder / 'config.json'}, found none; copy it again")
        try:
            self.config = AutoConfig.for_model(**settings)
        except (TypeError, ValueError, KeyError) as error:
            raise CorruptArtifactError(
                f"expected a config.json that transformers reads in {folder}, found: {error}; copy it again"
            ) from error
        self.generation_config = GenerationConfig.from_model_config(self.config)
        named = read_settings(folder / "generation_config.json")
        if named:
            self.generation_config = GenerationConfig.from_dict(named)
        meta = self.session.get_modelmeta().custom_metadata_map
        self.max_length = int(meta.get("max_length") or settings.get("max_position_embeddings") or 0)
        self._model: CachedModel | None = None
        self._ids = np.zeros((0, 0), np.int64)  # of the call before

    def can_generate(self) -> bool:
        """Whether ``generate()`` may be called: always."""
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        """How transformers computes mixtures of experts, which it asks every model: there are none in the file."""
        return {}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is in the session's buffers

    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Arguments of a call: all tokens so far ``[batch, tokens]`` and their mask; what is new is found there."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True, **_: Any
    ) -> CausalLMOutputWithPast:
        """Logits ``[batch, 1, vocabulary]`` of the last token of every row.

        Args:
            input_ids: int64 ``[batch, tokens]``, all tokens of every row, those of earlier calls too.
            attention_mask: ``[batch, tokens]``, 0 for padding; None: there is none.
            return_dict: ignored, as the answer is always one.

        Raises:
            UsageError: a row without tokens, or more of them than the model's window holds.
        """
        ids = input_ids.numpy().astype(np.int64)
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy().astype(np.int64)
        rows = self._rows_before(ids, mask)
        if rows is None or self._model is None:
            logits = self._new_texts(ids, mask)
        else:
            if not np.array_equal(rows, np.arange(len(ids))):
                self._model.reorder(rows)
            if int(self._model.lengths.max()) + 1 > self._model.max_length:
                self._model.grow(self._capacity(int(self._model.lengths.max()) + 1))
            logits = self._model.call(ids[:, -1:], np.ones(len(ids), np.int64))
        self._ids = ids
        found: Any = torch.from_numpy(np.array(logits[:, -1:]))
        return CausalLMOutputWithPast(logits=found)

    def _rows_before(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
        """For every row, the row of the call before that it is one token longer than; None: some row is new."""
        if self._model is None or not mask[:, -1].all() or ids.shape != (len(self._ids), self._ids.shape[1] + 1):
            return None
        known: dict[bytes, int] = {}
        for number, row in enumerate(self._ids):
            known.setdefault(row.tobytes(), number)
        found = [
            number if np.array_equal(row[:-1], self._ids[number]) else known.get(row[:-1].tobytes(), -1)
            for number, row in enumerate(ids)
        ]
        rows = np.array(found)
        return None if (rows < 0).any() or not self._same_padding(rows, mask) else rows

    def _same_padding(self, rows: np.ndarray, mask: np.ndarray) -> bool:
        assert self._model is not None
        return bool(np.array_equal(self._model.lengths[rows] + 1, mask.sum(axis=1)))

    def _new_texts(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits after all tokens of every row, moved to the left of their padding."""
        counts = mask.sum(axis=1)
        if not counts.all():
            raise UsageError(f"expected tokens in every row, found none in row {int(counts.argmin())}; give some text")
        moved = np.zeros((len(ids), int(counts.max())), np.int64)
        for row, known, kept in zip(moved, ids, mask, strict=True):
            row[: int(kept.sum())] = known[kept.astype(bool)]
        self._model = CachedModel(self.session, len(ids), self._capacity(int(counts.max())))
        return self._model.call(moved, counts)

    def _capacity(self, tokens: int) -> int:
        """Tokens a row that the cache is made for."""
        if self.max_length and tokens > self.max_length:
            raise UsageError(
                f"expected prompt and continuation within {self.max_length} tokens, found {tokens}; shorten the "
                "prompt or lower max_new_tokens"
            )
        room = tokens + max(ROOM, tokens)
        return min(room, self.max_length) if self.max_length else room
