"""How each member of a causal language model continues a few texts, for people to read beside the scores."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.engines.generator import TextGenerator, text_behind
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.models.causal import end_tokens
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run
from ziplm_deploy.tasks import ModelFunction
from ziplm_deploy.tasks.record import Continuations

N_PROMPTS, MOST_TOKENS = 3, 24  # of the beginning, and as many new ones


def continue_texts(run: Run) -> None:
    """Greedy continuations of beginnings of evaluation windows, by the exported file of every model."""
    if not run.task.is_causal:
        return
    for member in run.members:
        _continue(run, member)


def continuations_of(run: Run, member: Member) -> Continuations | None:
    """What a member wrote; None where nothing was evaluated."""
    path = member.continuations
    return Continuations.load(path) if run.recipe.data.evaluation is not None and path.exists() else None


def _continue(run: Run, member: Member) -> None:
    served = member.as_exported if run.recipe.target.is_exported else member.file(run.recipe.target)
    path = served.path if served.path.exists() else member.as_exported.path
    key = content_key(
        file=run.file_hash(path),
        data=run.data.evaluation_key,
        engine=run.engine_versions[run.recipe.environment.engine],
        tokens=[N_PROMPTS, MOST_TOKENS],
        ends=end_tokens(run.dense.model, run.dense.processor),
    )

    def work() -> None:
        prompts = _prompts(run)
        write = _in_llama_cpp if run.recipe.environment.runs_gguf else _in_onnxruntime
        texts = write(run, path, prompts)
        Continuations(prompts=prompts, texts=texts).save(member.continuations)

    run.folder.make(f"continue {member.name}", key, [member.continuations], work)


def _in_onnxruntime(run: Run, path: Path, prompts: list[str]) -> list[str]:
    generator = TextGenerator(path.parent, path.name)
    return [generator.generate(prompt, max_new_tokens=_tokens(run)) for prompt in prompts]


def _in_llama_cpp(run: Run, path: Path, prompts: list[str]) -> list[str]:
    """Continuations from a GGUF file, which is asked for the whole text again at each of the few tokens."""
    tokenizer = run.dense.processor
    ends = end_tokens(run.dense.model, tokenizer)

    def continued(model: ModelFunction, prompt: str) -> str:
        ids: list[int] = list(tokenizer(prompt)["input_ids"])
        new: list[int] = []
        for _ in range(_tokens(run)):
            text = np.array([ids + new], np.int64)  # [1, tokens]
            logits = model({"input_ids": text, "attention_mask": np.ones_like(text)})["logits"]
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            new.append(token)
        return text_behind(functools.partial(tokenizer.decode, skip_special_tokens=True), ids, new)

    with open_runner(run.recipe.environment, path) as model:
        return [continued(model, prompt) for prompt in prompts]


def _prompts(run: Run) -> list[str]:
    """Beginnings of windows that are spread over the evaluation data, as text that is not blank."""
    rows, processor = run.data.evaluation_rows, run.dense.processor
    places = dict.fromkeys(round(part * (len(rows) - 1) / max(1, N_PROMPTS - 1)) for part in range(N_PROMPTS))
    texts = [processor.decode(rows[place]["input_ids"][: _tokens(run)]) for place in places]
    return [text for text in texts if text.strip()]


def _tokens(run: Run) -> int:
    """Tokens of a beginning: text that is read again may become a few more, or get a start token."""
    return int(max(1, min(MOST_TOKENS, run.dense.processor.model_max_length // 3)))
