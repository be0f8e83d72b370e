"""llama.cpp on the CPU, from the wheel ``xllamacpp``: GGUF files of causal language models, and no ONNX files.

Calls are timed in its server, which is how it serves, and by its own clock: from the first token of a prompt that is no
longer cached until the next one is sampled. Each call has a slot of its own, where the cache of the run before is found
again. Logits of all tokens, which no server gives, come from the functions of ``llama.h`` that the wheel holds.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

from .facts import EngineFacts
from .inputs import make_ids
from .llama_h import Functions, LogitsOfTokens

FACTS = EngineFacts("xllamacpp", install='pip install "ziplm-deploy[llamacpp]"', imports=("xllamacpp",))
PAGE = 256  # tokens: llama.cpp rounds the room of a slot up to this


class Sessions:
    """Models of one process with the same options."""

    def __init__(self, options: argparse.Namespace) -> None:
        import xllamacpp
        import xllamacpp.xllamacpp

        self.version: str = importlib.metadata.version("xllamacpp")
        self.functions = Functions(xllamacpp.xllamacpp.__file__)
        self.threads = options.threads

    def load(self, path: str) -> LlamaCppSession:
        """The model of a GGUF file, read when it is first asked; raises ``ValueError`` for any other file."""
        with open(path, "rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"expected a GGUF file, found {path}; llama.cpp runs no ONNX files: export.gguf")
        return LlamaCppSession(path, self.threads, self.functions)


class LlamaCppSession:
    """A GGUF file behind the methods of an ONNX Runtime session that this folder uses."""

    def __init__(self, path: str, threads: int, functions: Functions) -> None:
        self.path, self.threads = path, threads
        self.logits = LogitsOfTokens(functions, path, threads)

    def get_inputs(self) -> list[argparse.Namespace]:
        """Token ids and their mask."""
        names = ("input_ids", "attention_mask")
        return [argparse.Namespace(name=name, type="tensor(int64)", shape=["batch", "tokens"]) for name in names]

    def get_outputs(self) -> list[argparse.Namespace]:
        """Logits of every token."""
        return [argparse.Namespace(name="logits", type="tensor(float)", shape=["batch", "tokens", "vocabulary"])]

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Logits ``[batch, tokens, vocabulary]`` of texts that are padded on the right; zeros where they are."""
        ids, counts = inputs["input_ids"], inputs["attention_mask"].sum(axis=1)
        rows = [self.logits.of(row[:count]) for row, count in zip(ids, counts)]  # noqa: B905 (Python 3.8)
        answer = np.zeros((*ids.shape, rows[0].shape[1]), np.float32)
        for place, row in enumerate(rows):
            answer[place, : len(row)] = row
        return [answer]

    def timed_calls(self, calls: list[tuple[int, int, int]]) -> list[Callable[[], float]]:
        """One run of every call (batch size, tokens, cached tokens), each of which returns its milliseconds."""
        if any(batch_size != 1 for batch_size, _, _ in calls):
            raise ValueError(f"expected calls of one request for llama.cpp, found {calls}; set batch_size: 1")
        start = functools.lru_cache(maxsize=None)(lambda: TimedServer(self.path, self.threads, calls))
        return [lambda slot=slot: start().run(slot) for slot in range(len(calls))]  # type: ignore[misc]


class TimedServer:
    """llama.cpp's server without its web side, a slot for every call."""

    def __init__(self, path: str, threads: int, calls: list[tuple[int, int, int]]) -> None:
        import xllamacpp

        self.calls = calls
        longest = max(tokens + cached for _, tokens, cached in calls)
        self.ids = make_ids(1, longest)[0].tolist()
        parameters = xllamacpp.CommonParams()
        parameters.model.path = path
        parameters.n_parallel = len(calls)
        parameters.n_ctx = len(calls) * PAGE * -(-(longest + 1) // PAGE)  # the sampled token needs room, too
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.verbosity = 0
        parameters.warmup = parameters.fit_params = False
        # Weights in memory of the process: huge pages are for that only, and it is how other engines hold them.
        parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        # A slot's cache stays where it is, and no copy of it is kept elsewhere.
        parameters.cache_idle_slots = False
        parameters.cache_ram_mib = parameters.n_ctx_checkpoints = 0
        try:
            self.server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise RuntimeError(f"expected a model that llama.cpp runs, found: {error}") from error
        for slot, (_, _, cached) in enumerate(calls):
            if cached:
                self._ask(slot, cached, reuse=False)

    def run(self, slot: int) -> float:
        """Milliseconds of a call by llama.cpp's clock, sampling of a token included.

        Raises:
            RuntimeError: not as many tokens were cached as the call has.
        """
        _, tokens, cached = self.calls[slot]
        timings = self._ask(slot, cached + tokens, reuse=cached > 0)
        found = (timings["prompt_n"], timings["cache_n"])
        if found != (tokens, cached):
            raise RuntimeError(f"expected ({tokens}, {cached}) tokens that are new and cached, found {found}")
        return float(timings["prompt_ms"])

    def _ask(self, slot: int, tokens: int, *, reuse: bool) -> Any:
        """Read a prompt and sample one token; returns the server's timings."""
        asked = {"prompt": self.ids[:tokens], "n_predict": 1, "temperature": 0.0, "id_slot": slot}
        answer = self.server.handle_completions({**asked, "cache_prompt": reuse})
        if "timings" not in answer:
            raise RuntimeError(f"expected llama.cpp to answer, found: {answer}")
        return answer["timings"]
