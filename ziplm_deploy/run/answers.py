"""What ONNX files answer on the evaluation examples, so that no file is asked twice in one process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.engines.runner import open_when_asked
from ziplm_deploy.recipe import EngineName, Environment, Variant
from ziplm_deploy.run.data import RunData
from ziplm_deploy.tasks import EvaluationSet, ModelFunction, Task
from ziplm_deploy.tasks.evaluation_set import Embeddings, cache_embeddings
from ziplm_deploy.tasks.outcomes import Outcomes

_Key = tuple[str, EngineName, int, int | None]  # the file's content, who answers, and how examples go through it


class Answers:
    """What one file answers; nothing is loaded for answers that nobody asks for."""

    def __init__(self, runner: ModelFunction, task: Task, data: EvaluationSet, known: Answers | None) -> None:
        self._embeddings: Embeddings = {} if known is None else known._embeddings
        self._task, self.data = task, data
        self.function = cache_embeddings(runner, self._embeddings)
        if known is not None:
            self.outcomes = known.outcomes

    @functools.cached_property
    def outcomes(self) -> Outcomes:
        """On all evaluation examples."""
        return self._task.outcomes(self.function, self.data)

    def beside(self, dense: Answers) -> tuple[Outcomes, dict[str, float]]:
        """Outcomes, and the task's fidelity to what the dense file answers."""
        asked = self.function, dense.function, self.data, dense.data
        if "outcomes" in self.__dict__:
            return self.outcomes, self._task.fidelity(*asked)
        self.outcomes, fidelity = self._task.outcomes_and_fidelity(*asked)
        return self.outcomes, fidelity


class KnownAnswers:
    """Answers of files by their content, kept until somebody takes them."""

    def __init__(self, environment: Environment, task: Task, data: RunData) -> None:
        self._environment, self._task, self._data = environment, task, data
        self._known: dict[_Key, Answers] = {}

    def ask(self, path: Path, variant: Variant, engine: EngineName) -> Outcomes:
        """Outcomes of a file of this form on all evaluation examples; they are known from here on.

        Raises:
            EngineError: the engine is missing, or rejects the file.
        """
        with self.take(path, variant, engine) as answers:
            outcomes = answers.outcomes
            self._known[self._key(path, variant, engine)] = answers
        return outcomes

    @contextlib.contextmanager
    def take(self, path: Path, variant: Variant, engine: EngineName) -> Iterator[Answers]:
        """Answers of a file, known or not. They are forgotten here: embeddings of many files would fill the memory."""
        known = self._known.pop(self._key(path, variant, engine), None)
        environment = self._environment.model_copy(update={"engine": engine})
        with open_when_asked(environment, path) as runner:
            yield Answers(runner, self._task, self._data.evaluation_set(variant), known)

    def forget(self, content: str) -> None:
        """Forget the answers of a file, given by its hash, that nobody will ask about again."""
        for key in [key for key in self._known if key[0] == content]:
            del self._known[key]

    def _key(self, path: Path, variant: Variant, engine: EngineName) -> _Key:
        data = self._data.evaluation_set(variant)
        return file_hash(path), engine, data.batch_size, data.pad_to
