"""ONNX files as functions from named inputs to named outputs, for answers and not for timings."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporters.decoder_logits import with_all_logits
from exporters.files import temporary_name
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.engines.session import answers_of, cpu_session, refuse_if_too_old
from ziplm_deploy.engines.worker.cache import CachedModel, is_causal
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.recipe import Environment
from ziplm_deploy.tasks import ModelFunction
from ziplm_deploy.tasks.batching import fitted


def onnx_runner(path: Path) -> ModelFunction:
    """A file as a function, run by ONNX Runtime in this process; see :func:`fitted` for its inputs.

    Raises:
        EngineError: ONNX Runtime rejects the file.
    """
    session = cpu_session(path)
    if is_causal(session):
        refuse_if_too_old(session)
        del session  # its weights: another one is made of the file
        return _causal_runner(path)
    wanted = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return answers_of(session, names, fitted(inputs, wanted), path)

    return run


def _causal_runner(path: Path) -> ModelFunction:
    """A causal language model's file as a function that starts with no cache and answers for all tokens."""
    graph = with_all_logits(path)
    outside = any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.graph.initializer)
    if outside:  # weights are looked for beside the graph
        beside = temporary_name(path)
        try:
            beside.write_bytes(graph.SerializeToString())
            session = cpu_session(beside)
        finally:
            beside.unlink(missing_ok=True)
    else:
        session = cpu_session(graph.SerializeToString())

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        model = CachedModel(session, len(ids), ids.shape[1])
        return {"logits": model.call(ids, mask.sum(axis=1))}

    return run


@contextlib.contextmanager
def open_runner(environment: Environment, path: Path) -> Iterator[ModelFunction]:
    """A file as a function, run by the engine that will serve it; ONNX Runtime needs no process of its own for that.

    Raises:
        EngineError: the engine is missing, or rejects the file.
    """
    if environment.engine == "onnxruntime":
        yield onnx_runner(path)
        return
    options = replace(WorkerOptions.from_environment(environment), threads=usable_cores())  # answers, not timings
    with get_engine(environment.engine).start_worker(options) as worker:
        wanted = {entry.name for entry in worker.load("model", path).inputs}

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            chosen = fitted(inputs, wanted)
            if missing := wanted - chosen.keys():  # an engine may compute with anything in their place
                raise EngineError(
                    f"expected inputs {', '.join(sorted(wanted))} for {path}, found no {', '.join(sorted(missing))}; "
                    "give them all, or export the file again"
                )
            answers = worker.infer("model", chosen)
            _check_rows(answers, inputs, f"{environment.engine} for {path}")
            return answers

        yield run


def _check_rows(answers: dict[str, np.ndarray], inputs: dict[str, np.ndarray], source: str) -> None:
    """Refuse answers of another number of rows than was asked."""
    asked = len(next(iter(inputs.values())))
    for name, found in answers.items():
        if len(found) != asked:
            raise EngineError(
                f"expected {asked} rows of {name} from {source}, found {len(found)}: the engine computes this graph "
                "wrong; choose another one, or leave it out of benchmark.baselines"
            )


@contextlib.contextmanager
def open_when_asked(environment: Environment, path: Path) -> Iterator[ModelFunction]:
    """A file as by :func:`open_runner`, opened with its first call: nothing is loaded for answers that nobody needs."""
    with contextlib.ExitStack() as opened:

        @functools.cache
        def runner() -> ModelFunction:
            return opened.enter_context(open_runner(environment, path))

        opened.callback(runner.cache_clear)  # who keeps the function does not keep the file's session
        yield lambda inputs: runner()(inputs)
