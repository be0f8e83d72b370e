"""torch on the CPU: checkpoints of transformers in eager mode, as users have them before any export.

Not an engine for members: it takes a ``model.safetensors`` beside its ``config.json``, and no ONNX file. Only classes
of transformers itself are made; no code of the folder is run, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np

from .facts import EngineFacts
from .inputs import make_ids, make_inputs

# What transformers imports with its first model takes seconds: with these, the worker does so while others come up.
FACTS = EngineFacts(
    "torch", install="pip install torch", imports=("torch", "transformers", "transformers.modeling_utils")
)
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


class Sessions:
    """Models of one process, float32."""

    def __init__(self, options: argparse.Namespace) -> None:
        import importlib.metadata

        import torch

        torch.set_num_threads(options.threads)
        torch.set_num_interop_threads(1)
        self.version: str = importlib.metadata.version("torch")

    def load(self, path: str) -> TorchSession:
        """Model of the checkpoint that a file of weights belongs to; raises ``ValueError`` for any other file."""
        import torch
        import transformers

        if os.path.basename(path) != "model.safetensors":
            raise ValueError(f"expected model.safetensors of a checkpoint, found {path}; torch runs no ONNX files")
        folder = os.path.dirname(os.path.abspath(path))
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = getattr(transformers, config.architectures[0])
        # Members and their dense model have no pooler; a class that can do without it would start it at random.
        bare = {"add_pooling_layer": False} if "add_pooling_layer" in signature(model_class).parameters else {}
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **bare,
        )
        if report["missing_keys"]:
            raise ValueError(f"expected all weights in {path}, found none for {sorted(report['missing_keys'])[0]}")
        return (CausalTorchSession if model.can_generate() else TorchSession)(model.eval())


class TorchSession:
    """A model behind the methods of an ONNX Runtime session that this folder uses."""

    def __init__(self, model: Any) -> None:
        self.model = model
        example = make_inputs(self.get_inputs(), batch_size=1, seq_len=4)
        self.outputs = {name: list(value.shape) for name, value in self._answer(example).items()}

    def get_inputs(self) -> list[argparse.Namespace]:
        """Images, or token ids with their mask."""
        if self.model.main_input_name == "pixel_values":
            config = self.model.config
            size = [config.image_size] * 2 if isinstance(config.image_size, int) else list(config.image_size)
            shape = ["batch", config.num_channels, *size]
            return [argparse.Namespace(name="pixel_values", type="tensor(float)", shape=shape)]
        names = ("input_ids", "attention_mask")
        return [argparse.Namespace(name=name, type="tensor(int64)", shape=["batch", "tokens"]) for name in names]

    def get_outputs(self) -> list[argparse.Namespace]:
        """Outputs of the model, with the shapes that they have for one short example."""
        entries = self.outputs.items()
        return [argparse.Namespace(name=name, type="tensor(float)", shape=shape) for name, shape in entries]

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by ``names``; all for None."""
        found = self._answer(inputs)
        return [found[name].numpy() for name in (names or found)]

    def _answer(self, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            answers = self.model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value for name, value in answers.items() if isinstance(value, torch.Tensor)}


class CausalTorchSession(TorchSession):
    """A language model with the cache of transformers, called as its ``generate()`` does."""

    def timed_calls(self, calls: list[tuple[int, int, int]]) -> list[Callable[[], float]]:
        """One run of every call (batch size, tokens, cached tokens), each of which returns its milliseconds."""
        return [self._timed_call(*call) for call in calls]

    def _timed_call(self, batch_size: int, tokens: int, cached: int) -> Callable[[], float]:
        import torch

        ids = torch.from_numpy(make_ids(batch_size, cached + tokens))
        before: list[Any] = []  # the cache as the call finds it, made with the first run
        taken = signature(self.model.forward).parameters
        name = "cache" if "cache" in taken else "past_key_values"  # before transformers 5
        settings = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in taken else {})}

        def call(new: Any, cache: Any) -> Any:
            return self.model(input_ids=new, **{name: cache}, **settings)[name]

        def run() -> float:
            with torch.inference_mode():
                if cached and not before:
                    before.append(call(ids[:, :cached], None))
                cache = copy.deepcopy(before[0]) if before else None  # a call appends to it
                start = time.perf_counter()
                call(ids[:, cached:], cache)
                return 1000.0 * (time.perf_counter() - start)

        return run
