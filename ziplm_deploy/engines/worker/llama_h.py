"""Logits of all tokens of a text, by the functions of ``llama.h``, which the library of ``xllamacpp`` exports.

Settings of a model and of a context are structures whose fields change from release to release. Here they are blocks of
memory that llama.cpp itself has filled with its defaults. Only the first four numbers of a context are written; what
the context says about itself must be the same.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

CHUNK = 512  # tokens in one call; llama.cpp's own default


class Block(ctypes.Structure):
    """Settings of llama.cpp, passed by value; larger than they are in any release."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """``llama_batch``: tokens with their positions, sequences and whether their logits are wanted."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


POINTER, INT, COUNT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
SIGNATURES: dict[str, tuple[Any, ...]] = {  # name: what it returns, then what it takes
    "llama_backend_init": (None,),
    "llama_model_default_params": (Block,),
    "llama_context_default_params": (Block,),
    "llama_model_load_from_file": (POINTER, ctypes.c_char_p, Block),
    "llama_model_free": (None, POINTER),
    "llama_model_get_vocab": (POINTER, POINTER),
    "llama_vocab_n_tokens": (INT, POINTER),
    "llama_init_from_model": (POINTER, POINTER, Block),
    "llama_free": (None, POINTER),
    "llama_n_ctx": (COUNT, POINTER),
    "llama_n_batch": (COUNT, POINTER),
    "llama_n_ubatch": (COUNT, POINTER),
    "llama_n_seq_max": (COUNT, POINTER),
    "llama_set_n_threads": (None, POINTER, INT, INT),
    "llama_get_memory": (POINTER, POINTER),
    "llama_memory_clear": (None, POINTER, ctypes.c_bool),
    "llama_batch_init": (Batch, INT, INT, INT),
    "llama_batch_free": (None, Batch),
    "llama_decode": (INT, POINTER, Batch),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), POINTER),
}


class Functions:
    """The functions of ``llama.h`` in a library, under their own names.

    Raises:
        RuntimeError: the library exports other ones.
    """

    def __init__(self, library: str) -> None:
        loaded = ctypes.CDLL(library)
        missing = [name for name in SIGNATURES if not hasattr(loaded, name)]
        if missing:
            raise RuntimeError(
                f"expected a release of xllamacpp that exports the functions of llama.h, found none of "
                f"{', '.join(missing)} in {library}; run: pip install xllamacpp==2026.10.11549"
            )
        for name, (returned, *taken) in SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = returned, taken
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # set above; here for type checkers


class LogitsOfTokens:
    """A GGUF file that is read when it is first asked."""

    def __init__(self, functions: Functions, path: str, threads: int) -> None:
        self.llama, self.path, self.threads = functions, path, threads
        self.model: Any = None
        self.context: Any = None
        self._end_context: Callable[[], object] | None = None
        self.room = 0  # tokens of the longest text that the context takes

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 ``[tokens, vocabulary]`` of one text, ids int64 ``[tokens]``."""
        if len(ids) > self.room:
            self._make_room(len(ids))
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        parts = [self._decode(ids[start : start + CHUNK], start) for start in range(0, len(ids), CHUNK)]
        return np.concatenate(parts)

    def _decode(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Logits of further tokens of a text, the first at position ``start``."""
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids.tolist()):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            failed = self.llama.llama_decode(self.context, batch)
        finally:
            self.llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"expected llama.cpp to read {len(ids)} tokens from {start} on, found error {failed}")
        return np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), (len(ids), self.n_vocabulary)).copy()

    def _make_room(self, tokens: int) -> None:
        llama = self.llama
        if self.model is None:
            llama.llama_backend_init()
            self.model = llama.llama_model_load_from_file(self.path.encode(), llama.llama_model_default_params())
            if not self.model:
                raise RuntimeError(f"expected a model that llama.cpp runs in {self.path}, found none")
            self.n_vocabulary: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
            self._end = weakref.finalize(self, llama.llama_model_free, self.model)
        if self._end_context is not None:
            self._end_context()
        room = CHUNK * -(-tokens // CHUNK)  # as it is: llama.cpp rounds up what is no multiple of 256
        wanted = (room, CHUNK, CHUNK, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max: the first numbers since 2024
        settings = llama.llama_context_default_params()
        settings.words[:4] = wanted
        self.context = llama.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"expected llama.cpp to make room for {room} tokens of {self.path}, found none")
        self._end_context = weakref.finalize(self, llama.llama_free, self.context)
        self._check(wanted)
        llama.llama_set_n_threads(self.context, self.threads, self.threads)
        self.room = room

    def _check(self, wanted: tuple[int, int, int, int]) -> None:
        """Raise ``RuntimeError`` where a context is not what was asked for: its settings lie elsewhere, then."""
        llama = self.llama
        found = (
            llama.llama_n_ctx(self.context),
            llama.llama_n_batch(self.context),
            llama.llama_n_ubatch(self.context),
            llama.llama_n_seq_max(self.context),
        )
        if found != wanted:
            raise RuntimeError(
                f"expected a context of {wanted} (tokens, batch, chunk, sequences), found {found}: this release of "
                "xllamacpp has other settings; run: pip install xllamacpp==2026.10.11549"
            )
