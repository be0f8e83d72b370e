"""One engine, one model, one process: milliseconds of prefills and of decode steps, as a line of JSON on stdout.

``python decoder_speed_runners.py ENGINE MODEL --prefill 128 --decode 24 --repeats 3``; stands alone, for engines have
environments of their own. Every engine gets one thread and the same token ids; a decode step feeds one token to a cache
that holds the prompt and what was decoded before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 49152  # ids are drawn below this


class OnnxRuntime:
    """A file of this project, its cache in place."""

    def __init__(self, model: str, room: int) -> None:
        import onnxruntime

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from ziplm_deploy.engines.worker.cache import CachedModel

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.model, self.version = CachedModel(session, 1, room), onnxruntime.__version__

    def start(self, ids: np.ndarray) -> None:
        """Prefill."""
        self.model.clear()
        self.model.call(ids, np.array([ids.shape[1]]))

    def step(self, token: np.ndarray) -> None:
        """Decode one token."""
        self.model.call(token, np.array([1]))


class Torch:
    """transformers in eager mode."""

    def __init__(self, model: str, room: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self.torch, self.version = torch, torch.__version__
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.past: Any = None

    def start(self, ids: np.ndarray) -> None:
        """Prefill, logits of the last token only."""
        self._call(ids, None)

    def step(self, token: np.ndarray) -> None:
        """Decode one token."""
        self._call(token, self.past)

    def _call(self, ids: np.ndarray, past: Any) -> None:
        with self.torch.inference_mode():
            answer = self.model(self.torch.from_numpy(ids), past_key_values=past, use_cache=True, logits_to_keep=1)
        self.past = answer.past_key_values


class CompiledTorch:
    """transformers compiled, as ``generate()`` has it: a cache of one length, shapes of two kinds of calls."""

    def __init__(self, model: str, room: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self.torch, self.version = torch, torch.__version__
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.call = torch.compile(self.model, dynamic=False)
        config = self.model.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=room)
        # Before the first call: else its tensors would be made while that is traced, and the next prefill traced anew.
        heads, width = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(1, heads, width, torch.float32, torch.device("cpu"))
        self.seen = 0

    def start(self, ids: np.ndarray) -> None:
        """Prefill, logits of the last token only."""
        self.cache.reset()
        self.seen = 0
        self.step(ids)

    def step(self, token: np.ndarray) -> None:
        """Decode."""
        places = self.torch.arange(self.seen, self.seen + token.shape[1])
        self.seen += token.shape[1]
        with self.torch.inference_mode():
            self.call(
                self.torch.from_numpy(token),
                past_key_values=self.cache,
                position_ids=places[None],
                use_cache=True,
                logits_to_keep=1,
            )


class OpenVino:
    """OpenVINO on optimum-intel's stateful export, in float32, called without a layer between."""

    def __init__(self, model: str, room: int) -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",  # 8 bits by default
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(f"{model}/openvino_model.xml", "CPU", settings)
        self.request, self.version = compiled.create_infer_request(), openvino.__version__
        self.inputs = {name for value in compiled.inputs for name in value.names}
        self.seen = 0

    def start(self, ids: np.ndarray) -> None:
        """Prefill."""
        self.request.reset_state()
        self.seen = 0
        self.step(ids)

    def step(self, token: np.ndarray) -> None:
        """Decode."""
        places = np.arange(self.seen, self.seen + token.shape[1])[None]
        self.seen += token.shape[1]
        mask = np.ones((1, self.seen), np.int64)
        given = {"input_ids": token, "attention_mask": mask, "position_ids": places, "beam_idx": np.zeros(1, np.int32)}
        self.request.infer({name: value for name, value in given.items() if name in self.inputs})


class Optimum:
    """Stock ORTModelForCausalLM of optimum-onnx on the file of its own export."""

    def __init__(self, model: str, room: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.torch, self.version = torch, onnxruntime.__version__
        self.model: Any = ORTModelForCausalLM.from_pretrained(model, session_options=options)
        self.past: Any = None
        self.seen = 0

    def start(self, ids: np.ndarray) -> None:
        """Prefill."""
        self.seen, self.past = 0, None
        self.step(ids)

    def step(self, token: np.ndarray) -> None:
        """Decode."""
        tokens, self.seen = self.torch.from_numpy(token), self.seen + token.shape[1]
        mask = self.torch.ones(1, self.seen, dtype=self.torch.int64)
        positions = self.torch.arange(self.seen - token.shape[1], self.seen)[None]
        answer = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=self.past, use_cache=True
        )
        self.past = answer.past_key_values


class Genai:
    """onnxruntime-genai on a folder with ``genai_config.json``."""

    def __init__(self, model: str, room: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(model)
        config.overlay(
            '{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1, "inter_op_num_threads": 1}}}}'
        )
        self.genai, self.model, self.room = genai, genai.Model(config), room
        self.version, self.generator = genai.__version__, None

    def start(self, ids: np.ndarray) -> None:
        """Prefill."""
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.room, do_sample=False)
        self.generator: Any = self.genai.Generator(self.model, parameters)
        self.generator.append_tokens(ids.astype(np.int32))

    def step(self, token: np.ndarray) -> None:
        """Decode one token."""
        self.generator.append_tokens(token.astype(np.int32))


ENGINES: dict[str, Callable[[str, int], Any]] = {
    "onnxruntime": OnnxRuntime,
    "torch": Torch,
    "torch-compiled": CompiledTorch,
    "openvino": OpenVino,
    "optimum": Optimum,
    "genai": Genai,
}


def timed(run: Callable[[], None]) -> float:
    """Milliseconds of one run."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def llama_cpp(model: str, prefill: int, decode: int, repeats: int) -> dict[str, Any]:
    """llama.cpp's own timings of whole requests: milliseconds a prompt, and a token after it on average."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    room = max(512, prefill + decode + 2)
    parameters.n_ctx, parameters.n_parallel, parameters.n_batch = room, 1, room
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.verbosity = 0
    # Not mapped from the file: in memory of the process, as other engines hold them, weights lie in huge pages.
    parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    server = xllamacpp.Server(parameters)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, prefill).tolist()
    # The first new token is part of its prompt's time, though it counts among those predicted.
    asked = {"prompt": ids, "n_predict": decode + 1, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    answers = [server.handle_completions(asked)["timings"] for _ in range(repeats + 1)][1:]
    version = getattr(xllamacpp, "__version__", "")
    return {
        "prefill_ms": [each["prompt_ms"] for each in answers],
        "decode_ms": [each["predicted_ms"] / (each["predicted_n"] - 1) for each in answers],
        "version": version,
        "huge_page_bytes": huge_page_bytes(),
    }


def measure(engine: str, model: str, prefill: int, decode: int, repeats: int) -> dict[str, Any]:
    """Prefills, and decode steps after each."""
    if engine == "llama.cpp":
        return llama_cpp(model, prefill, decode, repeats)
    runner = ENGINES[engine](model, prefill + decode + 2)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCABULARY, (1, prefill))
    tokens = [generator.integers(0, VOCABULARY, (1, 1)) for _ in range(decode)]
    runner.start(ids)
    runner.step(tokens[0])
    prefill_ms, decode_ms = [], []
    for _ in range(repeats):
        prefill_ms.append(timed(lambda: runner.start(ids)))
        decode_ms += [timed(lambda token=token: runner.step(token)) for token in tokens]  # type: ignore[misc]
    found = {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "version": runner.version}
    return {**found, "huge_page_bytes": huge_page_bytes()}  # while the model is there


def huge_page_bytes() -> int:
    """Bytes of this process that lie in huge pages."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("AnonHugePages"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=[*ENGINES, "llama.cpp", "bandwidth"])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print as they please
    found: dict[str, Any]
    if options.engine == "bandwidth":
        found = {"gigabytes_per_second": read_bandwidth()}
    else:
        found = measure(options.engine, options.model, options.prefill, options.decode, options.repeats)
    print(json.dumps(found), file=replies, flush=True)
    os._exit(0)  # some engines do not end their threads


def read_bandwidth(megabytes: int = 512, repeats: int = 8) -> float:
    """Gigabytes a second that one core reads, the best of several products of a matrix with a vector.

    BLAS takes its number of threads from the environment, before it is imported.
    """
    columns = 4096
    matrix = np.ones((megabytes * 2**20 // 4 // columns, columns), np.float32)
    vector = np.ones(columns, np.float32)
    matrix @ vector
    best = min(timed(lambda: matrix @ vector) for _ in range(repeats))  # type: ignore[arg-type, return-value]
    return matrix.nbytes / 1e6 / best


if __name__ == "__main__":
    main()
