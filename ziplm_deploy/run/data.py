"""The data of one run: rows, batches, and the keys that stand for them."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from exporters import input_names
from exporters.heads import patches_of
from ziplm_deploy.artifacts import content_key, source_hash
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.models.dense import load_processor
from ziplm_deploy.models.deployed import longest_text
from ziplm_deploy.models.partner import partner_of
from ziplm_deploy.models.sentence_dense import embedding_size
from ziplm_deploy.models.sentence_record import SentenceModules
from ziplm_deploy.pruning.planner import Calibration
from ziplm_deploy.recipe import Recipe, Variant
from ziplm_deploy.recipe.data import CALIBRATION_EXAMPLES
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.recovery.self_data import SampledTexts, read_texts
from ziplm_deploy.run.dense import DenseModel
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.run.partner import embed_by
from ziplm_deploy.tasks import EvaluationSet, Task
from ziplm_deploy.tasks.base import Which
from ziplm_deploy.tasks.batching import Batch, fitted, length_limit
from ziplm_deploy.tasks.cross_retrieval import CrossRetrieval, has_images, pairs_hash, read_pairs
from ziplm_deploy.tasks.embeddings import EmbeddingTask
from ziplm_deploy.tasks.evaluation_set import BATCH_SIZE, TOKENS_AT_ONCE
from ziplm_deploy.tasks.generation import CONTEXT
from ziplm_deploy.tasks.retrieval import Retrieval, read_retrieval_set
from ziplm_deploy.tasks.search import Search
from ziplm_deploy.tasks.similarity import SentenceSimilarity

SAMPLING = "sample texts"  # the stage that has the dense model write texts


class RunData:
    """Calibration, evaluation and training data, read and encoded on first use."""

    def __init__(self, recipe: Recipe, task: Task, folder: RunFolder, own: SentenceModules) -> None:
        self._recipe, self._task, self._folder = recipe, task, folder
        # For keys: what the recipe says of the model, and what the model says of itself.
        self.model_settings: dict[str, Any] = {
            **recipe.model.fingerprint,
            **own.answers(recipe.environment.workload.seq_len),
        }
        self._pools_prompts = own.include_prompt
        self.dense = DenseModel(
            recipe,
            folder,
            self._dense_training_key,
            lambda: task.head_settings(self.raw_train_rows),
            own.transformer,
        )
        self.calibration_hash = self._hash_for("calibration")
        self.evaluation_hash = self._hash_for("evaluation")
        self.train_hash = self._hash_for("train")

    def _hash_for(self, which: Which) -> str:
        """Stands for the content of the data set, or for the texts that are sampled in its place."""
        data = self._recipe.data
        return self.sampling_key if data.is_generated(which) else self._hash_of(self._task.source(data, which)[0])

    def _hash_of(self, source: str | None) -> str:
        """Stands for the content of a data set, with the files that it names; a name with its revision."""
        linked = "" if source is None else self._task.linked_files_hash(source, self._recipe.data)
        revision = self._recipe.data.revision
        pinned = f"@{revision}" if source is not None and revision is not None and not os.path.exists(source) else ""
        return source_hash(source) + pinned + (f"+{linked}" if linked else "")

    def _dense_training_key(self, base_hash: str) -> str:
        recipe = self._recipe
        return content_key(
            base=base_hash,
            data=self.train_hash,
            columns=self.train_columns,
            dense=recipe.dense.model_dump(exclude={"save_steps", "report_to"}),
            task=self.model_settings,
            seq_len=self.seq_len,
            seed=recipe.seed,
        )

    @property
    def seq_len(self) -> int:
        """Tokens that an example has at most: of a window of text, or of a request."""
        if self._task.is_causal:
            return self._recipe.data.context or CONTEXT
        return self._recipe.environment.workload.seq_len

    @property
    def sampling_key(self) -> str:
        """Everything that texts sampled from the dense model depend on."""
        return content_key(
            model=self.dense.base_hash,
            generated=self._recipe.data.generated,
            context=self.seq_len,
            seed=self._recipe.seed,
        )

    @property
    def awaits_texts(self) -> bool:
        """Whether texts are still to be sampled from the dense model."""
        return self._recipe.data.generated is not None and not self._folder.is_made(SAMPLING, self.sampling_key)

    def can_be_read(self, which: Which) -> bool:
        """Whether a data set is there: all but texts that are still to be sampled."""
        return not (self.awaits_texts and self._recipe.data.is_generated(which))

    @property
    def sampled_texts(self) -> SampledTexts | None:
        """Texts that the dense model has written; None where the recipe asks for none."""
        return None if self._recipe.data.generated is None else read_texts(self._folder.sampled_texts)

    def _load_rows(self, which: Which) -> list[dict[str, Any]]:
        texts = self.sampled_texts if self._recipe.data.is_generated(which) else None
        if texts is None:
            return self._task.load_rows(self._recipe.data, which, self._recipe.seed)
        return [{"ids": ids} for ids in texts.ids]

    @property
    def calibration_key(self) -> str:
        """Stands for the calibration examples as the model sees them."""
        names = {"calibration_split", "config_name", "text_columns", "label_column"}
        count = {"n_calibration": self._recipe.data.n_calibration or CALIBRATION_EXAMPLES}
        return content_key(
            data=self.calibration_hash,
            columns=self._recipe.data.model_dump(include=names) | count | self._windows,
            inputs=self.dense.input_key,
            task=self.model_settings,
            seq_len=self.seq_len,
            seed=self._recipe.seed,
        )

    @property
    def evaluation_key(self) -> str:
        """Stands for the evaluation examples, and the metric if the recipe chooses one."""
        names = {"evaluation_split", "config_name", "text_columns", "label_column", "n_evaluation"}
        chosen = {} if self._recipe.model.metric is None else {"metric": self._recipe.model.metric}
        reading = {} if self._task.reading_version == 1 else {"reading": self._task.reading_version}
        return content_key(
            **chosen,
            **reading,
            data=self.evaluation_hash,
            columns=self._recipe.data.model_dump(include=names) | self._windows,
            inputs=self.dense.input_key,
            model=self.model_settings,
            seed=self._recipe.seed,
            seq_len=self.seq_len,
        )

    @property
    def evaluation_rows_key(self) -> str:
        """Stands for which evaluation rows there are, whatever model reads them and at what length."""
        names = {"evaluation_split", "config_name", "text_columns", "label_column", "n_evaluation"}
        columns = self._recipe.data.model_dump(include=names) | self._windows
        return content_key(data=self.evaluation_hash, columns=columns, seed=self._recipe.seed)

    @functools.cached_property
    def retrieval_key(self) -> str:
        """Stands for what is searched for, and where, as the model sees it."""
        recipe = self._recipe
        names = {"retrieval_split", "config_name", "retrieval_columns", "n_retrieval", "passage_length"}
        other = {"images": pairs_hash(recipe.data), "towers": self.dense.base_hash} if self.searches_images else {}
        return content_key(
            **other,
            data=self._hash_of(recipe.data.retrieval),
            columns=recipe.data.model_dump(include=names),
            inputs=self.dense.input_key,
            model=self.model_settings,
            prompts=[recipe.model.prompt_of_queries, recipe.model.prompt_of_passages],
            dimensions=recipe.model.dimensions,
            seed=recipe.seed,
            seq_len=self.seq_len,
        )

    @functools.cached_property
    def searches_images(self) -> bool:
        """Whether ``data.retrieval`` pairs captions with images."""
        return self._task.input_kind == "image" or has_images(self._recipe.data)

    @functools.cached_property
    def retrieval(self) -> Search:
        """What ``data.retrieval`` holds, and how embeddings are compared on it.

        Raises:
            DataError: see :func:`read_retrieval_set` and :func:`read_pairs`.
            RecipeError: sizes that embeddings cannot be cut to, or prompts that the pooling leaves out.
            UnsupportedModelError: captions and images, and a model without another tower.
        """
        if self.searches_images:
            return self._cross_retrieval()
        model = self._recipe.model
        prompts = list(filter(None, (model.prompt_of_queries, model.prompt_of_passages)))
        if prompts and not self._pools_prompts:
            raise RecipeError(
                "expected a pooling of all tokens for data.retrieval with prompts, found one that leaves out those of "
                f"{prompts[0]!r} (include_prompt: false); set model.query_prompt and model.passage_prompt to ''"
            )
        size, dimensions = embedding_size(self.dense.model), model.dimensions or ()
        if any(asked > size for asked in dimensions):
            raise RecipeError(
                f"expected model.dimensions up to {size}, the size of the embeddings, found {max(dimensions)}; "
                "leave it out"
            )
        assert isinstance(self._task, SentenceSimilarity)  # other tasks were refused with the recipe
        return Retrieval(
            self._task,
            read_retrieval_set(self._recipe.data, self._recipe.seed),
            tuple(asked for asked in dimensions if asked < size),
            self._passage_length,
        )

    @property
    def _passage_length(self) -> int | None:
        """Tokens that passages are cut at, where the recipe says so; refused beyond the model's own limit."""
        asked, limit = (
            self._recipe.data.passage_length,
            length_limit(self.dense.processor, longest_text(self.dense.model)),
        )
        if asked is not None and asked > limit:
            raise RecipeError(
                f"expected data.passage_length up to {limit} tokens, to which {self._recipe.model.path} cuts texts, "
                f"found {asked}; give {limit} or less"
            )
        return asked

    def _cross_retrieval(self) -> CrossRetrieval:
        recipe, task = self._recipe, self._task
        if recipe.data.passage_length is not None:
            raise RecipeError(
                "expected data.passage_length beside queries and passages alone, found captions and images in "
                "data.retrieval; leave it out"
            )
        other = partner_of(recipe.model)
        load_processor(other)  # what it lacks is said before any work
        assert isinstance(task, EmbeddingTask)  # other tasks were refused with the recipe
        pairs = read_pairs(recipe.data, recipe.seed)
        return CrossRetrieval(task, pairs, lambda rows: embed_by(other, rows), recipe.model.prompt_of_queries)

    def passages_taken_by(self, variant: Variant) -> EvaluationSet:
        """How a file of this variant takes queries and passages; see :meth:`evaluation_set`."""
        return self._taken([], as_served=self._scales_span_batch(variant))

    @property
    def train_columns(self) -> dict[str, Any]:
        """Settings that decide which training examples there are."""
        data = self._recipe.data
        names = {"config_name", "text_columns", "label_column", "n_train"}
        return {"split": self._task.source(data, "train")[1], **data.model_dump(include=names), **self._windows}

    @property
    def _windows(self) -> dict[str, int]:
        """Settings of windows of text that are made; keys from before there were any stay as they are."""
        if not self._task.is_causal:
            return {}
        return self._recipe.data.model_dump(include={"context", "stride"}, exclude_none=True)

    @functools.cached_property
    def calibration_rows(self) -> list[dict[str, Any]]:
        return self._settled(self._load_rows("calibration"), "calibration")

    @functools.cached_property
    def evaluation_rows(self) -> list[dict[str, Any]]:
        """Evaluation rows with labels in the model's numbering."""
        return self._settled(self._task.check_labels(self.raw_evaluation_rows, self.dense.model.config), "evaluation")

    @functools.cached_property
    def raw_evaluation_rows(self) -> list[dict[str, Any]]:
        """Evaluation rows with labels as the data have them."""
        return self._load_rows("evaluation")

    @functools.cached_property
    def raw_train_rows(self) -> list[dict[str, Any]]:
        """Training rows with labels as the data have them."""
        return self._load_rows("train")

    @property
    def trains_on_labels(self) -> bool:
        """Whether a loss of the training reads labels."""
        return bool(self._recipe.dense.train or self._recipe.recover.task_weight)

    @functools.cached_property
    def train_rows(self) -> list[dict[str, Any]]:
        """Training rows, with labels in the model's numbering where a loss reads them."""
        if self.trains_on_labels:
            return self._settled(self._task.check_labels(self.raw_train_rows, self.dense.model.config), "train")
        return self._settled(self._task.unlabelled(self.raw_train_rows), "train")

    def _settled(self, rows: list[dict[str, Any]], which: Which) -> list[dict[str, Any]]:
        return self._task.settle_rows(rows, self._recipe.data, which, self._recipe.seed, self.dense.processor)

    def encode(
        self, rows: list[dict[str, Any]], batch_size: int = BATCH_SIZE, pad_to: int | None = None
    ) -> list[Batch]:
        """Inputs that the model's graph takes, whether or not the tokenizer gives just these."""
        wanted = input_names(self.dense.model)
        batches = self._task.encode(EvaluationSet(rows, self.dense.processor, self.seq_len, batch_size, pad_to))
        return [fitted(batch, wanted) for batch in batches]

    def evaluation_set(self, variant: Variant) -> EvaluationSet:
        """Evaluation examples as a file of this variant takes them.

        A call holds as many as served where answers depend on it: if the graph fixes it, or a scale spans the batch.
        """
        return self.evaluation_set_of(as_served=self._scales_span_batch(variant))

    def _scales_span_batch(self, variant: Variant) -> bool:
        return variant.is_int8 and self._recipe.compress.int8.method == "dynamic"

    def evaluation_set_of(self, *, as_served: bool) -> EvaluationSet:
        """Evaluation examples for the dense model's graph in any form; ``as_served``: a scale spans the batch."""
        return self._taken(self.evaluation_rows, as_served=as_served)

    def _taken(self, rows: list[dict[str, Any]], *, as_served: bool) -> EvaluationSet:
        recipe = self._recipe
        static = recipe.export.shapes == "static"
        # llama.cpp reads one text after the other, and logits of all tokens of many would fill the memory.
        as_served = as_served or static or recipe.environment.runs_gguf
        at_once = max(1, min(BATCH_SIZE, TOKENS_AT_ONCE // self.seq_len)) if self._task.is_causal else BATCH_SIZE
        served = recipe.environment.workload.batch_size
        return EvaluationSet(
            rows,
            self.dense.processor,
            self.seq_len,
            # Windows of text are longer than prompts, and have logits at every token: no more of them than fit.
            (min(served, at_once) if self._task.is_causal else served) if as_served else at_once,
            self.seq_len if static else None,
        )

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Calibration examples for Hessians, search and re-ranking; the latter two are parts of the first."""
        rows, search = self.calibration_rows, self._recipe.prune.search
        return Calibration(
            hessian=self.encode(rows),
            search=self.encode(self._task.shortened(rows[: search.n_sequences], search.context)),
            rerank=self.encode(self._task.shortened(rows[-search.n_rerank :], search.context)),
        )

    @property
    def ranges_rows(self) -> list[dict[str, Any]]:
        """Calibration rows for INT8."""
        return self.calibration_rows[: self._recipe.compress.int8.n_calibration]

    @functools.cached_property
    def ranges_batches(self) -> list[Batch]:
        """Calibration examples for INT8, of the shape that the ONNX files take.

        With static shapes every batch is whole; where there are fewer examples than that, they are repeated.
        """
        recipe, rows = self._recipe, self.ranges_rows
        if recipe.export.shapes == "dynamic":
            return self.encode(rows)
        size = recipe.environment.workload.batch_size
        # Encoding sorts by length and drops repeated texts: cut before it, look at what came out after it.
        batches = self.encode(rows[: len(rows) // size * size] or rows, size, self.seq_len)
        return [batch for batch in batches if _count(batch) == size] or [filled_up(batches[0], size)]

    def count_tokens(self) -> int:
        """Calibration tokens that count; an image gives one for each of its patches."""
        batches = self.calibration.hessian
        if "attention_mask" in batches[0]:
            return sum(int(batch["attention_mask"].sum()) for batch in batches)
        if "input_ids" in batches[0]:  # filled up to one length, all of which is read
            return sum(batch["input_ids"].numel() for batch in batches)
        return sum(len(batch["pixel_values"]) for batch in batches) * (patches_of(self.dense.model.config) + 1)

    @functools.cached_property
    def examples(self) -> Examples:
        """Training examples, encoded once for all members."""
        rows = self._task.examples(self.train_rows, self.dense.processor, self.seq_len)
        return Examples(rows, self._task, self.dense.processor)


def _count(batch: Batch) -> int:
    """Examples in a batch."""
    return len(next(iter(batch.values())))


def filled_up(batch: Batch, size: int) -> Batch:
    """A batch of ``size`` examples: those of ``batch``, again and again."""
    rows = torch.arange(size) % _count(batch)
    return {name: value[rows] for name, value in batch.items()}
