"""How a model becomes INT8: what the recipe asks for, the engine that will run the file, and the bits of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ziplm_deploy.compression.int8.scales import weight_limit
from ziplm_deploy.recipe import EngineName, Int8Config


@dataclass(frozen=True)
class Int8Settings:
    """Settings that all files and all fake-quantized models of one form share."""

    config: Int8Config
    engine: EngineName  # decides which nodes are written; fake quantization is the same for all
    reduce_range: bool  # 7-bit weights, see `scales.default_reduce_range`

    @property
    def without_embeddings(self) -> Int8Settings:
        """These settings for files that have none."""
        return replace(self, config=self.config.model_copy(update={"embeddings": False}))

    @property
    def weight_limit(self) -> int:
        """Largest integer of a weight; the smallest is its negative."""
        return weight_limit(self.reduce_range)

    @property
    def weight_bits(self) -> int:
        """Bits that a weight uses."""
        return 7 if self.reduce_range else 8
