"""What is said about kinds of models is true of the classes of transformers, and of what is supported here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.models import tiny_config
from ziplm_deploy.errors import UnsupportedModelError, UsageError
from ziplm_deploy.models.architectures import ARCHITECTURES, OTHERS, native_type, why_not
from ziplm_deploy.models.config_file import config_of
from ziplm_deploy.models.inspection import inspect_model, layer_rows, model_config
from ziplm_deploy.models.model_types import model_type_of, model_types

pytestmark = pytest.mark.transformers

# What in the code of transformers shows the reason why a model type has no entry.
EVIDENCE: dict[str, tuple[str, ...]] = {
    "albert_layer_groups": ("albert",),
    "class BambaMixer": ("bamba",),
    "encoder_attn": ("bart", "blenderbot", "m2m_100", "marian", "mbart", "pegasus", "speech_to_text", "whisper"),
    "relative_position_bias_table": ("beit", "data2vec-vision"),
    "class BigBirdBlockSparseAttention": ("big_bird",),
    "BlockSparseAttention": ("bigbird_pegasus",),
    "alibi": ("bloom", "mpt"),
    "attend_from_chunk_width": ("canine",),
    "text_model": ("clip", "siglip"),
    "SeparableConv1D": ("convbert",),
    r"nn\.Conv2d": ("convnext", "cvt", "levit", "mobilevit", "resnet"),
    "in_proj": ("deberta",),
    "experts": (
        *("deepseek_v3", "gpt_oss", "granitemoe", "llama4", "mixtral", "olmoe"),
        *("phimoe", "qwen2_moe", "qwen3_moe", "switch_transformers"),
    ),
    "rope|rotary": ("dinov3_vit",),
    "rotary_embeddings": ("esm",),
    "multi_query": ("falcon", "gpt_bigcode"),
    "class FalconMambaMixer": ("falcon_mamba",),
    r"self\.attentions": ("flaubert",),
    "fourier_transform|fftn": ("fnet",),
    "block_repeats": ("funnel",),
    "FeatureEncoder": ("hubert", "wav2vec2", "wavlm"),
    "QuantLinear": ("ibert",),
    "class JambaMambaMixer": ("jamba",),
    "bbox": ("layoutlm", "layoutlmv2", "layoutlmv3", "lilt"),
    "_sliding_chunks_query_key_matmul": ("led", "longformer"),
    "ShortConv": ("lfm2",),
    "EncDecAttention": ("longt5", "mt5", "umt5"),
    "w2e_query": ("luke",),
    "visual_feats": ("lxmert",),
    "class MambaMixer": ("mamba",),
    "class Mamba2Mixer": ("mamba2",),
    "xpath_tags_seq": ("markuplm",),
    "num_feedforward_networks": ("mobilebert",),
    "mra2_attention": ("mra",),
    "num_landmarks": ("nystromformer",),
    "post_feedforward_layernorm": ("gemma2", "gemma3_text", "olmo2"),
    "num_latents": ("perceiver",),
    "gate_up_proj": ("phi3",),
    "GatedDeltaNet": ("qwen3_next",),
    "class LSHSelfAttention": ("reformer",),
    "class RwkvSelfAttention": ("rwkv",),
    "sr_ratio": ("segformer",),
    r"nn\.Conv1d\(.*groups|groups=": ("squeezebert",),
    "window_partition": ("swin", "swinv2"),
    "row_ids|type_vocab_sizes": ("tapas",),
    "pixel_values": ("vilt",),
    "visual_embeds": ("visual_bert",),
    "mask_ratio": ("vit_mae",),
    r"self\.attentions\.append|self\.attentions =": ("xlm",),
    r"self\.q = nn\.Parameter": ("xlnet",),
    "adapter_modules": ("xmod",),
    "detection_tokens": ("yolos",),
    "hash": ("yoso",),
    "class ZambaMambaMixer": ("zamba",),
}
HOMES = {"gemma3_text": "gemma3", "data2vec-vision": "data2vec"}  # folders of code whose names are not the type's
NO_ENTRY_YET = "no entry says where they are yet"


def code_of(model_type: str) -> str:
    """Modelling code of a type, or nothing where this version of transformers has none."""
    models = Path(transformers.__file__).parent / "models"
    name = HOMES.get(model_type, model_type).replace("-", "_")
    files = [*models.glob(f"{name}/modeling_*.py"), *models.glob(f"deprecated/{name}/modeling_*.py")]
    return "".join(file.read_text(encoding="utf-8") for file in sorted(files))


def test_every_reason_is_shown_by_code() -> None:
    shown = {name: pattern for pattern, names in EVIDENCE.items() for name in names}
    assert shown.keys() == {name for name, reason in OTHERS.items() if NO_ENTRY_YET not in reason}
    found = {name: code_of(name) for name in shown}
    assert [name for name, code in found.items() if code and re.search(shown[name], code) is None] == []
    assert sum(map(bool, found.values())) > 60


def test_types_without_entry_have_layers_with_heads() -> None:
    names = [name for name, reason in OTHERS.items() if NO_ENTRY_YET in reason]
    assert len(names) > 20
    for name in names:
        code = code_of(name)
        assert not code or re.search(r"class \w*(Attention|Encoder)\b", code), name


def test_no_type_has_an_entry_and_a_reason_against_it() -> None:
    assert sorted(OTHERS.keys() & ARCHITECTURES.keys()) == [], "take these out of architectures/others.py"


def test_all_types_are_listed_with_what_they_lose_or_why_not() -> None:
    kinds = {kind.model_type: kind for kind in model_types()}
    assert kinds.keys() == ARCHITECTURES.keys() | OTHERS.keys()
    for name, kind in kinds.items():
        assert kind.prunable == (name in ARCHITECTURES)
        assert bool(kind.reason) != bool(kind.pruned and kind.dense and kind.proof)
    assert "real weights" in kinds["bert"].proof
    assert kinds["roberta"].proof == "random weights"
    assert kinds["qwen2"].pruned[0].startswith("cached heads")
    assert "position bias of all layers, cut to the heads that are kept" in kinds["mpnet"].dense
    assert "patch and position embeddings" in kinds["vit"].dense
    assert "embeddings and buckets of distances" in kinds["deberta-v2"].dense
    assert "embeddings and buckets of distances" not in kinds["bert"].dense
    assert json.loads(json.dumps(kinds["bert"].as_row()))["model_type"] == "bert"


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "dinov2", "qwen2", "gpt2"])
def test_a_type_stands_for_its_default_configuration(model_type: str) -> None:
    config: Any = transformers.AutoConfig.for_model(model_type)
    rows = inspect_model(model_type)
    assert rows == layer_rows(config)
    assert len(rows) == config.num_hidden_layers
    assert model_config(model_type).model_type == model_type


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("longformer", "overlapping windows"),
        ("mamba", "no attention heads"),
        ("mixtral", "experts"),
        ("gemma2", "normalizes what a block gives"),
        ("bart", "cross-attention"),
        ("whisper", "cross-attention"),
        ("albert", "share one set of weights"),
        ("funnel", "shortens the sequence"),
        ("convnextv2", "nobody has looked at"),
    ],
)
def test_a_refused_type_says_why(model_type: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    for model in (model_type, str(tmp_path)):
        with pytest.raises(UnsupportedModelError, match=reason):
            inspect_model(model)
    assert reason in model_type_of(model_type).reason
    assert reason in str(why_not(transformers.AutoConfig.for_model(model_type)))


def test_a_type_that_nobody_has() -> None:
    assert re.search(r"'no-such', which transformers [\d.]+ does not have", model_type_of("no-such").reason)


def test_a_folder_is_looked_at_before_a_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config("roberta").save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    assert (len(inspect_model("bert")), model_config("bert").model_type) == (3, "roberta")


REMOTE = [  # as their configurations say it on the hub
    ("nomic_bert", "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel", "nomic_bert"),
    ("new", "Alibaba-NLP/new-impl--modeling.NewModel", "gte"),
    ("gte", "modeling_hf_alibaba_nlp_gte.GteModel", "gte"),
    ("xlm-roberta", "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA", "jina_embeddings_v3"),
    ("eurobert", "modeling_eurobert.EuroBertModel", "eurobert"),
    ("bert", "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel", None),
    ("bert", "mine.MyBert", "bert"),
    ("neobert", "model.NeoBERT", None),
    ("qwen2", "modeling_qwen.Qwen2Model", "qwen2"),  # of gte-Qwen2: attends to both sides
]


@pytest.mark.parametrize(("model_type", "code", "native"), REMOTE)
def test_code_of_a_model_is_refused_with_what_is_native_instead(
    model_type: str, code: str, native: str | None, tmp_path: Path
) -> None:
    fields = {"model_type": model_type, "auto_map": {"AutoModel": code}}
    assert native_type(fields) == native
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="never run") as caught:
        inspect_model(str(tmp_path))
    wanted = "no type for it" if native is None else rf"the type {native} natively|natively as type {native}"
    assert re.search(wanted, str(caught.value))
    if native == "qwen2":
        assert "may let tokens attend to those after them" in str(caught.value)
        assert "remove auto_map" not in str(caught.value)
    if native == "bert":
        assert "which can be pruned: remove auto_map" in str(caught.value)


def test_facts_are_those_of_the_variant(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu"}))
    config = model_config(str(tmp_path))
    assert "FFN columns, each with its gate" in model_type_of("t5", config).pruned
    assert "FFN columns" in model_type_of("t5").pruned


def test_a_tower_is_named_of_two_only() -> None:
    with pytest.raises(UsageError, match="expected no --tower for a bert"):
        model_config("bert", "image")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "eurobert", "clf_pooling": "mean"}, "clf_pooling 'mean'.*classifier_pooling, here 'late'"),
        ({"model_type": "nomic_bert", "n_head": 6}, "n_head 6.*num_attention_heads, here 12"),
        ({"model_type": "nomic_bert", "layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05"),
    ],
)
def test_settings_of_original_code_are_not_passed_over(fields: dict[str, Any], said: str) -> None:
    if fields["model_type"] not in ARCHITECTURES:
        pytest.skip(f"this transformers has no {fields['model_type']}")
    config = config_of(fields, "a folder")
    assert re.search(said, str(why_not(config)))


def test_rotary_positions_may_be_named_so() -> None:
    if "gte" not in ARCHITECTURES:
        pytest.skip("this transformers has no gte")
    assert why_not(config_of({"model_type": "gte", "position_embedding_type": "rope"}, "a folder")) is None
    assert why_not(config_of({"model_type": "modernbert", "position_embedding_type": "sans_pos"}, "mmBERT")) is None
    found = why_not(config_of({"model_type": "bert", "position_embedding_type": "rope"}, "a folder"))
    assert "its attention scores depend on the head" in str(found)
