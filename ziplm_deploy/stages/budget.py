"""The accuracy budget of an INT8 file: one half of the evaluation examples chooses, the other is left for the report.

What is chosen by its score has a score that is too good by what luck gave it. So candidates are compared on one half
alone, however many there are; the report tells on the half that no choice has looked at whether the budget is held.
"""

from __future__ import annotations

from pathlib import Path

from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.recipe import EngineName, Variant
from ziplm_deploy.run.run import Run
from ziplm_deploy.tasks.metrics import score
from ziplm_deploy.tasks.outcomes import Outcomes, halves


class BudgetJudge:
    """Scores of one member's INT8 candidates beside the file that they are made from.

    Args:
        reference: the float32 file. ONNX Runtime scores it: its answers are those of all engines, but not all can run
            it.
        engine: scores the candidates.
    """

    def __init__(self, run: Run, variant: Variant, engine: EngineName, reference: Path) -> None:
        self._run, self._variant, self._engine = run, variant, engine
        self._metric = run.task.metrics[run.task.metric_name]
        self._reference = run.answers.ask(reference, Variant.FP32, "onnxruntime")
        self._candidates: set[str] = set()  # their hashes
        choosing, others = halves(len(self._reference), run.recipe.seed)
        self._choosing = choosing if len(choosing) else others  # a single example has no halves
        rows = run.data.evaluation_rows
        # Windows of text have an outcome each, and take long: of candidates only those that choose are looked at.
        self._half = [rows[index] for index in self._choosing] if run.task.is_causal else None

    @property
    def n_choosing(self) -> int:
        """Examples that candidates are compared on."""
        return len(self._choosing)

    @property
    def reference_score(self) -> float:
        """Score before INT8 on the examples that choose."""
        return self._score(self._reference)

    @property
    def whole_reference_score(self) -> float:
        """Score before INT8 on all examples."""
        return score(self._metric, self._reference)

    def score(self, path: Path) -> float:
        """Score of a candidate on the examples that choose."""
        if self._half is None:
            self._candidates.add(file_hash(path))
            return self._score(self._outcomes(path))
        environment = self._run.recipe.environment.model_copy(update={"engine": self._engine})
        with open_runner(environment, path) as runner:
            data = self._run.data.evaluation_set(self._variant).with_rows(self._half)
            return score(self._metric, self._run.task.outcomes(runner, data))

    def forget_others(self, path: Path) -> None:
        """Forget what candidates answered, but for the chosen one, whose answers are evaluated later."""
        for content in self._candidates - {file_hash(path)}:
            self._run.answers.forget(content)

    def whole_score(self, path: Path) -> float:
        """Score of the chosen file on all examples."""
        return score(self._metric, self._outcomes(path))

    def _outcomes(self, path: Path) -> Outcomes:
        return self._run.answers.ask(path, self._variant, self._engine)

    def _score(self, outcomes: Outcomes) -> float:
        return score(self._metric, outcomes.take(self._choosing))
