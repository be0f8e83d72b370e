"""Whether a run can work, found out before any long work."""

from __future__ import annotations

from typing import Any

import torch

from exporters.decoder import OLDEST_OPSET
from ziplm_deploy.baselines import BASELINES, get_baseline
from ziplm_deploy.compression.int8.forms import BITS
from ziplm_deploy.compression.int8.weight_only import check_bits
from ziplm_deploy.compression.onnx_graphs import MOST_BYTES
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.side_environments import NEURAL_COMPRESSOR
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.deployed import longest_text
from ziplm_deploy.recipe import CompressConfig, Recipe, TrainConfig, Variant
from ziplm_deploy.recovery.teacher_model import check_teacher
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.data_notes import leave_data_notes
from ziplm_deploy.tasks import TASKS
from ziplm_deploy.tasks.batching import length_limit
from ziplm_deploy.tasks.generation import window_tokens
from ziplm_deploy.tasks.reranking import Reranking

CAUSAL_ENGINES = ("onnxruntime", "llamacpp")  # they have workers that keep a cache


def check_compression(recipe: Recipe) -> None:
    """Refuse settings of ``compress`` that cannot work here.

    Raises:
        EngineError: neural-compressor is not set up, or of another version; says which command brings it. ONNX Runtime
            has no weight-only linears of the bits that are asked for.
    """
    if recipe.compress.makes_int8 and recipe.compress.int8.backend == "neural-compressor":
        NEURAL_COMPRESSOR.check()
    for bits, field in _weight_only_fields(recipe.compress).items():
        if recipe.compress.makes_int8:
            check_bits(get_engine("onnxruntime").version(), bits, field)


def _weight_only_fields(compress: CompressConfig) -> dict[int, str]:
    """Fields that ask for weight-only linears, by the bits."""
    asked = {
        8: ("fallback", compress.int8.fallback == "weight-only-8"),
        4: ("weight_only_4", compress.int8.weight_only_4),
    }
    if compress.int8.mixed:
        asked = {bits: ("mixed", True) for bits in BITS.values()}
    return {bits: f"compress.int8.{field}" for bits, (field, is_asked) in asked.items() if is_asked}


def check_task(recipe: Recipe) -> None:
    """Refuse settings that models of the task cannot have.

    Raises:
        RecipeError: a causal language model with what is made for encoders only, or the other way round.
    """
    export, weight_only = recipe.export, list(_weight_only_fields(recipe.compress).values())
    if not TASKS[recipe.model.task].is_causal:
        _check_encoder(recipe, weight_only)
        return
    if export.opset < OLDEST_OPSET and not recipe.environment.runs_gguf:
        raise RecipeError(
            f"expected export.opset from {OLDEST_OPSET} on for {recipe.model.task}, found {export.opset}; leave the "
            "field out"
        )
    if weight_only and export.cache_form == "portable":
        raise RecipeError(
            f"expected export.cache_form onnxruntime for {weight_only[0]}, found portable: weight-only linears are "
            "MatMulNBits, an operator of ONNX Runtime alone; change one of them"
        )
    if weight_only and not recipe.compress.makes_int8:
        raise RecipeError(
            f"expected int8 among compress.variants for {weight_only[0]}, found "
            f"{[str(variant) for variant in recipe.compress.variants]}: no file would have such linears; add it, or "
            "leave the field out"
        )
    if recipe.compress.int8.mixed and recipe.data.evaluation is None:
        raise RecipeError(
            "expected data.evaluation for compress.int8.mixed, found none: how fast a mixture may be is what "
            "compress.int8.max_loss allows; name text to evaluate on, or leave the field out"
        )
    if export.genai and export.cache_form == "portable":
        raise RecipeError(
            "expected export.cache_form onnxruntime for export.genai, found portable: onnxruntime-genai needs the "
            "heads of each layer; change one of them"
        )
    if export.genai and export.stock_optimum:
        raise RecipeError(
            "expected export.genai or export.stock_optimum, found both: onnxruntime-genai reads the heads of each "
            "layer where stock optimum needs them open; make two runs, or export one of them in Python (exporters)"
        )
    _check_causal_baselines(recipe)
    asked = {
        "export.shapes": (recipe.export.shapes, "dynamic"),
        "dense.train": (recipe.dense.train, False),
        "compress.variants": ([str(variant) for variant in recipe.compress.variants if variant != Variant.INT8], []),
        "compress.int8.method": (recipe.compress.int8.method, "dynamic"),
        "compress.int8.backend": (recipe.compress.int8.backend, "onnxruntime"),
    }
    _check_causal_engines(recipe)
    for name, (found, possible) in asked.items():
        if found not in (possible, []):
            raise RecipeError(
                f"expected {name} {possible} for {recipe.model.task}, found {found}: nothing else is made for causal "
                "language models yet; change the recipe"
            )


def _check_encoder(recipe: Recipe, weight_only: list[str]) -> None:
    """Refuse what only causal language models have: forms of linears, files for other runtimes, windows of text."""
    export = recipe.export
    if weight_only:
        raise RecipeError(
            f"expected no weight-only linears for {recipe.model.task}, found {weight_only[0]}: they are those of "
            "causal language models; leave the field out"
        )
    if export.gguf is not None or export.genai or export.stock_optimum:
        raise RecipeError(
            f"expected no export.gguf, genai and stock_optimum for {recipe.model.task}, found one: such files are "
            "those of causal language models; leave the field out"
        )
    if not recipe.compress.int8.smooth:
        raise RecipeError(
            f"expected no compress.int8.smooth for {recipe.model.task}, found false: only inputs of language models "
            "are smoothed; leave it out"
        )
    asked = {
        "data.context": recipe.data.context,
        "data.stride": recipe.data.stride,
        "prune.search.context": recipe.prune.search.context,
        "profile.stack_megabytes": recipe.profile.stack_megabytes,
    }
    for name, value in asked.items():
        if value is not None:
            raise RecipeError(
                f"expected no {name} for {recipe.model.task}, found {value}: it is about windows of text, and calls "
                "with a cache, of text-generation; leave it out"
            )


def _check_causal_baselines(recipe: Recipe) -> None:
    made = [name for name in BASELINES if get_baseline(name).of_causal and not recipe.environment.runs_gguf]
    for name in recipe.benchmark.baselines or ():
        if name not in made:
            raise RecipeError(
                f"expected benchmark.baselines among {made} for {recipe.model.task}, found {name}: nothing else is "
                "made for causal language models yet; leave it out"
            )


def _check_causal_engines(recipe: Recipe) -> None:
    engines = {"environment.engine": recipe.environment.engine, "benchmark.baseline_engine": recipe.baseline_engine}
    for name, engine in engines.items():
        if engine not in CAUSAL_ENGINES:
            raise RecipeError(
                f"expected {name} {' or '.join(CAUSAL_ENGINES)} for {recipe.model.task}, found {engine}: causal "
                "language models run in no other yet; change the recipe"
            )


def check_lengths(run: Run) -> None:
    """Refuse a workload with lengths that the model never sees, or with requests that a prompt alone fills.

    Raises:
        RecipeError: they are beyond its positions, its tokenizer cuts texts before, it reads one other length only, or
            no document fits.
    """
    _check_padding(run)
    if run.task.is_causal:
        _check_windows(run)
    workload = run.recipe.environment.workload
    if isinstance(run.task, Reranking):
        run.task.check_room(run.dense.processor, workload.seq_len)
    if workload.lengths is None:
        return
    limit = length_limit(run.dense.processor, longest_text(run.dense.model))
    if workload.seq_len > limit:
        raise RecipeError(
            f"expected environment.workload.lengths up to {limit} tokens, to which {run.recipe.model.path} cuts texts, "
            f"found {workload.seq_len}; count longer requests as {limit}"
        )


def _check_windows(run: Run) -> None:
    """Refuse requests and windows of text beyond what a causal language model takes, and strides that skip text."""
    recipe, path = run.recipe, run.recipe.model.path
    positions = longest_text(run.dense.model)
    if recipe.environment.workload.seq_len > positions:
        raise RecipeError(
            f"expected environment.workload within {positions} tokens, prompt and answer together, which is what files "
            f"of {path} take, found {recipe.environment.workload.seq_len}; shorten them"
        )
    limit = length_limit(run.dense.processor, positions)
    if recipe.data.context is not None and recipe.data.context > limit:
        raise RecipeError(
            f"expected data.context up to {limit} tokens, to which {path} reads texts, found {recipe.data.context}; "
            f"give {limit} or less"
        )
    context = window_tokens(recipe.data, run.dense.processor)
    if recipe.data.stride is not None and recipe.data.stride > context:
        raise RecipeError(
            f"expected data.stride up to data.context ({context} tokens), found {recipe.data.stride}, by which text "
            "between windows would not be scored; lower it"
        )


def _check_padding(run: Run) -> None:
    """Refuse requests of another length than the one that all texts of a model are filled up to."""
    model, export, seq_len = run.recipe.model, run.recipe.export, run.recipe.environment.workload.seq_len
    if model.task != "sentence-similarity" or model.pooling != "pooler":
        return
    length = longest_text(run.dense.model)
    if export.shapes != "static" or seq_len != length:
        raise RecipeError(
            f"expected export.shapes: static and environment.workload.seq_len: {length} for {model.path}, which was "
            f"trained on texts filled up to that length, found {export.shapes} and {seq_len}; change the recipe"
        )


def check_data(run: Run) -> None:
    """Read all data sets, so that bad data ends the run in its first second.

    Raises:
        DataError: data are missing or do not fit the model; and what :func:`check_training` raises.
        RecipeError: so do settings of data, or compression that is not made for causal encoders.
    """
    _check_causal_encoder(run)
    run.task.check_labels([], run.dense.model.config)  # refuses heads that the task cannot compare
    if run.data.can_be_read("calibration") and not run.folder.database(run.dense_member.name).exists():
        run.data.calibration_rows  # noqa: B018
    if run.recipe.data.evaluation is not None:
        run.data.evaluation_rows  # noqa: B018
    if run.recipe.data.retrieval is not None:
        run.data.retrieval  # noqa: B018
    if run.trains or run.recipe.dense.train or run.recipe.compress.trains:
        check_training(run)
    if not run.data.awaits_texts:
        leave_data_notes(run)  # only now, for a run that is refused writes nothing


def _check_causal_encoder(run: Run) -> None:
    """Refuse what names linears as torch does, for files that name them by the parts of a language model."""
    config: Any = run.dense.model.config
    if run.task.is_causal or architecture_of(config).causal is None:
        return
    compress = run.recipe.compress
    asked: dict[str, list[str]] = {
        "compress.variants without zeros": [str(each) for each in compress.variants if each.is_sparse],
        "compress.int8.method dynamic or static": [compress.int8.method] if compress.int8.method == "qat" else [],
        "compress.int8.backend onnxruntime": [each for each in [compress.int8.backend] if each != "onnxruntime"],
    }
    n_bytes = 4 * sum(weights.numel() for weights in run.dense.model.parameters())
    if compress.makes_int8 and compress.int8.method == "static" and n_bytes > MOST_BYTES:
        raise RecipeError(
            f"expected a model of up to {MOST_BYTES / 1e9:.1f} GB for compress.int8.method: static, found one of "
            f"{n_bytes / 1e9:.1f} GB: ranges are calibrated in one ONNX file; choose dynamic, or leave INT8 out"
        )
    for wanted, found in asked.items():
        if found:
            raise RecipeError(
                f"expected {wanted} for the causal encoder {config.model_type}, found {', '.join(found)}: nothing else "
                "is made for causal models yet; change the recipe"
            )


def check_training(run: Run) -> None:
    """Refuse settings of ``dense``, ``recover`` and ``compress.train`` that cannot work.

    Raises:
        RecipeError: a task loss where the task has none.  DataError: no labels for it, or less than a batch.
        UsageError: the teacher does not fit.
    """
    recipe = run.recipe
    if recipe.dense.train:
        _check_batches(run, recipe.dense, "dense")
        _check_dense(run)
    if run.trains:
        _check_batches(run, recipe.recover, "recover")
    if recipe.compress.trains:
        _check_batches(run, recipe.compress.train, "compress.train")
    if run.trains or recipe.compress.trains:
        _check_recovery(run)
    if run.learns_classes and recipe.data.evaluation is not None:
        _check_read_alike(run)


def _check_read_alike(run: Run) -> None:
    """Refuse numbers that are names of classes in one data set and count from 0 in another."""
    config = run.dense.model.config
    train, evaluation = (
        run.task.label_reading(rows, config) for rows in (run.data.raw_train_rows, run.data.raw_evaluation_rows)
    )
    if train is None or evaluation is None or not train.is_unlike(evaluation):
        return
    named, counted = ("training", "evaluation") if train.numbers_are_names else ("evaluation", "training")
    raise DataError(
        f"expected numbers as labels that mean the same in all data, found names of classes in the {named} data (the "
        f"model's are {', '.join(train.names[:4])} …) and, by numbers that are no such names, class numbers from 0 in "
        f"the {counted} data; write names into both, or count both from 0"
    )


def _check_batches(run: Run, config: TrainConfig, section: str) -> None:
    batch, n_rows = config.batch_size * distributed.n_processes(), _n_examples(run)
    if n_rows < batch:
        raise DataError(
            f"expected at least one batch of {batch} training examples, found {n_rows}; give more data in data.train "
            f"or a smaller {section}.batch_size"
        )
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError(
            f"expected {section}.precision fp32 or bf16 on a machine without a GPU, found fp16; change the recipe"
        )


def _n_examples(run: Run) -> int:
    """Training examples: rows, or the windows that are cut from them, or that sampled texts will fill."""
    data = run.recipe.data
    if data.generated is not None and data.is_generated("train"):
        return data.n_train or data.generated.n_windows
    return len(run.data.train_rows if run.task.is_causal else run.data.raw_train_rows)


def _check_recovery(run: Run) -> None:
    config = run.recipe.recover
    if config.task_weight and not run.task.label_names:
        raise RecipeError(
            f"expected recover.task_weight: 0 for {run.recipe.model.task}, which has no loss of its own here, found "
            f"{config.task_weight:g}; distillation needs no labels"
        )
    if config.task_weight and not _labelled(run):
        raise DataError(
            f"expected labels in the training data for recover.task_weight {config.task_weight:g}, found none; give "
            "labelled data in data.train or set recover.task_weight: 0"
        )
    hidden_size = run.dense.shape.hidden_size
    if config.lora is not None and config.lora.rank >= hidden_size:
        raise RecipeError(
            f"expected recover.lora.rank below {hidden_size}, the hidden size of {run.recipe.model.path}, found "
            f"{config.lora.rank}: such adapters are no smaller than the weights; choose a smaller rank, or leave "
            "recover.lora out"
        )
    if config.teacher is not None:
        check_teacher(run.teacher_model, run.dense.model, config, run.data.seq_len)


def _labelled(run: Run) -> bool:
    if run.task.is_causal:
        return True  # text is its own label
    seq_len = run.recipe.environment.workload.seq_len
    example = run.task.examples(run.data.train_rows[:1], run.dense.processor, seq_len)[0]
    return all(name in example for name in run.task.label_names)


def _check_dense(run: Run) -> None:
    names = run.task.label_names
    run.task.head_settings(run.data.raw_train_rows)
    if not names or not _labelled(run):
        raise DataError(
            f"expected labelled training data for dense.train with {run.recipe.model.task}, found none; give them in "
            "data.train, or a fine-tuned model and dense.train: false"
        )
