"""Make the quickstart's two files from GLUE's STS-B: ``python make.py FOLDER`` with train and validation .jsonl.gz."""

from __future__ import annotations

import gzip
import json
import random
import sys
import unicodedata
from pathlib import Path

COLUMNS = ("sentence1", "sentence2")


def read(path: Path) -> list[dict[str, object]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Without name and time in the gzip header, so that the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
        stream.write(text.encode("utf-8"))


def damaged(sentence: str) -> bool:
    return any(unicodedata.category(letter) == "Cc" or letter == "\ufffd" for letter in sentence)


def training_sentences(train: list[dict[str, object]], validation: list[dict[str, object]]) -> list[str]:
    """Distinct training sentences, seeded; none is in the validation set, whatever its case."""
    held_out = {str(row[column]).strip().casefold() for row in validation for column in COLUMNS}
    distinct: dict[str, str] = {}
    for row in train:
        for column in COLUMNS:
            sentence = str(row[column])
            distinct.setdefault(sentence.strip().casefold(), sentence)
    sentences = sorted(text for key, text in distinct.items() if key and key not in held_out and not damaged(text))
    return random.Random(0).sample(sentences, len(sentences))  # shuffled: neighbours in the set are much alike


def main(source: Path, target: Path) -> None:
    train, validation = read(source / "train.jsonl.gz"), read(source / "validation.jsonl.gz")
    write(target / "stsb_sentences.jsonl.gz", [{"text": text} for text in training_sentences(train, validation)])
    write(target / "stsb_validation.jsonl.gz", [{key: row[key] for key in (*COLUMNS, "label")} for row in validation])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
