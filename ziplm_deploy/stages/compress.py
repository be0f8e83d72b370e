"""The further files of every member and of the dense model: zeros in their weights, 8-bit integers."""

from __future__ import annotations

from ziplm_deploy.machine import distributed
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.quantize import quantize_file
from ziplm_deploy.stages.sparsify import publish_sparse, sparsify_member
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import try_files


def compress(run: Run) -> None:
    """Every variant that the recipe asks for; files of no other variant stay."""
    for member in run.members:
        remove_unlisted(run, member)
        compress_member(run, member)
    try_files(run)


def compress_member(run: Run, member: Member) -> None:
    """Every variant of one member, or of the dense model."""
    variants = run.recipe.compress.variants
    if any(variant.is_sparse for variant in variants):
        sparsify_member(run, member)
    if Variant.SPARSE in variants:
        publish_sparse(run, member)
    for variant in variants:
        if variant.is_int8:
            quantize_file(run, member.file(variant))


def remove_unlisted(run: Run, member: Member) -> None:
    """Delete files of variants that the recipe no longer asks for."""
    if not distributed.is_first():
        return
    beside = {Variant.GGUF} if run.recipe.export.gguf is not None else set()  # of any engine's members
    for variant in set(Variant) - {*run.recipe.variants, *beside}:
        file = member.file(variant)
        file.path.unlink(missing_ok=True)
        file.scores.unlink(missing_ok=True)
        file.outcomes.unlink(missing_ok=True)


STAGE = Stage(
    "compress",
    lambda run: f"{', '.join(run.recipe.compress.variants)} of every member",
    compress,
    shown=lambda recipe: bool(recipe.compress.variants),
)
