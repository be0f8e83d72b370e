"""Tiny random models of every supported architecture, and inputs for them; no downloads."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ziplm_deploy.models.adapted import adapted, model_class
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import PrunableModule, output_linear, prunable_modules

# Rotary positions; some are in transformers 5 only. The last three differ by little: test_modern_encoders.py has them.
MODERN_TYPES = ("modernbert", "eurobert", "nomic_bert", "gte", "jina_embeddings_v3")
HERE = tuple(name for name in MODERN_TYPES if name in transformers.CONFIG_MAPPING)
with warnings.catch_warnings():  # transformers 4 starts torch's compiler there, which warns about itself
    warnings.simplefilter("ignore")
    importlib.import_module("transformers.models.modernbert.modeling_modernbert")
IMAGE_TYPES = ("vit", "deit", "dinov2")
# Blocks of these are line by line those of another type: what is costly, and goes by blocks alone, leaves them out.
COPIES = ("camembert", "data2vec-text", "ernie", "deit")
TEXT_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "deberta-v2", "xlm-roberta-xl")
TEXT_TYPES += (*HERE[:2], *COPIES[:3])
MODEL_TYPES = (*TEXT_TYPES, *IMAGE_TYPES)
LIKE_ROBERTA = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text")
BLOCK_TYPES = tuple(name for name in MODEL_TYPES if name not in COPIES)
# Fused query, key and value, and a fused gate; a gate of its own. Others have six.
LINEARS_A_LAYER = {"modernbert": 4, "nomic_bert": 7, "gte": 7, "eurobert": 7}
AUTO_CLASSES = {
    "sentence-similarity": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "text-regression": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "token-classification": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
}
TEXT_TASKS = tuple(task for task in AUTO_CLASSES if task != "image-classification")
NUM_LABELS = {"text-classification": 3, "token-classification": 3, "image-classification": 3, "text-regression": 1}
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", ".", ",", "?", "who"],
]

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]


def tiny_config(model_type: str, **changes: Any) -> transformers.PretrainedConfig:
    """3 layers, hidden 32, 4 heads of 8, FFN 64; vocabulary 60 (images: 16 x 16, patches of 8)."""
    common: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    if model_type == "distilbert":
        common |= {"hidden_dim": 64}
    elif model_type == "dinov2":
        common |= {"mlp_ratio": 2, "layerscale_value": 0.7}
    elif model_type == "deit":
        common |= {"intermediate_size": 64, "architectures": ["DeiTForImageClassification"]}  # there are two
    else:
        common |= {"intermediate_size": 64}
    if model_type in IMAGE_TYPES:
        common |= {"image_size": 16, "patch_size": 8, "num_channels": 3}
    else:
        common |= {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
    if model_type in (*LIKE_ROBERTA, "mpnet"):
        common |= {"pad_token_id": 1}
    if model_type in LIKE_ROBERTA:
        common |= {"type_vocab_size": 1}
    if model_type == "ernie":
        common |= {"use_task_id": True}
    if model_type == "electra":
        common |= {"embedding_size": 16}
    if model_type == "deberta-v2":  # as DeBERTa-v3; sequences of 9 tokens reach buckets of several distances
        common |= {"position_biased_input": False, "type_vocab_size": 0, "norm_rel_ebd": "layer_norm"}
        common |= {"relative_attention": True, "position_buckets": 8, "share_att_key": True}
        common |= {"pos_att_type": ["p2c", "c2p"]}
    if model_type == "t5":  # heads wider than their share of the hidden size, buckets for up to 20 tokens
        common = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 16, "d_ff": 64, "vocab_size": 60}
        common |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0}
    if model_type == "modernbert":
        # Layer 0 is global, 1 is local, 2 is global; a token sees two on either side in the local one.
        common |= {"local_attention": 4, "global_attn_every_n_layers": 2}
    if model_type in ("modernbert", "eurobert"):  # by default beyond this vocabulary
        common |= {"bos_token_id": 2, "eos_token_id": 3}
    if model_type == "eurobert":
        common |= {"num_key_value_heads": changes.get("num_attention_heads", 4)}
    common |= {"attn_implementation": "eager"}
    config = transformers.AutoConfig.for_model(model_type, **{**common, **changes})
    config._attn_implementation = "eager"
    return config


def tiny_causal_config(model_type: str, **changes: Any) -> transformers.PretrainedConfig:
    """3 layers, hidden 32, 4 query heads, FFN 64, vocabulary 60, 40 positions; Llama's kinds have 2 cached heads."""
    hidden = changes.pop("hidden_size", 32)
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": 3, "num_attention_heads": 4}
    if model_type == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": 3, "n_head": 4, "n_positions": 40, "n_inner": 64}
    elif model_type == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": hidden, "max_position_embeddings": 40}
    else:
        sizes |= {"intermediate_size": 64, "max_position_embeddings": 40}
    if model_type in ("llama", "mistral", "qwen2", "qwen3"):
        sizes |= {"num_key_value_heads": 2}
    if model_type == "mistral":
        sizes |= {"sliding_window": 5}
    if model_type == "qwen3":
        sizes |= {"head_dim": 16}  # not hidden_size / num_attention_heads
    if model_type == "gpt_neox":
        sizes |= {"rotary_pct": 0.5}
    ids = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **ids, **changes})
    config._attn_implementation = "eager"
    return config


def tiny_causal_model(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A random causal language model in eval mode, its linears those that everything here works on."""
    torch.manual_seed(seed)
    config = tiny_causal_config(model_type, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return adapted(shaken(model, seed))


def tiny_model(model_type: str, task: str | None = None, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model in eval mode. Weights, biases and norms are all far from their initial 0 and 1, so that a lost
    bias or a swapped LayerNorm shows. ``task`` defaults to sentence-similarity, image-classification for images."""
    return adapted(plain_model(model_type, task, seed=seed, **changes))


def plain_model(model_type: str, task: str | None = None, *, seed: int = 0, **changes: Any) -> nn.Module:
    """The model of :func:`tiny_model` as transformers builds it, with layer scales."""
    task = task or default_task(model_type)
    if "num_labels" not in changes and task in NUM_LABELS:
        changes["num_labels"] = NUM_LABELS[task]
    config = tiny_config(model_type, **changes)
    own_class = model_class(config, AUTO_CLASSES[task])
    torch.manual_seed(seed)
    takes_pooler = AUTO_CLASSES[task] == "AutoModel" and "add_pooling_layer" in inspect.signature(own_class).parameters
    model: nn.Module = own_class(config, **({"add_pooling_layer": False} if takes_pooler else {}))
    return shaken(model, seed)


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A model in eval mode with noise in every parameter: initial biases of 0 and norms of 1 would hide faults."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.1))
    return model.eval()


def default_task(model_type: str, of_texts: str = "sentence-similarity") -> str:
    """A task that models of this type can do: one of texts, or of images."""
    return "image-classification" if model_type in IMAGE_TYPES else of_texts


def tiny_inputs(model: nn.Module, batch_size: int = 2, seq_len: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs with padding in the last row (text), or random images."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if config.model_type in IMAGE_TYPES:
        size = (batch_size, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    # Ids from 5 on: no special tokens, so the models derive no positions from padding ids.
    input_ids = torch.randint(5, min(config.vocab_size, 19), (batch_size, seq_len), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, seq_len - seq_len // 3 :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def output_tensors(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of a model as a dictionary of tensors."""
    with torch.no_grad():
        outputs = model(**inputs)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def random_level(model: nn.Module, module: PrunableModule, size: int, seed: int = 0) -> LevelWeights:
    """A level with random kept structures, and weights and bias that differ from the dense ones."""
    generator = torch.Generator().manual_seed(seed + 17 * module.layer + len(module.kind))
    kept = torch.randperm(module.structures, generator=generator)[:size].sort().values
    linear = output_linear(model, module)
    weight = 0.3 * torch.randn(linear.out_features, size * module.group_size, generator=generator)
    bias = 0.3 * torch.randn(linear.out_features, generator=generator)
    return LevelWeights(kept=kept, weight=weight, bias=bias, relative_error=0.5)


def random_entries(model: nn.Module, sizes: dict[str, int], seed: int = 0) -> dict[str, LevelWeights]:
    """Random levels of the given sizes, for the named modules."""
    modules = {module.name: module for module in prunable_modules(model)}
    return {name: random_level(model, modules[name], size, seed) for name, size in sizes.items()}


def tiny_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """A BERT word-piece tokenizer over :data:`VOCABULARY`; its file is written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=40)


def save_dense(folder: Path, model_type: str = "bert", task: str = "sentence-similarity", **changes: Any) -> nn.Module:
    """Write a tiny model with tokenizer or image processor as a transformers checkpoint; returns the model."""
    model = plain_model(model_type, task, **changes)
    copy.deepcopy(model).save_pretrained(folder)  # type: ignore[operator]
    if model_type in IMAGE_TYPES:
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        tiny_tokenizer(folder).save_pretrained(folder)
    return model


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(2, 14))) for _ in range(count)]


def labelled_rows(name: str, count: int) -> list[dict[str, Any]]:
    """Normalized rows of a task, as load_rows and check_labels return them."""
    texts, pairs = sentences(count, 1), sentences(count, 2)
    generator = np.random.default_rng(3)
    if name in ("sentence-similarity", "text-regression"):
        scores = generator.uniform(0, 5, count).tolist()
        return [{"text": a, "text_pair": b, "label": c} for a, b, c in zip(texts, pairs, scores, strict=True)]
    if name == "text-classification":
        return [
            {"text": a, "text_pair": b, "label": int(c)}
            for a, b, c in zip(texts, pairs, generator.integers(0, 3, count), strict=True)
        ]
    if name == "question-answering":
        contexts = [" ".join(sentences(6, seed)) for seed in range(count)]
        return [{"question": "who sat ?", "context": c, "answers": [" ".join(c.split()[2:4])]} for c in contexts]
    if name == "token-classification":
        names = ["O", "B-ANIMAL", "I-ANIMAL"]
        return [
            {"words": text.split(), "label": generator.integers(0, 3, len(text.split())).tolist(), "label_names": names}
            for text in texts
        ]
    return [{"text": text} for text in texts]


def tiny_batches(model: nn.Module, n: int = 12) -> list[dict[str, Tensor]]:
    return [tiny_inputs(model, batch_size=8, seed=seed) for seed in range(n)]


def last_states(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    """Last hidden states [N, hidden] of real tokens."""
    rows = []
    with torch.no_grad():
        for batch in data:
            last = model.base_model(**batch).last_hidden_state  # type: ignore[operator, union-attr]
            rows.append(last[batch["attention_mask"] == 1] if "attention_mask" in batch else last.flatten(0, 1))
    return torch.cat(rows)
