"""The models that a latency table times, built and exported one at a time, as the files that will serve.

llama.cpp's layers have a feed-forward block wherever they have attention, of zeros if need be. A stack of attention has
the smallest FFN of the table in its layers there, whose own cell is subtracted (:mod:`ziplm_deploy.latency.cells`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from exporters import ExportError, ExportSettings
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.latency.grid import BASE, DENSE, DENSE_AS_SERVED, NO_LAYERS
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.shared_input import with_shared_inputs
from ziplm_deploy.models.adapted import adapted, model_class
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import is_language_model
from ziplm_deploy.models.deployed import CacheForm, Treatment, write_graph
from ziplm_deploy.models.gguf_export import write_to_be_timed
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.models.resizing import install, random_resized, shared_copy
from ziplm_deploy.models.shape import ModuleKind

HIDDEN = ("last_hidden_state",)
TINY_VOCABULARY = 64  # a stack needs no real vocabulary, and its export would be mostly that


@dataclass(frozen=True)
class TableModel:
    """One model of a table; ``treatment`` makes its file what is served, which the dense reference is not."""

    model_id: str
    build: Callable[[], nn.Module]
    output_names: tuple[str, ...]
    treatment: Treatment

    def export(self, path: Path, settings: ExportSettings, form: CacheForm, *, stock_optimum: bool = False) -> None:
        """Build the model and write the file that will be timed.

        Raises:
            UnsupportedModelError: the model cannot be exported.
        """
        model = self.build()
        try:
            if self.treatment.gguf_type is not None:
                write_to_be_timed(model, path, self.treatment.gguf_type)
                return
            names = list(self.output_names)
            inputs = write_graph(model, path, names, settings, form, stock_optimum=stock_optimum)
        except ExportError as error:
            raise UnsupportedModelError(
                f"expected a model of which {self.model_id!r} of the latency table can be exported, found: {error}"
            ) from error
        self.treatment.finish(path, inputs)


def table_models(request: TableRequest) -> Iterator[TableModel]:
    """Every model that a table needs; built one at a time to bound memory."""
    dense, treatment, wrap, grid = request.dense, request.served, request.wrap, request.grid
    stack = random_stack(dense.config, grid.largest_depth, writes_text=is_language_model(dense))  # type: ignore[arg-type]
    layers_before = layers_of(stack)

    # What a treatment changes must be a copy: parts of the dense model are shared with whoever gave it.
    def whole(model: nn.Module) -> nn.Module:
        return wrap(treatment.prepare(copy.deepcopy(model)))

    def cell(kind: ModuleKind, size: int) -> nn.Module:
        sizes = {"attention": 0, "ffn": grid.beside(kind, size)} | {kind: size}
        layers = range(grid.depth(kind, size))
        part = first_layers(stack, len(layers))
        resized = random_resized(part, {f"{layer}.{name}": sizes[name] for layer in layers for name in sizes})
        return with_shared_inputs(treatment.prepare(resized), layers_before)

    def bare(model: nn.Module) -> nn.Module:
        return with_shared_inputs(treatment.prepare(copy.deepcopy(first_layers(model, 0))), layers_before)

    yield TableModel(DENSE, lambda: wrap(dense), request.output_names, request.exported)
    if request.times_dense_as_served:
        yield TableModel(DENSE_AS_SERVED, lambda: whole(dense), request.output_names, treatment)
    for model_id, sizes in grid.pruned_samples.items():
        build = lambda sizes=sizes: whole(random_resized(dense, sizes))  # noqa: E731
        yield TableModel(model_id, build, request.output_names, treatment)
    yield TableModel(BASE, lambda: wrap(bare(dense)), request.output_names, treatment)
    yield TableModel(NO_LAYERS, lambda: bare(stack), HIDDEN, treatment)
    for model_id, (kind, size) in grid.cell_ids.items():
        yield TableModel(model_id, functools.partial(cell, kind, size), HIDDEN, treatment)


def first_layers(dense: nn.Module, depth: int) -> nn.Module:
    """Embeddings and head of ``dense`` with only its first ``depth`` layers between; shares its parameters."""
    part = shared_copy(dense)
    config: Any = part.config
    del layers_of(part)[depth:]
    if depth:  # no configuration may say that there are none
        setattr(config, architecture_of(config).config_layers, depth)
    return part


def random_stack(config: PretrainedConfig, depth: int, *, writes_text: bool = False) -> nn.Module:
    """A model of ``depth`` full layers of this configuration, random weights and a tiny vocabulary.

    Layers of local and global attention take turns as in the model. One cell stands for both: a graph for CPUs computes
    all scores of a local one, too, and masks most of them out.

    ``writes_text``: with the head of a causal language model; others have none.
    """
    config = copy.deepcopy(config)
    setattr(config, architecture_of(config).config_layers, depth)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[layer % len(kinds)] for layer in range(depth)]
    if hasattr(config, "vocab_size"):
        config.vocab_size = min(config.vocab_size, TINY_VOCABULARY)
    name = "AutoModel"
    if architecture_of(config).causal is not None:
        config.pad_token_id = None  # which the vocabulary need not have
    if writes_text:
        name = "AutoModelForCausalLM"
    config._attn_implementation = "eager"
    model: nn.Module = model_class(config, name)(config)
    _give_all_norms(model)
    return adapted(model.eval())


def _give_all_norms(stack: nn.Module) -> None:
    """Put a norm before a first attention that has none, as ModernBERT's: of a few layers it is a larger share."""
    path, layers = architecture_of(stack.config).attention_norm, layers_of(stack)  # type: ignore[arg-type]
    if path is not None and len(layers) > 1 and isinstance(layers[0].get_submodule(path), nn.Identity):
        install(stack, 0, {path: copy.deepcopy(layers[1].get_submodule(path))})
