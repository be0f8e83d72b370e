"""Tiny sentence-transformers models written by hand, in the forms of every age, and what they answer to a text."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # type: ignore[import-untyped, unused-ignore]

from tests.helpers.models import VOCABULARY, tiny_causal_model, tiny_model

# Where classes stood, by the age of the release that wrote modules.json.
HOMES = {
    "old": dict.fromkeys(("Transformer", "Pooling", "Dense", "Normalize"), "models"),
    "new": {
        "Transformer": "base.modules.transformer",
        "Pooling": "sentence_transformer.modules.pooling",
        "Dense": "base.modules.dense",
        "Normalize": "sentence_transformer.modules.normalize",
    },
}
TEXTS = [
    "the cat sat .",
    "a dog ran under the tree .",
    "The CAT sat on a mat , a Dog ran",
    "who ?",
    "a tree",
    "the mat",
]
MORE_TEXTS = [
    f"{a} {b} {c}" for a in ("the cat", "A dog") for b in ("sat on", "ran under") for c in ("a mat", "the TREE")
]


@dataclass(frozen=True)
class TinySentenceModel:
    """Settings of a model: what its files say, in the words of sentence-transformers."""

    pooling: dict[str, Any] = field(default_factory=lambda: {"pooling_mode_mean_tokens": True})
    dense: tuple[tuple[int, bool, str | None], ...] = ()  # size, bias, class of torch.nn
    normalize: bool = True
    texts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    age: str = "old"
    transformer: str = ""  # sub-folder of the transformers model
    lowers: bool = True  # the tokenizer itself
    model_type: str = "bert"
    pieces: bool = False  # a tokenizer of pieces, as XLM-R's, in place of words
    card: str = ""  # text of its README.md
    causal: str = ""  # model type of a language model that is the encoder
    padding_side: str = "right"

    def save(self, folder: Path, **changes: Any) -> Path:
        """Write the model; ``changes`` are for the configuration of its encoder."""
        inner = folder / self.transformer
        inner.mkdir(parents=True, exist_ok=True)
        encoder = tiny_causal_model(self.causal, **changes).base_model if self.causal else None
        encoder = encoder if encoder is not None else tiny_model(self.model_type, **changes)
        encoder.save_pretrained(inner)  # type: ignore[operator, union-attr]
        self._save_tokenizer(inner)
        if self.card:
            (folder / "README.md").write_text(self.card, encoding="utf-8")
        kinds = [(self.transformer, "Transformer"), ("1_Pooling", "Pooling")]
        kinds += [(f"{2 + number}_Dense", "Dense") for number in range(len(self.dense))]
        kinds += [(f"{len(kinds)}_Normalize", "Normalize")] * self.normalize
        write(folder / "modules.json", [module(n, path, kind, self.age) for n, (path, kind) in enumerate(kinds)])
        write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **self.pooling})
        write(inner / "sentence_bert_config.json", self.texts)
        write(folder / "config_sentence_transformers.json", self.settings)
        self._save_dense(folder)
        return folder

    def _save_tokenizer(self, inner: Path) -> None:
        if self.pieces:
            piece_tokenizer().save_pretrained(inner)
            return
        (inner / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        tokenizer = transformers.BertTokenizerFast.from_pretrained(
            inner, model_max_length=40, do_lower_case=self.lowers, padding_side=self.padding_side
        )
        tokenizer.save_pretrained(inner)

    def _save_dense(self, folder: Path) -> None:
        generator, width = torch.Generator().manual_seed(7), 32
        for number, (size, bias, activation) in enumerate(self.dense):
            config = {"in_features": width, "out_features": size, "bias": bias}
            if activation is not None:
                home = "linear" if activation == "Identity" else "activation"
                config["activation_function"] = f"torch.nn.modules.{home}.{activation}"
            tensors = {"linear.weight": torch.randn(size, width, generator=generator)}
            if bias:
                tensors["linear.bias"] = torch.randn(size, generator=generator)
            write(folder / f"{2 + number}_Dense" / "config.json", config)
            save_file(tensors, folder / f"{2 + number}_Dense" / "model.safetensors")
            width = size

    def embeddings(self, folder: Path, texts: list[str]) -> np.ndarray:
        """Embeddings ``[texts, size]``, one text at a time and in numpy but for the encoder."""
        inner = folder / self.transformer
        tokenizer = transformers.AutoTokenizer.from_pretrained(inner)
        options = {} if self.causal else {"add_pooling_layer": False}
        model: Any = transformers.AutoModel.from_pretrained(inner, **options).eval()
        prompt = (self.settings.get("prompts") or {}).get(self.settings.get("default_prompt_name"), "")
        found = []
        for text in texts:
            text = prompt + text
            text = text.lower() if self.texts.get("do_lower_case") else text
            length = self.texts.get("max_seq_length", 40)
            inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
            if self.causal:
                del inputs["token_type_ids"]
            with torch.no_grad():
                vectors = model(**inputs).last_hidden_state[0].numpy()
            found.append(self._head(folder, vectors))
        return np.stack(found)

    def _head(self, folder: Path, vectors: np.ndarray) -> np.ndarray:
        pooled = {"mean": vectors.mean(0), "cls": vectors[0], "max": vectors.max(0), "lasttoken": vectors[-1]}
        embedding = pooled[self._mode]
        for number, (_, _, activation) in enumerate(self.dense):
            tensors = load(folder / f"{2 + number}_Dense" / "model.safetensors")
            embedding = tensors["linear.weight"] @ embedding + tensors.get("linear.bias", 0.0)
            if activation in (None, "Tanh"):  # of sentence-transformers, where nothing is said
                embedding = np.tanh(embedding)
            elif activation == "ReLU":
                embedding = np.maximum(embedding, 0)
        return embedding / np.linalg.norm(embedding) if self.normalize else embedding

    @property
    def _mode(self) -> str:
        mode = self.pooling.get("pooling_mode") or next(name.split("_")[2] for name, on in self.pooling.items() if on)
        return str(mode if isinstance(mode, str) else mode[0])


def piece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of pieces with XLM-R's special tokens, in its order."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, *(f"▁{word}" for word in VOCABULARY[5:]), *VOCABULARY[5:], "<mask>"]
    backend = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=38,
        **{"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
        **{"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
    )


def module(number: int, path: str, kind: str, age: str = "old") -> dict[str, Any]:
    """An entry of modules.json."""
    return {
        "idx": number,
        "name": str(number),
        "path": path,
        "type": f"sentence_transformers.{HOMES[age][kind]}.{kind}",
    }


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def by_sentence_transformers(
    folders: list[Path], texts: list[str], scratch: Path, prompts: list[str | None] | None = None, **settings: Any
) -> list[np.ndarray]:
    """Embeddings of every folder, from sentence-transformers with these settings of its models, and prompts.

    In a process of its own: its import changes settings of other packages.
    """
    write(scratch / "texts.json", texts)
    write(scratch / "prompts.json", prompts or [None] * len(folders))
    code = (
        "import json, sys, numpy; from sentence_transformers import SentenceTransformer as S\n"
        "texts, prompts, settings, out, *folders = sys.argv[1:]\n"
        "models = [S(folder, device='cpu', **json.loads(settings)) for folder in folders]\n"
        "pairs = zip(models, json.load(open(prompts)))\n"
        "numpy.savez(out, *[model.encode(json.load(open(texts)), prompt=prompt) for model, prompt in pairs])"
    )
    files = [scratch / "texts.json", scratch / "prompts.json", json.dumps(settings), scratch / "found.npz"]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, [*files, *folders])], check=True)
    found = np.load(scratch / "found.npz")
    return [found[f"arr_{number}"] for number in range(len(folders))]
