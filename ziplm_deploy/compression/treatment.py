"""How the target's file is made, of any model: for a table's cells and for the closed loop.

Latency depends on how many weights are zero and on what computes in integers, not on which weights and scales. So zeros
are put at random places and scales come from random inputs: no data, no training, seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ziplm_deploy.compression.int8.embeddings import round_embeddings_of
from ziplm_deploy.compression.int8.quantize import linear_names, quantize
from ziplm_deploy.compression.int8.scales import default_reduce_range
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.weight_only import asked_bits, has_bits
from ziplm_deploy.compression.sparsity.masks import random_masks
from ziplm_deploy.engines import get_engine
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.models.deployed import Treatment
from ziplm_deploy.recipe import Int8Config, Recipe, Variant


def served_int8(recipe: Recipe) -> Int8Config:
    """INT8 settings as the engine can run them: DeepSparse's fast kernels take one weight scale for each tensor.

    ``fallback`` is ``weight-only-8``, or None for float32.
    """
    per_channel = recipe.compress.int8.per_channel and recipe.environment.engine != "deepsparse"
    fallback = "weight-only-8" if spares_weight_only(recipe) else None
    return recipe.compress.int8.model_copy(update={"per_channel": per_channel, "fallback": fallback})


def spares_weight_only(recipe: Recipe) -> bool:
    """Whether linears that INT8 hurts too much become weight-only 8-bit: as asked for, or where that pays."""
    return recipe.compress.int8.fallback == "weight-only-8" or (
        suits_weight_only(recipe) and has_bits(get_engine("onnxruntime").version(), 8)
    )


def suits_weight_only(recipe: Recipe) -> bool:
    """Whether weight-only 8-bit linears would be the default fallback in a release of ONNX Runtime that has them.

    In decode steps they read a quarter of what float32 linears read; in prefill they compute slower.
    """
    asks_nothing = recipe.compress.int8.fallback is None and not recipe.compress.int8.mixed
    decodes = asks_nothing and bool(recipe.environment.workload.decode)
    return decodes and recipe.compress.int8.has_weight_only_forms and recipe.export.cache_form != "portable"


def reduces_range(config: Int8Config) -> bool:
    """Whether weights get 7 bits: as asked for, or as this CPU needs it."""
    return default_reduce_range(machine_info()) if config.reduce_range is None else config.reduce_range


def target_treatment(recipe: Recipe) -> Treatment | None:
    """How a model becomes a file as fast as the target's variant; None for ``fp32``, which is the file as exported."""
    variant, sparsity, int8 = recipe.compress.target, recipe.compress.sparsity, served_int8(recipe)
    if variant is Variant.FP32:
        return None
    # What QAT learns are scales of static INT8: the same nodes.
    timed = int8.model_copy(update={"method": "static", "ranges": "minmax"} if int8.method != "dynamic" else {})
    words = []
    if variant.is_sparse:
        # All digits: this text is what keeps tables and stand-ins of different sparsities apart.
        words.append(f"{sparsity.sparsity} of the weights are zero, {sparsity.pattern}")
    if variant.is_int8:
        scales = "scale for each output" if timed.per_channel else "scale for each tensor"
        embeddings = ", 8-bit embeddings" if timed.embeddings else ""
        words.append(f"{timed.method} INT8, {7 if reduces_range(int8) else 8}-bit weights, {scales}{embeddings}")
        if timed.weight_only_4:
            words.append(f"4-bit weights of {', '.join(timed.weight_only_4)}")

    def prepare(model: nn.Module) -> nn.Module:
        if variant.is_sparse:
            random_masks(model, sparsity, recipe.seed)
        return model

    def finish(path: Path, inputs: Mapping[str, Tensor]) -> None:
        if not variant.is_int8:
            return
        names = linear_names(path)
        if names:
            batch = {name: value.numpy() for name, value in inputs.items()}
            quantize(
                path,
                path,
                Int8Settings(timed, recipe.environment.engine, reduces_range(int8)),
                batches=[] if timed.method == "dynamic" else [batch],
                weight_only=asked_bits(names, timed.weight_only_4),
            )
        elif timed.embeddings:
            round_embeddings_of(path)

    return Treatment(variant, prepare, finish, "; ".join(words))
