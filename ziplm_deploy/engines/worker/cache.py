"""Calls of a causal language model with a cache of keys and values, in ONNX Runtime.

Files of the form ``onnxruntime`` (:mod:`exporters.decoder`) get one buffer a layer, bound as past and as present: no
call copies it. Files of the portable form return a longer cache from each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

PAST, PRESENT = "past_key_values.", "present."


def is_causal(session: Any) -> bool:
    """Whether a session is of a causal language model: of our exporter, or with a cache. Base models have none."""
    outputs = {entry.name for entry in session.get_outputs()}
    of_ours = "form" in getattr(session, "get_modelmeta", _NoMetadata)().custom_metadata_map
    return of_ours or any(name.startswith(PRESENT) for name in outputs)


class _NoMetadata:
    """What sessions of engines without metadata tell: nothing."""

    custom_metadata_map: dict[str, str] = {}  # noqa: RUF012 (Python 3.8)


def form_of(session: Any) -> str:
    """``onnxruntime`` or ``portable``, as the exporter has noted it in the file; portable for files of others."""
    return str(session.get_modelmeta().custom_metadata_map.get("form", "portable"))


def too_old(session: Any, version: str) -> str:
    """Why this release of ONNX Runtime must not run a file, as the exporter has noted it there; empty if it may.

    It would run it, and answer wrong.
    """
    metadata = getattr(session, "get_modelmeta", _NoMetadata)().custom_metadata_map
    needed = metadata.get("onnxruntime", "").lstrip(">=")
    if not needed or _numbers(version) >= _numbers(needed):
        return ""
    return (
        f"expected onnxruntime {needed} or later, which answers right for this file, found {version}; "
        "run: pip install -U onnxruntime"
    )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


class CachedModel:
    """One text a row, at most ``max_length`` tokens each; every call appends to what the calls before it left.

    Attributes:
        lengths: int64 ``[batch]``, tokens of each row so far.
    """

    def __init__(self, session: Any, batch_size: int, max_length: int) -> None:
        if not hasattr(session, "get_modelmeta"):
            raise RuntimeError("causal language models with a cache run in onnxruntime only; choose that engine")
        import onnxruntime

        reason = too_old(session, onnxruntime.__version__)
        if reason:
            raise RuntimeError(reason)
        self.session, self.batch_size, self.max_length = session, batch_size, max_length
        self.takes_positions = any(entry.name == "position_ids" for entry in session.get_inputs())
        self.in_place = form_of(session) == "onnxruntime"
        # Outputs tell the heads of each layer; inputs may leave them open, so that others can start with none.
        room = max_length if self.in_place else 0
        shapes = {
            entry.name: (batch_size, entry.shape[1], room, entry.shape[3])
            for entry in session.get_outputs()
            if entry.name.startswith(PRESENT)
        }
        self.cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name, shape in shapes.items()
        }
        self.ort = onnxruntime
        self.names = [entry.name for entry in session.get_outputs()]
        self.binding: Any = None  # of the cache as it is, for the calls to come
        self.clear()

    def clear(self) -> None:
        """Start new texts in the same buffers."""
        self.lengths = np.zeros(self.batch_size, np.int64)
        self.seen = np.zeros((self.batch_size, 0), np.int64)  # portable: which places of the cache hold tokens
        if not self.in_place:
            self._fill(0)

    def reorder(self, rows: np.ndarray) -> None:
        """Let each row go on from what row ``rows[i]``, int64 ``[batch]``, held until now."""
        for name, value in self.cache.items():
            self.cache[name] = self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[rows]))
        self.binding = None
        self.lengths, self.seen = self.lengths[rows], self.seen[rows]

    def grow(self, max_length: int) -> None:
        """Make room for ``max_length`` tokens a row, more than now; what is cached stays."""
        self.max_length = max_length
        if not self.in_place:
            return
        for name, value in self.cache.items():
            held = value.numpy()  # [batch, heads, room, width]
            longer = np.zeros((*held.shape[:2], max_length, held.shape[3]), np.float32)
            longer[:, :, : held.shape[2]] = held
            self.cache[name] = self.ort.OrtValue.ortvalue_from_numpy(longer)
        self.binding = None

    def _fill(self, length: int) -> None:
        """Portable: a cache of ``length`` tokens a row, whatever they are."""
        for name, value in self.cache.items():
            batch, heads, _, width = value.shape()
            empty = np.zeros((batch, heads, length, width), np.float32)
            self.cache[name] = self.ort.OrtValue.ortvalue_from_numpy(empty)
        self.binding = None
        self.seen = np.ones((self.batch_size, length), np.int64)

    def call(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Logits of each row's last token, ``[batch, vocabulary]``, or of all tokens if the file gives them.

        Args:
            ids: int64 ``[batch, tokens]``, padded on the right.
            counts: int64 ``[batch]``, how many of them are no padding, at least one.
        """
        logits = self._run(ids, counts)
        self.lengths = self.lengths + counts
        return logits

    def rehearsal(self, ids: np.ndarray, length: int) -> Callable[[], Any]:
        """A call after ``length`` cached tokens a row, whatever they are, that can be repeated: for timing."""
        self.lengths = np.full(self.batch_size, length, np.int64)
        if not self.in_place:
            self._fill(length)
        binding = self._with_cache()
        held = self._bind_call(binding, ids, np.full(self.batch_size, ids.shape[1], np.int64))

        def run() -> None:
            assert held  # they live as long as this
            self.session.run_with_iobinding(binding)

        return run

    def _run(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if self.binding is None:
            self.binding = self._with_cache()
        _held = self._bind_call(self.binding, ids, counts)
        self.session.run_with_iobinding(self.binding)
        found = dict(zip(self.names, self.binding.get_outputs()))  # noqa: B905 (Python 3.8)
        if not self.in_place:
            self.cache, self.binding = {name: found[name] for name in self.cache}, None
        return np.asarray(found["logits"].numpy())

    def _with_cache(self) -> Any:
        """A binding of the cache as it is, and of outputs in the order of ``names``."""
        binding = self.session.io_binding()
        for name in self.names:
            if name in self.cache:
                binding.bind_ortvalue_input(name.replace(PRESENT, PAST, 1), self.cache[name])
            if name in self.cache and self.in_place:
                binding.bind_ortvalue_output(name, self.cache[name])
            else:
                binding.bind_output(name, "cpu")
        return binding

    def _bind_call(self, binding: Any, ids: np.ndarray, counts: np.ndarray) -> list[Any]:
        """Bind what a call reads and its logits; returns what owns the memory: not every release keeps that alive."""
        held: list[Any] = list(self.cache.values())
        for name, value in self._inputs(ids, counts).items():
            array = np.ascontiguousarray(value)
            bound = self.ort.OrtValue.ortvalue_from_numpy(array)
            held += [array, bound]
            binding.bind_ortvalue_input(name, bound)
        for name in self.names:
            if name not in self.cache:
                binding.bind_output(name, "cpu")  # else the last call's buffer, of its number of tokens, were bound
        return held

    def _inputs(self, ids: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        tokens = ids.shape[1]
        real = (np.arange(tokens) < counts[:, None]).astype(np.int64)  # [batch, tokens]
        if not self.takes_positions:  # places are filled one after the other: padding is overwritten by what follows
            total = int((self.lengths + np.maximum(counts, 1)).max())
            total = max(total, tokens)
            mask = (np.arange(total) < (self.lengths + counts)[:, None]).astype(np.int64)
            return {"input_ids": ids, "attention_mask": mask}
        self.seen = np.concatenate([self.seen, real], axis=1)
        positions = np.maximum(np.cumsum(self.seen, axis=1) - 1, 0)[:, -tokens:]
        return {"input_ids": ids, "attention_mask": self.seen, "position_ids": positions}
