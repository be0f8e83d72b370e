"""Model types that have no entry, and why; and which native type stands for code that models bring along.

Each reason is what the classes of transformers show; ``tests/models/test_model_types.py`` names the line that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from ziplm_deploy.documents import shown

_LIKE = "its blocks could be pruned, but no entry says where they are yet: see the guide extending/architecture"
_ENCODER_DECODER = "an encoder-decoder: the cross-attention of its decoder reads the encoder's keys and values"
_EXPERTS = "its FFNs are experts that a router chooses from for every token, so that no column can be timed or left out"
_STATE_SPACE = "a state-space model: it mixes tokens by a scan and has no attention heads"
_HYBRID = "layers that mix tokens without attention heads stand between its attention layers"
_NORM_AFTER = "it normalizes what a block gives before that is added, so that a removed column changes all others"
_ALIBI = "ALiBi: its attention scores depend on which head it is"
_WINDOWS = "it attends in windows that shift, in stages of different widths"
_CONVOLUTIONS = "convolutions between or instead of its attention layers, in stages of different widths"
_AUDIO = "it reads audio, which no task here has"
_BOXES = "it reads more than text (boxes, pages, tables), which no task here has"
_TWO_INPUTS = "it reads images and text in one encoder, which no task here has"
_APPROXIMATE = "it approximates attention by code of its own, whose sizes do not follow from the heads"
_CHUNKS = "it attends in overlapping windows by chunked code of its own, with further projections for global tokens"
_BLOCK_SPARSE = "it attends to blocks of tokens, some at random, by code of its own that depends on the head"

# By reason, so that types of one kind are read together.
_REASONS: dict[str, tuple[str, ...]] = {
    _LIKE: (
        *("rembert", "roberta-prelayernorm", "megatron-bert", "roformer", "bert-generation", "splinter", "vit_msn"),
        *("dinov2_with_registers", "dpr"),
        *("gemma", "starcoder2", "stablelm", "phi", "cohere", "granite", "smollm3", "olmo", "gpt_neo", "codegen"),
        *("gptj", "openai-gpt", "ctrl", "xglm", "biogpt"),
    ),
    _CHUNKS: ("longformer",),
    f"{_CHUNKS}; {_ENCODER_DECODER}": ("led",),
    _BLOCK_SPARSE: ("big_bird", "bigbird_pegasus"),
    _APPROXIMATE: ("nystromformer", "mra", "yoso"),
    "it attends by hashing, in layers whose inputs are computed backwards from their outputs": ("reformer",),
    "it mixes tokens by a Fourier transform and has no attention": ("fnet",),
    "its layers share one set of weights: what leaves one leaves all": ("albert",),
    "it shortens the sequence between its blocks, whose layers may share weights, and attends by relative positions": (
        "funnel",
    ),
    "its projections are three-dimensional weights, no linears, and its attention scores have relative terms a head": (
        "xlnet",
    ),
    "its blocks are bottlenecks with several FFNs each": ("mobilebert",),
    "its linears are grouped convolutions: a row belongs to one group of columns": ("squeezebert",),
    "a share of its heads are convolutions whose kernels are computed from queries": ("convbert",),
    "it reads characters, and shortens and lengthens the sequence by convolutions": ("canine",),
    "it attends from a fixed set of vectors to its inputs, by cross-attention": ("perceiver",),
    "its scores have terms of content and relative position, by one linear for query, key and value": ("deberta",),
    "one linear computes query, key and value, another an FFN's columns and their gate: no entry says so": ("phi3",),
    "its linears are quantized by classes of their own": ("ibert",),
    "it reads proteins, which no task here has": ("esm",),
    "it reads entities beside words, with further queries for each pair of the two": ("luke",),
    "it stores attention, FFNs and norms in lists of their own, not by layers": ("xlm", "flaubert"),
    "every layer has an adapter a language": ("xmod",),
    _BOXES: ("layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "markuplm", "tapas"),
    _TWO_INPUTS: ("lxmert", "visual_bert", "vilt"),
    "two towers with a loss between them; inspect each by its own type, such as clip_text_model": ("clip", "siglip"),
    _STATE_SPACE: ("mamba", "mamba2", "falcon_mamba", "rwkv"),
    _HYBRID: ("jamba", "zamba", "bamba", "qwen3_next", "lfm2"),
    _EXPERTS: (
        *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "phimoe", "granitemoe", "llama4"),
        "switch_transformers",
    ),
    _NORM_AFTER: ("gemma2", "gemma3_text", "olmo2"),
    "all its query heads may read one cached head (multi-query), in projections of one linear": (
        "falcon",
        "gpt_bigcode",
    ),
    _ALIBI: ("bloom", "mpt"),
    _ENCODER_DECODER: ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot"),
    "its encoder could be pruned as that of t5, but no entry says so yet": ("mt5", "umt5"),
    f"it attends in windows; {_ENCODER_DECODER}": ("longt5",),
    f"{_AUDIO}, always as 1,500 frames of 30 s; {_ENCODER_DECODER}": ("whisper",),
    f"{_AUDIO}; {_ENCODER_DECODER}": ("speech_to_text",),
    _AUDIO: ("wav2vec2", "hubert", "wavlm"),
    _WINDOWS: ("swin", "swinv2"),
    "every layer adds a bias of relative positions, a head its own, to its attention scores": (
        "beit",
        "data2vec-vision",
    ),
    "rotary positions of patches and register tokens, which no entry describes": ("dinov3_vit",),
    "its decoder is of pre-training alone: save its encoder as a vit": ("vit_mae",),
    "it finds objects in images, which no task here does": ("yolos",),
    _CONVOLUTIONS: ("segformer", "levit", "cvt", "mobilevit"),
    "it has convolutions and no attention": ("convnext", "resnet"),
}
OTHERS: dict[str, str] = {name: reason for reason, names in _REASONS.items() for name in names}

# Parts of the names in `auto_map`, or of the model type beside it, and the type that transformers has for the model.
_NATIVE: dict[str, str | None] = {
    "nomic": "nomic_bert",
    "alibaba": "gte",
    "new-impl": "gte",
    "newmodel": "gte",
    "xlm-roberta-flash": "jina_embeddings_v3",
    "eurobert": "eurobert",
    "jina-bert": None,  # of model type bert, but with ALiBi and gated FFNs
}


def why_unsupported(model_type: Any) -> str:
    """A model type without an entry, and why it has none, in words."""
    found = f"model type {shown(model_type)}"
    if model_type in OTHERS:
        return f"{found}: {OTHERS[model_type]}"
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return f"{found}, which transformers {transformers.__version__} does not have"
    return f"{found}, whose blocks nobody has looked at yet"


def native_type(fields: Mapping[str, Any]) -> str | None:
    """Type that transformers has for a model with code of its own (``auto_map``); None if there is none.

    Args:
        fields: of its ``config.json``.
    """
    model_type = fields.get("model_type")
    text = f"{model_type} {fields.get('auto_map')}".lower()
    for part, native in _NATIVE.items():
        if part in text:
            return native
    return model_type if isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING else None
