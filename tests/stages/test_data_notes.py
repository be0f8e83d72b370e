"""What a run says about its data at its start, and that inputs of all kinds reach model and graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import save_dense, sentences, tiny_tokenizer
from tests.helpers.pipeline import recipe
from tests.helpers.sentence_models import TinySentenceModel
from ziplm_deploy import pipeline
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import DataError
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_data
from ziplm_deploy.tasks import get_task, torch_function
from ziplm_deploy.tasks.batching import tokenize
from ziplm_deploy.tasks.lengths import TokenLengths

Rows = list[dict[str, Any]]


def rows(texts: list[str], **more: Any) -> Rows:
    return [{"text": text, "label": number % 3, **more} for number, text in enumerate(texts)]


def checked(folder: Path, train: Rows, test: Rows, **changes: Any) -> Run:
    """A run whose data were checked; nothing else was done."""
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {"n_calibration": min(len(train), 16), **changes.pop("data", {})}
    with pipeline.begin(recipe(folder, data=data, **changes)) as run:
        check_data(run)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes")
    save_dense(path / "model", task="text-classification")
    return path


def test_lengths_are_counted_and_short_or_cut_texts_noted(folder: Path) -> None:
    short, long = ["the cat sat"] * 15, ["the cat sat on the mat under a tree ."] * 5
    workload = {"workload": {"seq_len": 10}}
    run = checked(folder, rows(["a dog ran"] * 16), rows(short + long), environment=workload, output_dir=f"{folder}/a")
    found = run.folder.lengths["evaluation"]
    expected = {"examples": 20, "median": 5, "p90": 12, "longest": 12, "limit": 10, "cut": 5}
    assert found.model_dump(exclude={"key"}) == expected, "two special tokens each"
    cut, half = run.folder.notes
    assert "25.0% of the evaluation texts (5 of 20, the longest 12 tokens) are longer than 10 tokens" in cut
    assert "no more than 5 tokens, 90 % no more than 12, and speedups are those of requests with 10" in half
    longer = {"workload": {"seq_len": 5}}
    assert (
        checked(
            folder, rows(["a dog ran"] * 16), rows(short), environment=longer, output_dir=f"{folder}/b"
        ).folder.notes
        == []
    )


def test_percentiles_are_lengths_that_occur() -> None:
    found = TokenLengths.of([3, 9, 3, 4], 4, "k", are_cut=True)
    assert (found.median, found.p90, found.cut) == (3, 4, 1)
    assert TokenLengths.of([3, 9], 4, "k", are_cut=False).cut == 0


def test_examples_in_both_data_sets_are_noted(folder: Path) -> None:
    texts = sentences(60)
    workload = {"workload": {"seq_len": 16}}
    train, test = rows(texts[:40]), rows(texts[36:])
    common = len({row["text"] for row in train} & {row["text"] for row in test})
    assert common >= 4
    changes: dict[str, Any] = {"environment": workload, "data": {"n_calibration": 40}}
    notes = checked(folder, train, test, output_dir=f"{folder}/c", **changes).folder.notes
    (note,) = (note for note in notes if "stand in" in note)
    assert f"of {len(test)} evaluation examples stand in the calibration data, too" in note
    assert "training" not in note
    trained = {**changes, "recover": {"mode": "one-shot", "batch_size": 8}}
    notes = checked(folder, train, test, output_dir=f"{folder}/d", **trained).folder.notes
    assert any("in the calibration data, too; " in note and "in the training data, too" in note for note in notes)
    apart = checked(folder, rows(["a dog ran"] * 16), rows(["the cat sat"] * 9), output_dir=f"{folder}/e")
    assert not any("stand in" in note for note in apart.folder.notes)


def test_notes_follow_the_recipe(folder: Path) -> None:
    """In one folder: what trains, what is evaluated and what is served may change."""
    texts = sentences(60)
    train, test = rows(texts[:40]), rows(texts[36:])
    own: dict[str, Any] = {"data": {"n_calibration": 8}, "output_dir": f"{folder}/n"}
    once = checked(folder, train, test, **own).folder
    assert not any("training data, too" in note for note in once.notes)
    trained = checked(folder, train, test, recover={"mode": "one-shot", "batch_size": 8}, **own).folder
    assert any("in the training data, too" in note for note in trained.notes)
    (short,) = (note for note in trained.notes if "half of the evaluation texts" in note)
    assert "static shapes" not in short
    fixed = checked(folder, train, test, export={"shapes": "static"}, **own).folder
    (short,) = (note for note in fixed.notes if "half of the evaluation texts" in note)
    assert "static shapes" in short
    unscored = checked(folder, train, test, **{**own, "data": {"n_calibration": 8, "evaluation": None}}).folder
    assert set(unscored.lengths) == {"calibration"}
    assert not any("evaluation" in note for note in unscored.notes)


def test_lengths_are_counted_once_for_the_same_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = rows(sentences(16)), rows(sentences(9, 1))
    first = checked(folder, train, test, output_dir=f"{folder}/f")
    monkeypatch.setattr(type(first.task), "token_lengths", lambda *_: pytest.fail("counted again"))
    again = checked(folder, train, test, output_dir=f"{folder}/f")
    assert again.folder.lengths == first.folder.lengths
    assert again.folder.notes == first.folder.notes


LEARNS_LABELS: dict[str, Any] = {"recover": {"mode": "one-shot", "batch_size": 8, "task_weight": 1.0}}


def test_how_training_labels_are_read_is_noted(folder: Path) -> None:
    named = pytest.importorskip("datasets").ClassLabel(names=["bad", "good", "fair"])
    data = pytest.importorskip("datasets")
    features = data.Features({"text": data.Value("string"), "label": named})
    train = data.Dataset.from_dict({"text": sentences(16), "label": [0, 1, 2, 1] * 4}, features=features)
    train.to_parquet(folder / "named.parquet")
    given = {"train": str(folder / "named.parquet")}
    plain = rows(sentences(16)), rows(sentences(9, 1))
    notes = checked(folder, *plain, output_dir=f"{folder}/h", data=given, **LEARNS_LABELS).folder.notes
    assert any(note.startswith("training data: the data set names its classes (bad, good, fair)") for note in notes)
    notes = checked(folder, *plain, output_dir=f"{folder}/i", data=given).folder.notes
    assert not any(note.startswith("training data") for note in notes), "labels that no loss reads"


def test_labels_of_both_data_sets_are_read_alike(folder: Path, tmp_path: Path) -> None:
    save_dense(tmp_path / "model", task="text-classification", id2label={0: "1", 1: "2", 2: "3"})
    settings = {"path": str(tmp_path / "model"), "task": "text-classification"}
    from_0 = [{"text": text, "label": number % 3} for number, text in enumerate(sentences(16))]
    without_0 = [{"text": text, "label": 1 + number % 2} for number, text in enumerate(sentences(9, 1))]
    match = r"same in all data, found names of classes in the evaluation data \(the model's are 1, 2, 3 …\)"
    with pytest.raises(DataError, match=match):
        checked(tmp_path, from_0, without_0, model=settings, output_dir=f"{tmp_path}/a", **LEARNS_LABELS)
    assert not (tmp_path / "a").exists()
    checked(tmp_path, without_0 * 2, without_0, model=settings, output_dir=f"{tmp_path}/b", **LEARNS_LABELS)


def test_refused_data_leave_nothing_behind(folder: Path) -> None:
    with pytest.raises(DataError, match="found 7 in row 2"):
        checked(
            folder, rows(["a"] * 16), [{"text": "a", "label": 1}, {"text": "b", "label": 7}], output_dir=f"{folder}/g"
        )
    assert not (folder / "g").exists()


# inputs that tokenizer and model see differently


def without_token_types(tokenizer: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=40,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )


def test_token_types_are_zero_where_the_tokenizer_gives_none(tmp_path: Path) -> None:
    from ziplm_deploy.models.deployed import OnnxExport

    save_dense(tmp_path / "model", task="text-classification")
    without_token_types(tiny_tokenizer(tmp_path / "tokenizer")).save_pretrained(tmp_path / "model")
    pairs = rows(sentences(16), text_pair="a dog")
    pairs = [{"sentence1": row["text"], "sentence2": row["text_pair"], "label": row["label"]} for row in pairs]
    run = checked(tmp_path, pairs, pairs)
    assert "token_type_ids" not in tokenize(run.dense.processor, [{"text": "a"}], 8)[0]
    for batch in run.data.calibration.hessian:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
        assert not batch["token_type_ids"].any()
    OnnxExport.from_recipe(run.recipe, run.task).write(run.dense.model, tmp_path / "model.onnx", "dense")
    data = evaluation_set(run.data.evaluation_rows, run.dense.processor)
    logits = [
        run.task.predict(function, data)  # type: ignore[attr-defined]
        for function in (onnx_runner(tmp_path / "model.onnx"), torch_function(run.task, run.dense.model))
    ]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_token_types_are_left_out_where_the_model_knows_one_segment(tmp_path: Path) -> None:
    save_dense(tmp_path / "model", "roberta", "text-classification")
    tiny_tokenizer(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    pairs = [{"sentence1": text, "sentence2": "a dog", "label": n % 3} for n, text in enumerate(sentences(16))]
    run = checked(tmp_path, pairs, pairs)
    (batch, *_) = run.task.encode(evaluation_set(run.data.calibration_rows, run.dense.processor))
    assert batch["token_type_ids"].any()
    assert all("token_type_ids" not in each for each in run.data.calibration.hessian)
    assert run.task.forward(run.dense.model, batch)["logits"].shape[1] == 3
    examples = run.task.examples(run.data.evaluation_rows, run.dense.processor, 32)
    loss = run.task.task_loss(run.task.forward(run.dense.model, examples[0]), examples[0])
    assert torch.isfinite(loss)


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = None
    plain = without_token_types(tokenizer)
    texts = [{"text": "the cat"}, {"text": "a dog"}, {"text": " "}]
    assert tokenize(plain, texts[:2], 8)[0]["input_ids"] == [5, 7]
    with pytest.raises(DataError, match=r"none in 1 of the 3 .*\(number 3: ' '; .*remove blank rows"):
        tokenize(plain, texts, 8)
    with pytest.raises(DataError, match="number 3: ' '"):
        get_task("text-classification").token_lengths(texts, plain)


def test_rectangular_images_count_their_patches(tmp_path: Path) -> None:
    from PIL import Image

    save_dense(tmp_path / "model", "vit", "image-classification", image_size=[16, 24])
    transformers.ViTImageProcessor(size={"height": 16, "width": 24}).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    images = []
    for number in range(16):
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        images.append({"image": f"{number}.png", "label": number % 3})
    model = {"task": "image-classification"}
    run = checked(tmp_path, images, images, model=model)
    assert run.data.count_tokens() == 16 * (2 * 3 + 1)
    assert run.folder.lengths == {}
    assert any("16 of 16 evaluation examples" in note for note in run.folder.notes)
    assert run.onnx_export.write(run.dense.model, tmp_path / "model.onnx", "dense") < 1e-3


def test_embeddings_that_a_loader_cuts_are_noted(tmp_path: Path) -> None:
    pairs = [{"text": a, "text_pair": b, "label": 1.0} for a, b in zip(sentences(20), sentences(20, 1), strict=True)]
    data = {"text_columns": ["text", "text_pair"], "label_column": "label"}
    for cut in (None, 8):
        path = TinySentenceModel(settings={"truncate_dim": cut}).save(tmp_path / f"m{cut}")
        model = {"path": str(path), "task": "sentence-similarity"}
        run = checked(tmp_path, pairs, pairs[:4], model=model, data=data, output_dir=f"{tmp_path}/{cut}")
        noted = [note for note in run.folder.notes if "to their first 8 numbers (truncate_dim)" in note]
        assert len(noted) == (0 if cut is None else 1)


def test_what_a_loader_cuts_to_is_searched_whatever_else_is_asked_for(tmp_path: Path) -> None:
    for cut, asked, expected in ((8, [4], (4, 8)), (8, None, (8,)), (4096, [4], (4,)), (None, None, None)):
        folder = tmp_path / f"{cut}-{asked}"
        path = TinySentenceModel(settings={"truncate_dim": cut}).save(folder)
        model = ModelConfig(path=str(path), task="sentence-similarity", dimensions=asked)
        assert with_own_settings(model).dimensions == expected


def test_a_pooling_that_nobody_names_is_noted(tmp_path: Path) -> None:
    save_dense(tmp_path / "model")
    pairs = [{"text": a, "text_pair": b, "label": 1.0} for a, b in zip(sentences(20), sentences(20, 1), strict=True)]
    settings = {"path": str(tmp_path / "model"), "task": "sentence-similarity"}
    data = {"text_columns": ["text", "text_pair"], "label_column": "label"}
    for named in ({}, {"pooling": "cls"}):
        folder = f"{tmp_path}/{len(named)}"
        run = checked(tmp_path, pairs, pairs[:4], model={**settings, **named}, data=data, output_dir=folder)
        noted = [note for note in run.folder.notes if "names a pooling" in note]
        assert len(noted) == (0 if named else 1)
        assert named or "the mean of all token vectors, of length 1" in noted[0]
