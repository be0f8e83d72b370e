"""The dimensions of a model, without torch: what tables are measured for and plans are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

ModuleKind = Literal["attention", "ffn"]
MODULE_KINDS: tuple[ModuleKind, ...] = ("attention", "ffn")  # of every layer, in the order of the model

# Far above every encoder; what a file says beyond them is damage, and building it would take all memory.
MAX_LAYERS = 1024
MAX_SIZE = 1 << 20
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]


class ModuleId(NamedTuple):
    """Layer and kind of a module that can be pruned; its text, ``0.ffn``, is the key of plans, databases and files."""

    layer: int
    kind: ModuleKind

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> ModuleId:
        """The module that a key names; raises ``ValueError`` for other text."""
        layer, _, found = name.partition(".")
        for kind in MODULE_KINDS:
            if found == kind and layer.isdecimal():
                return cls(int(layer), kind)
        raise ValueError(f"expected a module such as 0.attention or 0.ffn, found {name!r}; correct its name")


class ModelShape(BaseModel):
    """The dimensions that decide what a cell costs.

    Attention loses cached heads, each with all query heads that read it; an FFN loses columns.
    """

    model_type: str
    n_layers: int = Field(ge=1, le=MAX_LAYERS)
    hidden_size: Size
    n_heads: Size
    head_dim: Size
    intermediate_size: Size
    queries_per_head: Size = 1  # query heads that read one of the cached heads; `n_heads` counts the latter

    @model_serializer(mode="wrap")
    def _as_before_grouped_queries(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields, without one that files and content keys from before it was there do not have."""
        fields: dict[str, Any] = handler(self)
        return fields if self.queries_per_head > 1 else {k: v for k, v in fields.items() if k != "queries_per_head"}

    @property
    def full_sizes(self) -> dict[ModuleKind, int]:
        """Structures of a module of each kind before anything is removed."""
        return {"attention": self.n_heads, "ffn": self.intermediate_size}
