"""Question answering, token classification, fill-mask and images: runs that know the answer reach the full score."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import tiny_model
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import get_task, torch_function
from ziplm_deploy.tasks.answering import best_span, make_windows
from ziplm_deploy.tasks.batching import Arrays
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.resampling import ResampledScores

# question answering

LONG = " ".join(["the dog ran under the tree"] * 10 + ["a cat sat on the mat"] + ["the dog ran"] * 10)
QUESTIONS = [
    {"question": "who sat ?", "context": LONG, "answers": ["a cat"]},
    {"question": "who ran ?", "context": "the dog ran", "answers": ["the dog", "dog"]},
]


def point_at(tokenizer: Any, words: tuple[str, ...]) -> Any:
    """A run whose start and end logits are highest where the words stand, in whatever window they stand."""
    wanted = tokenizer.convert_tokens_to_ids(list(words))

    def run(inputs: Arrays) -> Arrays:
        ids = inputs["input_ids"]
        start, end = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, np.float32)
        for row, tokens in enumerate(ids.tolist()):
            for position in range(len(tokens) - len(wanted) + 1):
                if tokens[position : position + len(wanted)] == wanted:
                    start[row, position] = end[row, position + len(wanted) - 1] = 5
        return {"start_logits": start, "end_logits": end}

    return run


@pytest.mark.parametrize("pad_to", [None, 36])
def test_an_answer_far_into_the_context_is_found(tokenizer: Any, pad_to: int | None) -> None:
    task = get_task("question-answering")
    scores = task.evaluate(point_at(tokenizer, ("a", "cat")), evaluation_set(QUESTIONS[:1], tokenizer, pad_to=pad_to))
    assert scores == {"f1": 1.0, "exact_match": 1.0}
    scores = task.evaluate(point_at(tokenizer, ("the", "dog")), evaluation_set(QUESTIONS, tokenizer, pad_to=pad_to))
    assert scores == {"f1": 0.5, "exact_match": 0.5}


def test_windows_cover_the_whole_context(tokenizer: Any) -> None:
    windows = make_windows(tokenizer, QUESTIONS, 36)
    covered = {span for window in windows if window.row == 0 for span in window.spans if span}
    assert sorted(LONG[slice(*span)] for span in covered) == sorted(LONG.split())
    assert all(len(window.inputs["input_ids"]) <= 36 for window in windows)
    assert [window.row for window in windows].count(1) == 1


def test_a_question_longer_than_the_window_is_cut(tokenizer: Any) -> None:
    row = {**QUESTIONS[1], "question": "who ran " * 60}
    (window,) = make_windows(tokenizer, [row], 32)
    assert [row["context"][slice(*span)] for span in window.spans if span] == ["the", "dog", "ran"]
    with pytest.raises(DataError, match=r"at least 32 tokens.*found 16"):
        make_windows(tokenizer, QUESTIONS, 16)


def test_best_span_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    spans = [None, None, *[(3 * i, 3 * i + 2) for i in range(15)], None]
    for _ in range(20):
        start, end = generator.normal(size=(2, len(spans)))
        pairs = [(i, j) for i in range(2, 17) for j in range(i, 17)]
        i, j = max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
        score, characters = best_span(start, end, spans)
        assert score == pytest.approx(start[i] + end[j])
        assert characters == (spans[i][0], spans[j][1])  # type: ignore[index]
    assert best_span(np.ones(2), np.ones(2), [None, None]) == (-np.inf, None)


def test_questions_without_answer_are_refused_for_evaluation_only() -> None:
    task = get_task("question-answering")
    raw = [{"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}]
    assert task.normalize_rows(raw, DataConfig(), "calibration")[0]["answers"] == []
    with pytest.raises(DataError, match=r"answer in row 1.*SQuAD 2.0"):
        task.normalize_rows(raw, DataConfig(), "evaluation")


# token classification

NAMES = SimpleNamespace(num_labels=3, id2label={0: "O", 1: "B-X", 2: "I-X"})
TAGGED = [
    {"words": ["the", "cat", "sat"], "label": ["O", "B-X", "O"]},
    {"words": ["a", "dog", "cat", "ran", "on"], "label": [0, 1, 2, 0, 0]},
]


@pytest.mark.parametrize("pad_to", [None, 12])
def test_entity_f1_of_a_tagger_that_knows(tokenizer: Any, pad_to: int | None) -> None:
    task = get_task("token-classification")
    rows = task.check_labels(TAGGED, NAMES)
    dog, cat = tokenizer.convert_tokens_to_ids(["dog", "cat"])

    def run(inputs: Arrays) -> Arrays:
        ids = inputs["input_ids"]
        after_dog = np.pad(ids[:, :-1], ((0, 0), (1, 0))) == dog
        classes = np.where(ids == dog, 1, np.where(ids == cat, np.where(after_dog, 2, 1), 0))
        return {"logits": np.eye(3, dtype=np.float32)[classes]}

    scores = task.evaluate(run, evaluation_set(rows, tokenizer, pad_to=pad_to, max_length=12))
    assert set(scores.values()) == {1.0}
    cut = task.evaluate(run, evaluation_set(rows, tokenizer, pad_to=pad_to, max_length=3))
    assert cut["entity_f1"] == 0.0, "one word is left of each row: nothing is found"


def test_a_word_is_judged_by_its_first_token(tokenizer: Any) -> None:
    from ziplm_deploy.tasks.tokens import tokenize_words

    (example,), (firsts,) = tokenize_words(tokenizer, [{"words": ["cat,.", "the", "?who"]}], 20)
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert {word: tokens[token] for word, token in firsts.items()} == {0: "cat", 1: "the", 2: "?"}


def test_a_space_that_is_a_token_belongs_to_the_word_behind_it() -> None:
    """Taggers of DeBERTa-v3 are trained to answer there."""
    from ziplm_deploy.tasks.tokens import _first_tokens

    alone = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 5), (0, 0)]  # of " a bc": ▁ a ▁ bc between two special tokens
    joined = [(0, 0), (0, 2), (2, 5), (0, 0)]
    assert _first_tokens(["a", "bc"], alone) == {0: 1, 1: 3}
    assert _first_tokens(["a", "bc"], joined) == {0: 1, 1: 2}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tokens": "the cat", "ner_tags": [0, 1]}, "list or mapping in column 'tokens'.*JSON lines"),
        ({"tokens": ["the", 3], "ner_tags": [0, 1]}, "words as text in row 1"),
        ({"tokens": ["the"], "ner_tags": [0, 1]}, "2 tags for 1 words"),
        ({"tokens": ["the"], "ner_tags": 0}, "list of tags"),
    ],
)
def test_bad_tagged_rows(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        get_task("token-classification").normalize_rows([row], DataConfig(), "evaluation")


NO_NAMES = SimpleNamespace(num_labels=3, id2label={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})


@pytest.mark.parametrize("names", ["LABEL_{}", "{}"])
def test_tags_without_names_are_no_entities(names: str, tokenizer: Any) -> None:
    task, config = get_task("token-classification"), SimpleNamespace(num_labels=3)
    config.id2label = {number: names.format(number) for number in range(3)}
    numbers = [{"words": row["words"], "label": [0] * len(row["words"])} for row in TAGGED]
    checked = task.check_labels(numbers, config)
    with pytest.raises(DataError, match=r"tags with names .* found (LABEL_)?0 to (LABEL_)?2;.*model.metric: token_acc"):
        task.settle_rows(checked, DataConfig(), "evaluation", 0, None)
    assert task.settle_rows(checked, DataConfig(), "train", 0, None) == checked
    by_words = get_task(ModelConfig(path="m", task="token-classification", metric="token_accuracy"))
    assert by_words.settle_rows(checked, DataConfig(), "evaluation", 0, None) == checked
    data = evaluation_set(checked, tokenizer, max_length=12)
    perfect = by_words.outcomes(lambda inputs: {"logits": np.eye(3)[0 * inputs["input_ids"]]}, data)
    assert by_words.scores(perfect) == {"token_accuracy": 1.0}
    assert by_words.label_scores(perfect, config) == {}
    low, high = ResampledScores(by_words, perfect).interval("token_accuracy")
    assert low < high == 1.0


def test_tags_take_the_names_of_a_data_set_where_the_model_has_none(tokenizer: Any) -> None:
    task, known = get_task("token-classification"), ("O", "B-X", "I-X")
    tagged = [{**TAGGED[1], "label": [NamedClass(tag, known) for tag in (0, 1, 2, 0, 0)]}]
    rows = task.settle_rows(task.check_labels(tagged, NO_NAMES), DataConfig(), "evaluation", 0, tokenizer)

    def says_outside(inputs: Arrays) -> Arrays:
        return {"logits": np.eye(3, dtype=np.float32)[np.zeros_like(inputs["input_ids"])]}

    scores = task.evaluate(says_outside, evaluation_set(rows, tokenizer, max_length=12))
    assert scores["entity_f1"] == 0.0
    assert scores["token_accuracy"] == pytest.approx(3 / 5)


def test_unknown_tags_and_unchecked_rows(tokenizer: Any) -> None:
    task = get_task("token-classification")
    with pytest.raises(DataError, match=r"found 'B-PER' in row 1"):
        task.check_labels([{"words": ["a"], "label": ["B-PER"]}], NAMES)
    with pytest.raises(DataError, match="check_labels"):
        task.evaluate(lambda inputs: {}, evaluation_set(TAGGED, tokenizer, max_length=12))


# fill-mask


def test_masking_is_repeatable_and_never_hides_special_tokens(tokenizer: Any) -> None:
    rows = [{"text": "the cat sat on the mat under a tree . [MASK] dog"}, {"text": "who"}]
    first, second = (get_task("fill-mask").encode(evaluation_set(rows, tokenizer))[0] for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    plain = get_task("text-classification").encode(evaluation_set(rows, tokenizer))[0]["input_ids"]
    hidden = first["input_ids"] != plain
    assert hidden.sum(1).tolist() == [1, 2]  # 15 % of 11 ordinary tokens, and at least one
    assert (first["input_ids"][hidden] == tokenizer.mask_token_id).all()
    assert not torch.isin(plain[hidden], torch.tensor(tokenizer.all_special_ids)).any()


def test_masked_accuracy_of_a_run_that_knows(tokenizer: Any) -> None:
    """The text always reads 'cat', so a run that always says cat finds every hidden token; so does no other."""
    rows = [{"text": "cat " * count} for count in (3, 9, 20)]
    for word, accuracy in (("cat", 1.0), ("dog", 0.0)):
        logits = np.zeros(60, np.float32)
        logits[tokenizer.convert_tokens_to_ids(word)] = 4

        def run(inputs: Arrays, logits: np.ndarray = logits) -> Arrays:
            return {"logits": np.broadcast_to(logits, (*inputs["input_ids"].shape, 60))}

        scores = get_task("fill-mask").evaluate(run, evaluation_set(rows, tokenizer, 2, pad_to=36))
        assert scores["masked_accuracy"] == accuracy
        assert scores["masked_log_likelihood"] < 0


def test_fill_mask_bad_input(tokenizer: Any) -> None:
    task = get_task("fill-mask")
    with pytest.raises(DataError, match="only blank rows"):
        task.normalize_rows([{"text": " "}], DataConfig(), "calibration")
    with pytest.raises(DataError, match="tokens to mask"):
        task.evaluate(lambda inputs: {"logits": np.zeros((1, 2, 60))}, evaluation_set([{"text": ""}], tokenizer, 2))
    with pytest.raises(RuntimeError, match="call one first"):
        get_task("fill-mask").features({"logits": torch.zeros(1, 2, 3)}, {"input_ids": torch.zeros(1, 2)})


# images


@pytest.mark.parametrize("pad_to", [None, 1])
def test_images_from_files_and_bytes(tmp_path: Path, pad_to: int | None) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    from transformers import ViTImageProcessor

    raw: list[dict[str, Any]] = []
    for index in range(5):
        array = np.random.default_rng(index).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        image_module.fromarray(array).save(tmp_path / f"{index}.png")
        content: Any = (
            f"{index}.png" if index % 2 else {"bytes": (tmp_path / f"{index}.png").read_bytes(), "path": None}
        )
        raw.append({"image": content, "label": index % 3})
    data = DataConfig(evaluation=str(tmp_path / "rows.jsonl"))
    task, model = get_task("image-classification"), tiny_model("vit")
    rows = task.check_labels(task.normalize_rows(raw, data, "evaluation"), model.config)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    images = evaluation_set(rows, processor, 2, pad_to=pad_to)
    batches = task.encode(images)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
    with torch.no_grad():
        answers = torch.cat([task.forward(model, batch)["logits"] for batch in batches]).argmax(-1)
    expected = float(np.mean(answers.numpy() == [row["label"] for row in rows]))
    assert task.evaluate(torch_function(task, model), images)["accuracy"] == expected
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"expected an image in .*1\.png"):
        task.encode(images)


def test_missing_images_are_named(tmp_path: Path) -> None:
    task = get_task("image-classification")
    data = DataConfig(calibration=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"image file at .*gone\.png \(row 1\)"):
        task.normalize_rows([{"image": "gone.png"}], data, "calibration")
    with pytest.raises(DataError, match="path, bytes or image in row 1, found int"):
        task.normalize_rows([{"image": 3}], data, "calibration")


def test_missing_pillow_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'pip install "ziplm-deploy\[image\]"'):
        get_task("image-classification").encode(evaluation_set([{"image": "a.png"}], None))
