"""What the dense other tower of a run's checkpoint embeds, in torch."""

from __future__ import annotations

import numpy as np

from exporters import max_tokens
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.embeddings import EmbeddingTask
from ziplm_deploy.tasks.search import Vectors


def embed_by(model: ModelConfig, rows: list[Row]) -> Vectors:
    """Embeddings ``[rows, size]`` by a dense model with its own settings; texts as long as it takes them.

    Raises:
        ZipLMError: what loading the model raises.
    """
    dense, processor = load_dense(model)
    task = get_task(model)
    assert isinstance(task, EmbeddingTask)  # a partner of an embedding model
    max_length = max_tokens(dense) if task.input_kind == "text" else 0
    found = task.embed(torch_function(task, dense), EvaluationSet(rows, processor, max_length))
    return np.asarray(found, dtype=np.float32)
