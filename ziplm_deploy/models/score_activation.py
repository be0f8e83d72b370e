"""What sentence-transformers' CrossEncoder puts over the score of a pair, as folders of every age say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ziplm_deploy.documents import shown
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.recipe.model import ScoreActivation

ENTRY, FIELD = "sentence_transformers", "activation_fn"  # in config.json, where releases from 4.0 on read it
_BEFORE_4 = "sbert_ce_default_activation_function"
_RISING: tuple[str, ...] = get_args(ScoreActivation)  # that leave the order of scores as it is


def read_score_activation(config: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> str | None:
    """Full name of the activation, ``torch.nn.modules.activation.Sigmoid``; None where nothing is said.

    The file's score is the logit, before the activation: rankings by both are the same.

    Args:
        config: fields of ``config.json``.
        settings: fields of ``config_sentence_transformers.json``, where releases from 5.4 on write it; first to count.

    Raises:
        UnsupportedModelError: an activation that changes the order of scores, or is no class of torch.
        CorruptArtifactError: it is no text.
    """
    entry = config.get(ENTRY)
    in_config = entry.get(FIELD) if isinstance(entry, Mapping) else None
    name = next((each for each in (settings.get(FIELD), in_config, config.get(_BEFORE_4)) if each is not None), None)
    if name is None:
        return None
    if not isinstance(name, str):
        raise CorruptArtifactError(f"expected the name of {FIELD} in {source}, found {shown(name)}; get the model anew")
    module, _, kind = name.rpartition(".")
    if not module.startswith("torch.nn") or kind not in _RISING:
        raise UnsupportedModelError(
            f"expected an {FIELD} of torch.nn among {', '.join(_RISING)}, which keep the order of scores, in {source}, "
            f"found {shown(name)}; choose another model, or name one in model.score_activation (text-regression)"
        )
    return name


def keep_score_activation(config: Any, activation: str | None, asked: ScoreActivation | None = None) -> None:
    """Write the activation, if any, into a model's configuration, where every CrossEncoder finds it in a member.

    ``activation``: full name, as the model's files have it; ``asked``: that which the recipe has in its place.
    """
    if asked is not None and (activation is None or not activation.endswith(f".{asked}")):
        activation = f"torch.nn.modules.{'linear' if asked == 'Identity' else 'activation'}.{asked}"
    if activation is not None:
        setattr(config, ENTRY, {**(getattr(config, ENTRY, None) or {}), FIELD: activation})
