"""The files of a member: how each variant is called, and where it lies."""

from __future__ import annotations

from ziplm_deploy.config import Variant

ONNX_FILES: dict[Variant, str] = {
    "fp32": "model.onnx",
    "int8": "model_int8.onnx",
    "sparse": "model_sparse.onnx",
    "sparse-int8": "model_sparse_int8.onnx",
}
ACCURACY_FILES: dict[Variant, str] = {
    variant: name.replace("model", "accuracy").replace(".onnx", ".json") for variant, name in ONNX_FILES.items()
}


def is_sparse(variant: Variant) -> bool:
    return variant.startswith("sparse")


def is_int8(variant: Variant) -> bool:
    return variant.endswith("int8")


def label(member: str, variant: Variant) -> str:
    """Name of a file in benchmarks and tables: ``2x``, ``2x int8`` …"""
    return member if variant == "fp32" else f"{member} {variant}"


def parents_of(variant: Variant) -> tuple[Variant, ...]:
    """What a variant adds one thing to; it must be faster than each of them to be worth anything."""
    parents: dict[Variant, tuple[Variant, ...]] = {"int8": ("fp32",), "sparse": ("fp32",)}
    return ("fp32", "sparse", "int8") if variant == "sparse-int8" else parents.get(variant, ())
