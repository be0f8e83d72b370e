"""The dense model that members are pruned from, and its tokenizer or image processor."""

from __future__ import annotations

import contextlib
import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import normalizers  # type: ignore[import-untyped, unused-ignore]
from torch import nn

from ziplm_deploy.documents import shortened
from ziplm_deploy.errors import (
    CorruptArtifactError,
    EnvironmentMismatchError,
    UnsupportedModelError,
    ZipLMError,
)
from ziplm_deploy.models.adapted import adapted, model_class
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import has_language_head, keep_end_tokens, without_cache
from ziplm_deploy.models.causal_reranker import answer_ids, as_classifier, prepare_reranker
from ziplm_deploy.models.config_file import (
    HEAD_PARAMETERS,
    check_all_are_used,
    check_layer_count,
    check_parameter_count,
    first_not_finite,
    read_config,
    stored_shapes,
)
from ziplm_deploy.models.gguf_source import (
    GGUF_SUFFIX,
    check_gguf,
    load_gguf_config,
    load_gguf_model,
    model_place,
)
from ziplm_deploy.models.gguf_tokenizer import load_gguf_tokenizer
from ziplm_deploy.models.label_maps import settle_class_names
from ziplm_deploy.models.location import transformer_place
from ziplm_deploy.models.member_files import MEMBER_FILE
from ziplm_deploy.models.own_settings import completed
from ziplm_deploy.models.processors import check_processor, limit_length
from ziplm_deploy.models.score_activation import keep_score_activation
from ziplm_deploy.models.sentence_dense import load_layers
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.models.sentence_record import SentenceModules
from ziplm_deploy.models.tower_heads import load_projection
from ziplm_deploy.models.two_towers import Reads, without_other_tower
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.tasks import TASKS, Task

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_dense(model_config: ModelConfig, new_head: dict[str, Any] | None = None) -> tuple[nn.Module, Any]:
    """The dense model (eval mode, float32, eager attention) and its tokenizer or image processor.

    A local folder is read without the network. A sentence-transformers model keeps its Dense layers, as
    ``model.sentence_dense``, and its tokenizer cuts and lowers texts as its files say. No pickle is opened and
    no remote code is run.

    Args:
        new_head: settings of the configuration (``num_labels``, …) for a model that is about to be fine-tuned: a head
            that is missing, or of another size, starts at random.

    Raises:
        UnsupportedModelError: architecture, weight format or task do not fit, or the head's weights are missing.
        CorruptArtifactError: config or weights are damaged.
        RecipeError: a sentence-transformers model was trained with another pooling, normalization or similarity.
        EnvironmentMismatchError: a package that the model or its processor needs is missing.
    """
    root = model_place(model_config.path)
    if root.endswith(GGUF_SUFFIX):
        return _load_gguf(Path(root), TASKS[model_config.task])
    own = read_sentence_modules(model_config)
    settings = completed(model_config, own)
    path, source = _transformer_of(root, model_config, own)
    if Path(root).is_dir():
        _check_files(Path(path), TASKS[model_config.task].auto_class)
    task = TASKS[model_config.task]
    config = _load_config(path, source, task.input_kind)
    _check_task(config, task, with_head=task.is_causal)
    if new_head is None and task.has_classes:
        settle_class_names(config, type(config).get_config_dict(path, **source)[0], path)
    for name, value in (new_head or {}).items():
        setattr(config, name, value)
    keep_score_activation(config, own.activation, settings.score_activation)
    answers = settings.pair_prompt is not None and has_language_head(config.to_dict())
    auto_class = "AutoModelForCausalLM" if answers else task.auto_class
    model = _load_weights(path, config, auto_class, source, may_lack_head=new_head is not None and not answers)
    processor = _load_processor(path, task.input_kind, source)
    if answers:
        model = as_classifier(model, answer_ids(processor, settings, own.answer_ids))
    check_processor(model, processor, task.input_kind, path)
    if task.is_causal:
        limit_length(processor, model)
        keep_end_tokens(model, processor)
    if settings.pair_prompt is not None:
        prepare_reranker(model, processor, settings)
    if own.source:
        _check_widths(model, settings, own)
        if own.is_tower and own.dense:
            load_projection(model, own.dense[0], task.input_kind, root, settings.revision)
        else:
            load_layers(model, own.dense, root, own.dense_folders, settings.revision)
        if task.input_kind == "text":
            _prepare_texts(processor, settings, own)
    _check_finite(model, path)
    return model, processor


def _load_gguf(file: Path, task: type[Task]) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a GGUF file."""
    check_gguf(file)
    with quiet_transformers():
        config: Any = load_gguf_config(file)
        _check_task(config, task, with_head=True)
        model: Any = adapted(load_gguf_model(file, config))
    model.config.return_dict, model.config._attn_implementation = True, "eager"
    _check_finite(model, str(file))
    tokenizer = load_gguf_tokenizer(file)
    check_processor(model, tokenizer, task.input_kind, str(file))
    limit_length(tokenizer, model)
    keep_end_tokens(model, tokenizer)
    return without_cache(model), tokenizer


def _check_task(config: Any, task: type[Task], *, with_head: bool) -> None:
    architecture = architecture_of(config)
    causal, reads = architecture.causal, "image" if hasattr(config, "image_size") else "text"
    if reads != task.input_kind:
        raise UnsupportedModelError(
            f"expected a model that reads {task.input_kind}s for {task.name}, found a {architecture.model_type}, which "
            f"reads {reads}s; choose another task or model"
        )
    if causal is not None and task.takes_causal and not with_head:
        if causal.rotary is None:
            raise UnsupportedModelError(
                f"expected a causal model with rotary positions for {task.name}, found a {architecture.model_type}, "
                "whose learned positions depend on the side of the padding; choose another model"
            )
        return
    if (causal is not None) != task.is_causal:
        kind = "causal language model" if architecture.causal is not None else "encoder"
        wanted = "a causal language model" if task.is_causal else "an encoder"
        raise UnsupportedModelError(
            f"expected {wanted} for {task.name}, found the {kind} {architecture.model_type}; choose another task or "
            "model"
        )


def load_processor(model_config: ModelConfig) -> Any:
    """The tokenizer or image processor of a dense model without its weights, as :func:`load_dense` gives it.

    Raises:
        UnsupportedModelError, EnvironmentMismatchError, RecipeError: as :func:`load_dense`.
    """
    own = read_sentence_modules(model_config)
    root = model_place(model_config.path)
    if root.endswith(GGUF_SUFFIX):
        return load_gguf_tokenizer(Path(root))
    path, source = _transformer_of(root, model_config, own)
    processor = _load_processor(path, TASKS[model_config.task].input_kind, source)
    if own.source and TASKS[model_config.task].input_kind == "text":
        _prepare_texts(processor, completed(model_config, own), own)
    return processor


def load_config(model_config: ModelConfig) -> Any:
    """The configuration of a dense model; raises as :func:`load_dense`."""
    root, task = model_place(model_config.path), TASKS[model_config.task]
    if root.endswith(GGUF_SUFFIX):
        return load_gguf_config(Path(root))
    path, source = _transformer_of(root, model_config, read_sentence_modules(model_config))
    return _load_config(path, source, task.input_kind)


def _transformer_of(root: str, model_config: ModelConfig, own: SentenceModules) -> tuple[str, dict[str, Any]]:
    """Folder or hub id of the transformers model, and what its files are to be read with."""
    source: dict[str, Any] = {"trust_remote_code": False}
    if Path(root).is_dir():
        return transformer_place(root, own.transformer), {**source, "local_files_only": True}
    hub = {"revision": model_config.revision, "subfolder": own.transformer or None}
    return root, source | {name: value for name, value in hub.items() if value is not None}


def _check_finite(model: nn.Module, path: str) -> None:
    damaged = first_not_finite(model)
    if damaged is not None:
        raise CorruptArtifactError(
            f"expected finite weights in {path}, found NaN or infinity in {damaged}; copy the checkpoint again, or "
            "train it with a lower learning rate"
        )


def _check_widths(model: nn.Module, settings: ModelConfig, own: SentenceModules) -> None:
    """Raise :class:`CorruptArtifactError` unless each module takes vectors as the one before gives them."""
    size = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    taken = [(own.width or size, own.width or size), *((layer.in_features, layer.out_features) for layer in own.dense)]
    for number, (wanted, given) in enumerate(taken, 1):
        if wanted != size:
            raise CorruptArtifactError(
                f"expected vectors of {size} for module {number} of {settings.path}, as the one before it gives, "
                f"found {wanted}; get the model anew"
            )
        size = given


def _prepare_texts(processor: Any, settings: ModelConfig, own: SentenceModules) -> None:
    """Make a tokenizer cut and lower texts as sentence-transformers would."""
    if own.max_seq_length is not None:
        processor.model_max_length = own.max_seq_length
    if own.do_lower_case:
        lower_texts(processor)
    if settings.pooling == "cls" and processor.padding_side == "left":
        raise UnsupportedModelError(
            f"expected a tokenizer that pads on the right for the pooling cls, found one in {settings.path} that pads "
            "on the left; set padding_side in its tokenizer_config.json"
        )


def lower_texts(processor: Any) -> None:
    """Lower all letters, and do nothing else, before a tokenizer does what it does; as sentence-transformers does."""
    if not processor.is_fast:
        processor.do_lower_case = True
        return
    backend = processor.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def _load_config(path: str, source: dict[str, Any], reads: Reads) -> Any:
    config: Any = read_config(path, reads, **source)
    # Members, exporters and tasks read outputs by name and want nothing else in the graph.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    return config


def _load_weights(path: str, config: Any, auto_class: str, source: dict[str, Any], may_lack_head: bool) -> nn.Module:
    chosen = model_class(config, auto_class)
    options = {"add_pooling_layer": False} if _pooler_is_optional(chosen, auto_class) else {}
    try:
        if Path(path).is_dir():
            _check_sizes(chosen, config, Path(path), options)
        # What it warns about, missing weights, is an error below.
        with quiet_transformers(downloads=not Path(path).is_dir()):
            model, report = chosen.from_pretrained(
                path,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=may_lack_head,
                **options,
                **source,
            )
    except ZipLMError:
        raise
    except OSError as error:
        raise UnsupportedModelError(
            f"expected safetensors weights in {path}, found: {error}; {_conversion(path, auto_class)}"
        ) from error
    except Exception as error:  # transformers trusts the fields of config.json, so that it may raise anything
        raise CorruptArtifactError(
            f"expected weights that fit config.json in {path}, found: {type(error).__name__}: {shortened(str(error))}; "
            "copy the checkpoint again"
        ) from error
    unexpected = dict.fromkeys(report["unexpected_keys"], ())
    names = {**dict.fromkeys(model.state_dict(), ()), **unexpected}
    check_layer_count(config, without_other_tower(names, config.model_type), path)  # of the hub
    missing = sorted(report["missing_keys"])
    if may_lack_head:
        inside = f"{chosen.base_model_prefix}."
        missing = [name for name in missing if name.startswith(inside) and ".pooler." not in name]
    if missing:
        raise UnsupportedModelError(
            f"expected all weights of {chosen.__name__} in {path}, found none for {_first(missing)}: they would "
            "be random; fine-tune the model for this task first, or choose the task it was trained for"
        )
    check_all_are_used(config, without_other_tower(unexpected, config.model_type), path)
    dense: nn.Module = without_cache(adapted(model.eval()))
    return dense


def _check_sizes(model_class: Any, config: Any, folder: Path, options: dict[str, Any]) -> None:
    """Refuse a configuration that its weights do not bear out, before memory is taken for it."""
    shapes = stored_shapes(sorted(folder.glob("*.safetensors")))
    check_layer_count(config, without_other_tower(shapes, config.model_type), str(folder))
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    check_parameter_count(model_class, config, shapes, 2 * stored + HEAD_PARAMETERS, **options)


def _load_processor(path: str, input_kind: str, source: dict[str, Any]) -> Any:
    loader: Any = transformers.AutoImageProcessor if input_kind == "image" else transformers.AutoTokenizer
    try:
        processor = loader.from_pretrained(path, **(_by_pillow() if input_kind == "image" else {}), **source)
        # transformers 5 makes an empty tokenizer of a folder that has none.
        if input_kind != "image" and len(processor) <= len(processor.all_special_tokens):
            raise ValueError("a vocabulary of nothing but special tokens")
        return processor
    except ImportError as error:
        extra = 'run: pip install "ziplm-deploy[image]"' if input_kind == "image" else "install what it names"
        raise EnvironmentMismatchError(
            f"expected the packages for inputs of {path}, found: {error}; {extra}"
        ) from error
    except Exception as error:  # its files may be of any shape, and are read by several libraries
        what = "image processor: preprocessor_config.json" if input_kind == "image" else "tokenizer: tokenizer.json"
        raise UnsupportedModelError(
            f"expected {what} in {path}, found: {shortened(str(error))}; copy its files from the model it was trained "
            "from"
        ) from error


def _by_pillow() -> dict[str, Any]:
    """Keyword of an image processor that works without torchvision; transformers 5.4 gave it another name."""
    return {"backend": "pil"} if hasattr(transformers, "PilBackend") else {"use_fast": False}


def _check_files(folder: Path, auto_class: str) -> None:
    if (folder / MEMBER_FILE).exists():
        raise UnsupportedModelError(
            f"expected a dense model in {folder}, found a pruned one ({MEMBER_FILE}); prune the model it came from"
        )
    if (folder / "adapter_config.json").exists():  # transformers would load the model that it names instead
        raise UnsupportedModelError(
            f"expected a whole model in {folder}, found an adapter of one (adapter_config.json); merge it into its "
            "model"
        )
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"expected config.json in {folder}, found none; check model.path")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
        if pickles:
            raise UnsupportedModelError(
                f"expected *.safetensors in {folder}, found only pickled weights ({_first(pickles)}), which can run "
                f"any code when opened; {_conversion(str(folder), auto_class)}"
            )
        raise UnsupportedModelError(f"expected model.safetensors in {folder}, found no weights; check model.path")
    for shard in shards:
        _check_safetensors(shard)


def _conversion(path: str, auto_class: str) -> str:
    code = (
        f"from transformers import {auto_class} as M; "
        f"M.from_pretrained({path!r}, use_safetensors=False).save_pretrained({path!r})"
    )
    return f"if you trust where they came from, convert them: python -c {shlex.quote(code)}"


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(
            f"expected whole safetensors weights in {path}, found: {error}; it is truncated or damaged, copy it again"
        ) from error


@contextlib.contextmanager
def quiet_transformers(*, downloads: bool = False) -> Iterator[None]:
    """No warnings of transformers, and no progress bars unless something may be downloaded."""
    logging: Any = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not downloads:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _pooler_is_optional(model_class: Any, auto_class: str) -> bool:
    return auto_class == "AutoModel" and "add_pooling_layer" in inspect.signature(model_class).parameters


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
