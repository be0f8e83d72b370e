"""Prune in order: what a module keeps is decided on what the pruned layers before it give it.

Levels of the database are the best for the inputs that the *whole* model gives. Once a plan has fixed all sizes, each
module can be decided again, from the first layer to the last: moments of its inputs are taken from the model whose
earlier modules are pruned (and refitted), then the method chooses structures and weights for the one size that is
wanted, towards what the whole module makes of these inputs. Only this sees that an earlier module no longer
provides what a structure lives on; the refit alone corrects weights, and keeps the structures.

Hidden states are kept between layers. Each layer runs once whole, and for each of its two modules up to the output
linear: about two passes over the calibration data in all, not one for each module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import PrunableModule, prunable_modules
from ziplm_deploy.models.resizing import build_replacement, install, kept_structures, set_kept
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.layer_calls import LayerCall, input_moments
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.reconstruction import walk
from ziplm_deploy.tasks.batching import Batch

LevelOf = Callable[[PrunableModule, InputMoments], LevelWeights]


def prune_in_order(
    model: nn.Module,
    sizes: Mapping[str, int],
    batches: Sequence[Batch],
    level_of: LevelOf,
    *,
    refits: bool,
    progress: StepProgress | None = None,
) -> tuple[nn.Module, list[str]]:
    """A physically smaller copy of ``model``, decided module by module; and modules that could not be refitted.

    Args:
        model: dense, or resized before; not changed, and shares nothing with the result.
        sizes: structures to keep, of every module; one that keeps all it has is left as it is.
        batches: calibration inputs, kept in memory with the hidden states of all their tokens.
        level_of: the level of a whole module for these moments of its inputs.
        refits: whether each module is refitted as :func:`ziplm_deploy.pruning.reconstruction.reconstruct` does, before
            anything later is decided.
        progress: called with (modules done, modules in all).

    Raises:
        DataError: no calibration tokens.  NumericalError: NaN or infinite activations, or no damping helps; names the
            module.
    """
    pruned = copy.deepcopy(model)
    kept = dict(kept_structures(model))
    missing = [module.name for module in prunable_modules(model) if module.name not in sizes]
    if missing:
        raise ValueError(f"expected a size of every module, found none of {', '.join(missing)}")

    def shrink(module: PrunableModule, calls: list[LayerCall], hidden: list[Tensor]) -> None:
        if sizes[module.name] == module.structures:
            return
        entry = level_of(module, input_moments(pruned, module, calls, hidden))
        install(pruned, module.layer, build_replacement(pruned, module, entry))
        kept[module.name] = [kept[module.name][index] for index in entry.kept.tolist()]

    unsolved = walk(model, pruned, batches, shrink=shrink, refits=refits, progress=progress)
    set_kept(pruned, kept)
    return pruned, unsolved


def exchanged_fraction(model: nn.Module, pruned: nn.Module, levels: Mapping[str, LevelWeights]) -> float:
    """Fraction of the structures kept in shrunk modules of ``pruned`` that these levels of ``model`` would not keep."""
    before, after = kept_structures(model), kept_structures(pruned)
    exchanged = total = 0
    for name, level in levels.items():
        if len(after[name]) < len(before[name]):
            others = set(after[name]) - {before[name][index] for index in level.kept.tolist()}
            exchanged, total = exchanged + len(others), total + len(after[name])
    return exchanged / total if total else 0.0
