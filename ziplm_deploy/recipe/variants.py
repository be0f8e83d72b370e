"""The files of a member: what was done to each, how it is called and what it is made from."""

from __future__ import annotations

from enum import Enum


class Variant(str, Enum):
    """One form of a member's model: as exported, with zeros in its weights, in 8-bit integers, or both.

    Where llama.cpp serves, members are exported as GGUF, with weights of the type that ``export.gguf`` names.
    """

    FP32 = "fp32"
    GGUF = "gguf"
    INT8 = "int8"
    SPARSE = "sparse"
    SPARSE_INT8 = "sparse-int8"

    __hash__ = str.__hash__  # equal to its name, so it must be found under it
    __str__ = str.__str__

    @property
    def file_name(self) -> str:
        """Name of the file in the member's folder: ``model.onnx``, ``model_int8.onnx`` …, or ``model.gguf``."""
        if self.is_exported:
            return "model.onnx" if self is Variant.FP32 else "model.gguf"
        return f"model_{self.value.replace('-', '_')}.onnx"

    @property
    def accuracy_file(self) -> str:
        """Name of the file with its scores: ``accuracy.json``, ``accuracy_int8.json``, ``accuracy_gguf.json`` …"""
        return "accuracy.json" if self is Variant.FP32 else f"accuracy_{self.value.replace('-', '_')}.json"

    @property
    def outcomes_file(self) -> str:
        """Name of the file with what these scores were computed from, example by example: ``outcomes.json`` …"""
        return self.accuracy_file.replace("accuracy", "outcomes")

    @property
    def is_exported(self) -> bool:
        """Whether it is a member's model as exported, with nothing done to it after that."""
        return self in (Variant.FP32, Variant.GGUF)

    @property
    def is_sparse(self) -> bool:
        return self in (Variant.SPARSE, Variant.SPARSE_INT8)

    @property
    def is_int8(self) -> bool:
        return self in (Variant.INT8, Variant.SPARSE_INT8)

    @property
    def made_from(self) -> tuple[Variant, ...]:
        """Variants that this one adds one thing to; it must be faster than each of them to be worth anything."""
        if self.is_exported:
            return ()
        both = self is Variant.SPARSE_INT8
        return (Variant.FP32, Variant.SPARSE, Variant.INT8) if both else (Variant.FP32,)


def member_name(target: float) -> str:
    """Name of the member of a target: ``1.5x``."""
    return f"{target:g}x"


def file_label(member: str, variant: Variant) -> str:
    """Name of a file in benchmarks and tables: ``2x``, ``2x int8`` …"""
    return member if variant.is_exported else f"{member} {variant}"
