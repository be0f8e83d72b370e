"""The grid of a latency table: which cells and which whole models it holds, and what the models are called.

The same shape and settings give the same grid, so that tables of one shape are made of the same models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ziplm_deploy.models.levels import ffn_widths, head_counts
from ziplm_deploy.models.shape import ModelShape, ModuleId, ModuleKind
from ziplm_deploy.recipe import ProfileConfig

# Model ids beside those of cells and pruned samples: a stack without layers; embeddings and head; the float32 reference
# of speedups; the dense model treated as the cells, on their engine.
NO_LAYERS, BASE, DENSE, DENSE_AS_SERVED = "none", "base", "dense", "unpruned"
# Mean share of a module that is kept, in each of the whole models that show how far sums of cells are off.
WHOLE_SHARES = (0.55, 0.3, 0.16, 0.08)


def cell_id(kind: str, size: int) -> str:
    """Model id of a cell. One model serves both kinds of size 0: a stack of layers with both modules dropped."""
    return f"{kind} {size}" if size else "both dropped"


@dataclass(frozen=True)
class Grid:
    """Cells and whole models of a table of models of ``shape``, as ``profile`` asks for them.

    Attributes:
        structure_bytes: weights of one structure of each kind, where a stack is to be ``stack_bytes`` large.
        attention_has_ffn: whether a file's layers with attention have an FFN in any case, as llama.cpp's do.
    """

    shape: ModelShape
    profile: ProfileConfig
    structure_bytes: Mapping[ModuleKind, float] = field(default_factory=dict)
    stack_bytes: int = 0
    attention_has_ffn: bool = False

    @functools.cached_property
    def cell_sizes(self) -> dict[ModuleKind, list[int]]:
        """Sizes that a table holds for each kind, descending, full size and 0 included."""
        return {
            "attention": sorted(head_counts(self.shape.n_heads), reverse=True),
            "ffn": ffn_widths(self.shape.intermediate_size, self.profile.width_ratio, self.profile.width_align),
        }

    @functools.cached_property
    def cell_ids(self) -> dict[str, tuple[ModuleKind, int]]:
        """Model id of every cell's stack, with the module that its layers have left and that module's size."""
        cells = [(kind, size) for kind, sizes in self.cell_sizes.items() for size in sizes]
        # Attention comes first, so an FFN of size 0 is the model that attention of size 0 has brought.
        return {cell_id(kind, size): (kind, size) for kind, size in cells if (kind, size) != ("ffn", 0)}

    def beside(self, kind: ModuleKind, size: int) -> int:
        """Size of the other module in the layers of a cell's stack: 0, but the smallest FFN beside attention where
        layers have one in any case."""
        if kind == "ffn" or not size or not self.attention_has_ffn:
            return 0
        return min(width for width in self.cell_sizes["ffn"] if width)

    @functools.cached_property
    def pruned_samples(self) -> dict[str, dict[str, int]]:
        """Model id and sizes of every pruned whole model, from the largest to the smallest.

        Uneven as pruned models are: u ** (1/share - 1) with u uniform in [0, 1] is the share of a module that is kept,
        most of them near 0 if the mean share is small.
        """
        names = [(layer, kind) for layer in range(self.shape.n_layers) for kind in self.cell_sizes]
        samples = {}
        for index, mean in enumerate(WHOLE_SHARES):
            u = (np.random.default_rng(index).permutation(len(names)) + 0.5) / len(names)
            kept = u ** (1 / mean - 1)  # [2 * layers]
            samples[f"whole {index}"] = {
                str(ModuleId(layer, kind)): _nearest(self.cell_sizes[kind], share)
                for (layer, kind), share in zip(names, kept, strict=True)
            }
        return samples

    @property
    def needed_ids(self) -> set[str]:
        """Models without which there is no table: references, dropped modules and full sizes."""
        attention, ffn = cell_id("attention", self.shape.n_heads), cell_id("ffn", self.shape.intermediate_size)
        beside = cell_id("ffn", self.beside("attention", self.shape.n_heads))
        return {NO_LAYERS, BASE, DENSE, DENSE_AS_SERVED, attention, ffn, beside, cell_id("ffn", 0)}

    @property
    def whole_ids(self) -> set[str]:
        """Models with all their layers. They get a process each, as where they serve: beside others in one process,
        medium sizes ran up to 5 % faster."""
        return {DENSE, DENSE_AS_SERVED, *self.pruned_samples}

    def depth(self, kind: ModuleKind, size: int) -> int:
        """Layers of a cell's stack: as many as it takes for its weights not to stay in a cache between two runs, where
        a call reads little else, but not more than the model has."""
        least, most = self.profile.stack_depth, max(self.profile.stack_depth, self.shape.n_layers)
        if not self.stack_bytes:
            return least
        layer_bytes = self.structure_bytes[kind] * size
        return min(max(least, math.ceil(self.stack_bytes / layer_bytes)), most) if layer_bytes else most

    @property
    def largest_depth(self) -> int:
        """Layers of the deepest stack."""
        return max(self.depth(kind, size) for kind, size in self.cell_ids.values())

    def multiplicity(self, model_id: str) -> float:
        """How often the layers of a model fit into the whole one: an error in its latency counts that often."""
        if model_id in {BASE, *self.whole_ids}:
            return 1.0
        return self.shape.n_layers / self.depth(*self.cell_ids.get(model_id, ("attention", 0)))


def _nearest(sizes: list[int], share: float) -> int:
    return min(sizes, key=lambda size: abs(size - share * max(sizes)))
