"""Data, tokenization, metric and search loss of every task."""

from __future__ import annotations

from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.tasks.answering import QuestionAnswering
from ziplm_deploy.tasks.base import Task, torch_function
from ziplm_deploy.tasks.classification import TextClassification
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.generation import TextGeneration
from ziplm_deploy.tasks.image_features import ImageFeatureExtraction
from ziplm_deploy.tasks.images import ImageClassification
from ziplm_deploy.tasks.masking import FillMask
from ziplm_deploy.tasks.multilabel import MultiLabelClassification
from ziplm_deploy.tasks.regression import TextRegression
from ziplm_deploy.tasks.reranking import Reranking
from ziplm_deploy.tasks.similarity import SentenceSimilarity
from ziplm_deploy.tasks.tokens import TokenClassification

__all__ = ["TASKS", "EvaluationSet", "ModelFunction", "Task", "get_task", "torch_function"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        SentenceSimilarity,
        TextClassification,
        MultiLabelClassification,
        TextRegression,
        Reranking,
        QuestionAnswering,
        TokenClassification,
        FillMask,
        TextGeneration,
        ImageClassification,
        ImageFeatureExtraction,
    )
}


def get_task(model: ModelConfig | str) -> Task:
    """The task of a model; a plain name takes the model settings' defaults (mean pooling, normalized).

    Raises:
        RecipeError: no such task; lists those there are.
    """
    name = model if isinstance(model, str) else model.task
    if name not in TASKS:
        raise RecipeError(f"expected a task of {', '.join(TASKS)}, found {name!r}; correct model.task")
    config = ModelConfig.model_validate({"path": "", "task": name}) if isinstance(model, str) else model
    return TASKS[name](config)
