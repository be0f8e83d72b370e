"""The model that a recipe's members learn from, and whether it fits them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ziplm_deploy.errors import RecipeError, UsageError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.models.sentence_dense import embedding_size
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.recipe import Recipe, RecoverConfig


def load_teacher(recipe: Recipe, dense: nn.Module, processor: Any) -> nn.Module:
    """The recipe's teacher; the dense model by default.

    Raises:
        UsageError: its vocabulary is another one than that of ``processor``, or its embeddings are made otherwise.
    """
    path = recipe.recover.teacher
    if path is None:
        return dense
    settings = recipe.model.model_copy(update={"path": path, "revision": None})
    try:
        model, own = load_dense(settings)
    except RecipeError as error:
        raise UsageError(
            f"expected a teacher that makes embeddings as {recipe.model.path} does: {error}; or choose another "
            "recover.teacher"
        ) from error
    says = read_sentence_modules(settings)
    if says.source and (says.prompt or "") != (recipe.model.prompt or ""):
        raise UsageError(
            f"expected a teacher with the prompt {recipe.model.prompt!r} of the model, found {says.prompt!r} in "
            f"{path}; choose another recover.teacher, or set model.prompt"
        )
    if hasattr(own, "get_vocab") and own.get_vocab() != processor.get_vocab():
        raise UsageError(
            f"expected a teacher with the vocabulary of {recipe.model.path}, found another one in {path}: the "
            "same ids would mean other tokens; choose a teacher with the same tokenizer"
        )
    return model


def check_teacher(teacher: nn.Module, dense: nn.Module, config: RecoverConfig, seq_len: int) -> None:
    """Raise :class:`UsageError` unless the teacher's hidden states and outputs can be compared with the student's."""
    own, other = model_shape(dense.config), model_shape(teacher.config)  # type: ignore[arg-type]
    found = {"hidden_size": (own.hidden_size, other.hidden_size)}
    if config.token_weight:
        found["layers"] = (own.n_layers, other.n_layers)
    if config.logit_weight:
        found["num_labels"] = (getattr(dense.config, "num_labels", 0), getattr(teacher.config, "num_labels", 0))
        found["embedding size"] = (embedding_size(dense), embedding_size(teacher))
    for name, (wanted, has) in found.items():
        if wanted != has:
            raise UsageError(
                f"expected a teacher with {name} {wanted} as the model, found {has}; choose another recover.teacher"
                + (", or set recover.token_weight: 0" if name == "layers" else "")
            )
    positions = getattr(teacher.config, "max_position_embeddings", seq_len)
    if positions < min(seq_len, getattr(dense.config, "max_position_embeddings", seq_len)):
        raise UsageError(
            f"expected a teacher that takes {seq_len} tokens, found one for {positions}; choose another "
            "recover.teacher, or a smaller environment.workload.seq_len (text-generation: data.context)"
        )
    labels, others = _label_names(dense), _label_names(teacher)
    if config.logit_weight and labels and others and labels != others:
        raise UsageError(
            f"expected a teacher with the labels {', '.join(labels)} in this order, found {', '.join(others)}; choose "
            "another recover.teacher, or set recover.logit_weight: 0"
        )


def _label_names(model: nn.Module) -> list[str]:
    """What the outputs of a classifier mean, lower case; empty where its configuration only numbers them."""
    known: dict[int, str] = getattr(model.config, "id2label", None) or {}
    names = [str(known[index]).lower() for index in sorted(known)]
    return [] if any(name.startswith("label_") for name in names) else names
