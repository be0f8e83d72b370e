"""What training takes from the tasks: examples, batches and labels, losses against those of transformers, new heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import TEXT_TASKS, labelled_rows, tiny_model
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks import TASKS, Task, get_task
from ziplm_deploy.tasks.losses import cross_entropy, mean_squared
from ziplm_deploy.tasks.similarity import flatten

LABELLED_TASKS = [name for name in TEXT_TASKS if name != "sentence-similarity"]


@pytest.fixture(params=["left", "right"])
def sided(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return transformers.BertTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side=request.param)


def training_batch(task: Task, tokenizer: Any) -> dict[str, torch.Tensor]:
    return task.collate(task.examples(labelled_rows(task.name, 9), tokenizer, 36), tokenizer)


def unlabelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("label", "answers")} for row in rows]


# examples and batches


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_collated_examples_are_what_encode_gives(name: str, sided: Any) -> None:
    task, rows = get_task(name), labelled_rows(name, 7)
    examples = task.examples(rows, sided, 36)
    (expected,) = task.encode(evaluation_set(rows, sided, 99), sort=False)
    batch = task.collate(examples, sided)
    assert set(batch) == set(expected) | set(task.label_names)
    if name == "question-answering":  # the window with the answer, which need not be the first
        assert batch["input_ids"].shape == expected["input_ids"].shape
    else:
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert len(examples) == len(flatten(rows) if name == "sentence-similarity" else rows)


@pytest.mark.parametrize("name", LABELLED_TASKS)
def test_examples_are_unpadded_and_labels_have_their_shape(name: str, tokenizer: Any) -> None:
    for example in get_task(name).examples(labelled_rows(name, 5), tokenizer, 36):
        length = example["input_ids"].shape[1]
        assert bool(example["attention_mask"].all())
        for label in get_task(name).label_names:
            per_token = name in ("token-classification", "fill-mask")
            assert example[label].shape == ((1, length) if per_token else (1,))
            assert example[label].dtype == (torch.float32 if name == "text-regression" else torch.int64)


@pytest.mark.parametrize("name", LABELLED_TASKS)
def test_rows_without_labels_give_the_same_inputs(name: str, tokenizer: Any) -> None:
    task, rows = get_task(name), labelled_rows(name, 5)
    rows = [{**row, "context": "the cat sat on a mat", "answers": ["cat"]} if "context" in row else row for row in rows]
    with_labels = task.examples(rows, tokenizer, 36)
    without = task.examples(unlabelled(rows), tokenizer, 36)
    left_out = set() if name == "fill-mask" else set(task.label_names)
    for example, bare in zip(with_labels, without, strict=True):
        assert set(bare) == set(example) - left_out
        assert all(torch.equal(bare[key], example[key]) for key in bare)


@pytest.mark.parametrize("name", ["text-classification", "text-regression", "token-classification"])
def test_some_rows_without_label_are_named(name: str, tokenizer: Any) -> None:
    rows = labelled_rows(name, 6)
    rows[3:5] = unlabelled(rows[3:5])
    with pytest.raises(DataError, match=r"in every row or in none, found none in row 4 \(2 of 6 rows\)"):
        get_task(name).examples(rows, tokenizer, 36)


def test_examples_that_do_not_fit_together(tokenizer: Any) -> None:
    task, rows = get_task("text-classification"), labelled_rows("text-classification", 2)
    examples = task.examples(rows, tokenizer, 36) + task.examples(unlabelled(rows), tokenizer, 36)
    with pytest.raises(DataError, match=r"labels in every training example.*in its number 2; label all"):
        task.collate(examples, tokenizer)


def test_labels_that_were_not_checked_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="check_labels"):
        get_task("text-classification").examples([{"text": "a", "label": "POS"}], tokenizer, 36)
    with pytest.raises(DataError, match="check_labels"):
        get_task("token-classification").examples([{"words": ["a"], "label": ["O"]}], tokenizer, 36)


def test_tags_stand_at_the_first_token_of_each_word(sided: Any) -> None:
    task = get_task("token-classification")
    names = ["O", "B-X", "I-X"]
    rows = [
        {"words": ["cat,.", "the"], "label": [1, 2], "label_names": names},
        {"words": [], "label": [], "label_names": names},
        {"words": ["a"] * 50, "label": [1] * 50, "label_names": names},  # cut off
    ]
    batch = task.collate(task.examples(rows, sided, 8), sided)
    tagged = batch["labels"] != -100
    tokens = [sided.convert_ids_to_tokens(ids[mask]) for ids, mask in zip(batch["input_ids"], tagged, strict=True)]
    assert tokens == [["cat", "the"], [], ["a"] * 6]
    assert batch["labels"][0][tagged[0]].tolist() == [1, 2]
    assert not (tagged & (batch["attention_mask"] == 0)).any()


def test_hidden_tokens_are_the_labels_of_fill_mask(sided: Any) -> None:
    task, rows = get_task("fill-mask"), labelled_rows("fill-mask", 7)
    batch = task.collate(task.examples(rows, sided, 36), sided)
    (plain,) = get_task("text-classification").encode(evaluation_set(rows, sided, 99), sort=False)
    hidden = batch["labels"] != -100
    assert torch.equal(hidden, batch["input_ids"] == sided.mask_token_id)
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), plain["input_ids"])


# positions of answers


def test_positions_point_at_the_answer(sided: Any) -> None:
    task, rows = get_task("question-answering"), labelled_rows("question-answering", 12)
    for row in rows[6:]:  # at the end of the context, with a space that is no part of a token
        answer = " ".join(row["context"].split()[-3:])
        row |= {
            "answers": [answer + " "],
            "context": row["context"] + " ",
            "answer_start": row["context"].rindex(answer),
        }
    batch = task.collate(task.examples(rows, sided, 36), sided)
    for row, ids, start, end in zip(
        rows, batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True
    ):
        assert sided.decode(ids[start : end + 1]) == row["answers"][0].strip()
    (first,) = task.encode(evaluation_set(rows, sided, 99), sort=False)
    assert (first["input_ids"] != batch["input_ids"]).any(1).sum() >= 4, "late answers stand in other windows"


@pytest.mark.parametrize(
    ("context", "answer", "tokens"),
    [
        ("the cat,. dog", ",", [","]),  # no space to the tokens before and after
        ("the cat,. dog", "cat", ["cat"]),
        (" the cat sat", " the cat", ["the", "cat"]),  # the context begins with what is no token
        ("the cats sat", "cat", ["[UNK]"]),  # part of a token: the whole of it
    ],
)
def test_positions_hold_no_neighbours(context: str, answer: str, tokens: list[str], tokenizer: Any) -> None:
    rows = [{"question": "who ?", "context": context, "answers": [answer]}]
    (example,) = get_task("question-answering").examples(rows, tokenizer, 36)
    span = example["input_ids"][0, example["start_positions"] : example["end_positions"] + 1]
    assert tokenizer.convert_ids_to_tokens(span) == tokens


def test_the_answer_start_of_the_data_is_used(tokenizer: Any) -> None:
    task = get_task("question-answering")
    context = "the cat sat on the cat"
    raw = [{"question": "who ?", "context": context, "answers": {"text": ["cat"], "answer_start": [19]}}]
    (given,) = task.normalize_rows(raw, DataConfig(), "train")
    assert given == {"question": "who ?", "context": context, "answers": ["cat"], "answer_start": 19}
    (found,) = task.normalize_rows([{**raw[0], "answers": ["cat"]}], DataConfig(), "train")
    assert found["answer_start"] == 4
    assert "answer_start" not in task.normalize_rows(raw, DataConfig(), "evaluation")[0]
    positions = [int(each["start_positions"]) for each in task.examples([given, found], tokenizer, 36)]
    assert positions[0] - positions[1] == 4  # words, here tokens


def test_an_answer_that_fits_no_window_gets_position_zero(sided: Any) -> None:
    task = get_task("question-answering")
    context = "the dog ran under the tree " * 20
    rows = [{"question": "who ?", "context": context, "answers": [context.strip()]}, *labelled_rows(task.name, 1)]
    examples = task.examples(rows, sided, 36)
    assert [int(examples[0][key]) for key in task.label_names] == [0, 0]
    batch = task.collate(examples, sided)
    assert batch["input_ids"][0, batch["start_positions"][0]] == sided.cls_token_id
    (first,) = task.encode(evaluation_set(rows[:1], sided, 1))
    assert torch.equal(examples[0]["input_ids"], first["input_ids"])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"text": ["dog"], "answer_start": [4]}, r"stands in the context at character 4 \(answer_start\), found 'dog'"),
        ({"text": ["cat"], "answer_start": [-18]}, "at character -18"),
        (["dog"], "stands in the context, found 'dog' in row 1"),
        ([" "], "found ' ' in row 1"),
        ("", "found '' in row 1"),
    ],
)
def test_bad_answers_of_training_rows(answers: Any, expected: str) -> None:
    raw = [{"question": "who ?", "context": "the cat sat on the mat", "answers": answers}]
    with pytest.raises(DataError, match=expected):
        get_task("question-answering").normalize_rows(raw, DataConfig(), "train")


def test_questions_without_answers_are_all_or_none(tokenizer: Any) -> None:
    task = get_task("question-answering")
    raw = [{"question": "who ?", "context": "the cat sat", "answers": answers} for answers in (["cat"], [])]
    with pytest.raises(DataError, match="found none in row 2"):
        task.normalize_rows(raw, DataConfig(), "train")
    with pytest.raises(DataError, match="found none in row 2"):
        task.examples(task.normalize_rows(raw, DataConfig(), "calibration"), tokenizer, 36)
    (example,) = task.examples(task.normalize_rows(raw[1:], DataConfig(), "train"), tokenizer, 36)
    assert not set(task.label_names) & set(example)


# losses


@pytest.mark.parametrize("name", LABELLED_TASKS)
def test_task_loss_is_that_of_transformers(name: str, sided: Any) -> None:
    task, model = get_task(name), tiny_model("bert", name)
    batch = training_batch(task, sided)
    with torch.no_grad():
        expected = model(**batch).loss
        found = task.task_loss(task.forward(model, batch), batch)
    torch.testing.assert_close(found, expected)
    assert found.dim() == 0


def test_forward_keeps_labels_from_the_model(tokenizer: Any) -> None:
    """Heads of transformers take labels and would compute a loss of their own."""
    for name in LABELLED_TASKS:
        task, model = get_task(name), tiny_model("bert", name)
        batch = training_batch(task, tokenizer)
        for each in (model, nn.DataParallel(model)):
            with torch.no_grad():
                assert set(task.forward(each, batch)) == set(task.output_names)


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_missing_labels_say_what_to_do(name: str, tokenizer: Any) -> None:
    task = get_task(name)
    (batch,) = task.encode(evaluation_set(labelled_rows(name, 3), tokenizer, 99))
    with pytest.raises(DataError, match=r"recover\.task_weight to 0"):
        task.task_loss({"logits": torch.zeros(3, 3)}, batch)


def test_cross_entropy_without_any_label_is_zero_with_a_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_mean_squared_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mean_squared(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_distillation_loss(name: str, temperature: float, tokenizer: Any) -> None:
    task = get_task(name)
    batch = training_batch(task, tokenizer)
    models = [tiny_model("bert", name, seed=seed) for seed in (0, 1)]
    student, teacher = (task.features(task.forward(model, batch), batch) for model in models)
    loss = task.distillation_loss(student, teacher, temperature)
    assert loss.item() > 1e-4
    assert task.distillation_loss(student, student, temperature).item() == pytest.approx(0, abs=1e-6)
    if temperature == 1:
        torch.testing.assert_close(loss, task.divergence(student, teacher))
    elif "logits" in task.output_names and name != "text-regression":
        oracle = nn.functional.kl_div(
            (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="batchmean", log_target=True
        )
        torch.testing.assert_close(loss, 4 * oracle)
    loss.backward()
    assert any(parameter.grad is not None for parameter in models[0].parameters())
    assert all(parameter.grad is None for parameter in models[1].parameters())


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_features_come_from_the_named_outputs_and_some_have_tokens(name: str, tokenizer: Any) -> None:
    task = get_task(name)
    batch = training_batch(task, tokenizer)
    with torch.no_grad():
        outputs = task.forward(tiny_model("bert", name), batch)
    named = {key: outputs[key] for key in task.feature_outputs}
    assert torch.equal(task.features(named, batch), task.features(outputs, batch))
    length = batch["input_ids"].shape[1]
    assert {key for key in named if named[key].dim() > 1 and named[key].shape[1] == length} == task.token_outputs


def test_every_task_says_what_training_needs() -> None:
    for name, task in TASKS.items():
        assert set(task.feature_outputs) <= set(task.output_names), name
        assert task.token_outputs <= set(task.feature_outputs), name


# images


def test_training_on_images(tmp_path: Any) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    raw = [
        {"image": image_module.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)), "label": i}
        for i in range(3)
    ]
    task, model = get_task("image-classification"), tiny_model("vit")
    rows = task.check_labels(task.normalize_rows(raw, DataConfig(), "train"), model.config)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    batch = task.collate(task.examples(rows, processor, 0), processor)
    (encoded,) = task.encode(evaluation_set(rows, processor))
    assert torch.equal(batch["pixel_values"], encoded["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(task.task_loss(task.forward(model, batch), batch), model(**batch).loss)
    bare = task.examples(unlabelled(rows), processor, 0)
    assert [set(each) for each in bare] == [{"pixel_values"}] * 3
    assert task.head_settings(rows)["num_labels"] == 3
