"""Tiny random towers of CLIP and SigLIP, and whole models of two; no downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.helpers.models import shaken, tiny_inputs, tiny_tokenizer

COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
# The tokenizer's first word is below, [SEP] is 3: what ends a text.
TEXT = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
CLASSES = {
    "clip_text_model": "CLIPTextModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip_text_model": "SiglipTextModel",
    "siglip_vision_model": "SiglipVisionModel",
}
TOWER_TYPES = tuple(name for name in CLASSES if name in transformers.CONFIG_MAPPING)  # transformers 4 lacks one
PROJECTION = 24


def tower_config(model_type: str, **changes: Any) -> Any:
    """3 layers, hidden 32, 4 heads of 8, FFN 64; CLIP's projections are to 24."""
    sizes: dict[str, Any] = {**COMMON, **(TEXT if "text" in model_type else IMAGE)}
    if model_type.startswith("clip"):
        sizes["projection_dim"] = PROJECTION
    config = transformers.CONFIG_MAPPING[model_type](**{**sizes, **changes})
    config._attn_implementation, config.return_dict = "eager", True
    return config


def tower(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A random tower in eval mode, with norms and biases far from where they begin."""
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, CLASSES[model_type])(tower_config(model_type, **changes))
    return shaken(model, seed)


def tower_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Images, or texts of which each ends with the last token of its own and is padded on the right."""
    config: Any = model.config
    if hasattr(config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    inputs = tiny_inputs(model)
    inputs["input_ids"][0, -1] = inputs["input_ids"][1, 5] = 3
    if config.model_type == "siglip_text_model":  # it was trained without a mask
        del inputs["attention_mask"]
    return inputs


def save_whole(folder: Path, kind: str = "clip", **changes: Any) -> Any:
    """A checkpoint of both towers of CLIP or SigLIP, of other depths, with tokenizer and image processor."""
    settings: dict[str, Any] = {name: {**COMMON, **sizes, **changes} for name, sizes in _kinds().items()}
    if kind == "clip":
        settings = {name: {**sizes, "projection_dim": PROJECTION} for name, sizes in settings.items()}
        settings["projection_dim"] = PROJECTION
    config = transformers.CONFIG_MAPPING[kind](**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: Any = shaken({"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind](config), 0)
    model.save_pretrained(folder)
    tiny_tokenizer(folder / "words").save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def features(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Embeddings of a whole model by its own methods, of length 1: of images or of texts."""
    method = model.get_image_features if "pixel_values" in inputs else model.get_text_features
    with torch.no_grad():
        found = method(**inputs)
    vectors: torch.Tensor = getattr(found, "pooler_output", found)  # transformers 5 gives it with more beside
    return torch.nn.functional.normalize(vectors)


def _kinds() -> dict[str, dict[str, Any]]:
    return {"text_config": TEXT, "vision_config": {**IMAGE, "num_hidden_layers": 4}}
