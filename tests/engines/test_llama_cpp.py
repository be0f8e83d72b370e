"""llama.cpp as an engine: logits of all tokens, calls after a cache, and files, libraries and calls that it refuses."""

from __future__ import annotations

import argparse
import ctypes.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters import GgufSettings, export_gguf
from tests.helpers.gguf_models import byte_level_tokenizer, log_probabilities, parts_of, tiny_llama
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.engines.worker import llama_h
from ziplm_deploy.engines.worker.llama_h import Functions
from ziplm_deploy.engines.worker.llamacpp_session import LlamaCppSession, Sessions, TimedServer
from ziplm_deploy.errors import EngineError

pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")

PARTS = parts_of(tiny_llama(max_position_embeddings=600))
CALLS = [(1, 9, 0), (1, 1, 9), (1, 1, 14)]
TEXT = np.random.default_rng(0).integers(4, 130, 530)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llamacpp") / "model.gguf"
    export_gguf(PARTS, path, byte_level_tokenizer(), GgufSettings("tiny"))
    return path


@pytest.fixture(scope="module")
def session(path: Path) -> LlamaCppSession:
    return Sessions(argparse.Namespace(threads=1)).load(str(path))


def logits_of(session: LlamaCppSession, *texts: np.ndarray) -> np.ndarray:
    longest = max(map(len, texts))
    ids, mask = (np.zeros((len(texts), longest), np.int64) for _ in range(2))
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


@pytest.mark.parametrize("place", [0, 3, 12])
def test_logits_of_any_token_are_those_of_torch(session: LlamaCppSession, place: int) -> None:
    logits = logits_of(session, TEXT[:13])[0, place].astype(np.float64)
    found = logits - np.log(np.exp(logits).sum())
    expected = log_probabilities(PARTS, TEXT[: place + 1].tolist()).numpy()
    assert np.abs(found - expected).max() < 5e-3  # activations in float16


def test_texts_of_a_batch_are_alone(session: LlamaCppSession) -> None:
    both = logits_of(session, TEXT[:13], TEXT[20:25])
    np.testing.assert_array_equal(both[1, :5], logits_of(session, TEXT[20:25])[0])
    assert not both[1, 5:].any()


def test_long_texts_are_read_in_chunks(session: LlamaCppSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk sees the first; and a text is as it was after a longer one."""
    short = logits_of(session, TEXT[:13])
    long = logits_of(session, TEXT)
    assert long.shape[1] == len(TEXT) > llama_h.CHUNK
    moved = logits_of(session, np.concatenate([TEXT[1:2], TEXT[1:]]))
    assert np.abs(long[0, -1] - moved[0, -1]).max() > 1e-6
    np.testing.assert_array_equal(logits_of(session, TEXT[:13]), short)


def test_calls_are_timed_in_any_order(path: Path) -> None:
    server = TimedServer(str(path), 1, CALLS)
    assert all(server.run(slot) > 0 for slot in (2, 0, 1, 1, 0, 2))


def test_a_call_that_does_not_find_its_cache_is_no_timing(path: Path) -> None:
    server = TimedServer(str(path), 1, CALLS)
    server.calls = [(1, 9, 3), *CALLS[1:]]
    with pytest.raises(RuntimeError, match=r"expected \(9, 3\) tokens that are new and cached, found \(12, 0\)"):
        server.run(0)


def test_in_a_worker(path: Path) -> None:
    options = WorkerOptions(seq_len=15, calls=tuple(CALLS))
    with get_engine("llamacpp").start_worker(options) as worker:
        signature = worker.load("m", path)
        assert [entry.name for entry in signature.inputs] == ["input_ids", "attention_mask"]
        assert all(len(worker.time("m", n=2, call=call)) == 2 for call in range(3))
        inputs = {"input_ids": TEXT[None, :5], "attention_mask": np.ones((1, 5), np.int64)}
        assert worker.infer("m", inputs)["logits"].shape == (1, 5, len(PARTS.embedding))
        worker.unload("m")
        onnx = path.with_name("model.onnx")
        onnx.write_bytes(b"no GGUF")
        with pytest.raises(EngineError, match="expected a GGUF file"):
            worker.load("m", onnx)


def test_damaged_files_are_refused(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(path.read_bytes()[:2000])
    session = Sessions(argparse.Namespace(threads=1)).load(str(damaged))
    with pytest.raises(RuntimeError, match=r"expected a model that llama\.cpp runs"):
        logits_of(session, TEXT[:3])
    with pytest.raises(RuntimeError, match=r"expected a model that llama\.cpp runs"):
        session.timed_calls(CALLS)[0]()


def test_batches_are_refused(session: LlamaCppSession) -> None:
    with pytest.raises(ValueError, match="batch_size: 1"):
        session.timed_calls([(2, 9, 0)])


def test_a_library_without_the_functions_is_refused() -> None:
    library = ctypes.util.find_library("c")
    assert library is not None
    with pytest.raises(RuntimeError, match=r"exports the functions of llama\.h, found none of llama_backend_init"):
        Functions(library)


def test_a_context_with_other_settings_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Sessions(argparse.Namespace(threads=1)).load(str(path))
    functions: Any = session.logits.llama
    monkeypatch.setattr(functions, "llama_n_ubatch", lambda context: 7)
    with pytest.raises(RuntimeError, match=r"found \(512, 512, 7, 1\): this release of xllamacpp has other settings"):
        logits_of(session, TEXT[:3])
