"""How each member of a causal language model continues a few texts, for people to read beside the scores."""

from __future__ import annotations

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.engines.generator import TextGenerator
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run
from ziplm_deploy.tasks.record import Continuations

N_PROMPTS, MOST_TOKENS = 3, 24  # of the beginning, and as many new ones


def continue_texts(run: Run) -> None:
    """Greedy continuations of beginnings of evaluation windows, by ``model.onnx`` of every model."""
    if not run.task.is_causal:
        return
    for member in run.members:
        _continue(run, member)


def continuations_of(run: Run, member: Member) -> Continuations | None:
    """What a member wrote; None where nothing was evaluated."""
    path = member.continuations
    return Continuations.load(path) if run.recipe.data.evaluation is not None and path.exists() else None


def _continue(run: Run, member: Member) -> None:
    onnx = member.file(Variant.FP32).onnx
    key = content_key(
        file=run.file_hash(onnx),
        data=run.data.evaluation_key,
        engine=run.engine_versions[run.recipe.environment.engine],
        tokens=[N_PROMPTS, MOST_TOKENS],
    )

    def work() -> None:
        prompts = _prompts(run)
        generator = TextGenerator(member.folder, onnx.name)
        texts = [generator.generate(prompt, max_new_tokens=_tokens(run)) for prompt in prompts]
        Continuations(prompts=prompts, texts=texts).save(member.continuations)

    run.folder.make(f"continue {member.name}", key, [member.continuations], work)


def _prompts(run: Run) -> list[str]:
    """Beginnings of windows that are spread over the evaluation data, as text that is not blank."""
    rows, processor = run.data.evaluation_rows, run.dense.processor
    places = dict.fromkeys(round(part * (len(rows) - 1) / max(1, N_PROMPTS - 1)) for part in range(N_PROMPTS))
    texts = [processor.decode(rows[place]["input_ids"][: _tokens(run)]) for place in places]
    return [text for text in texts if text.strip()]


def _tokens(run: Run) -> int:
    """Tokens of a beginning: text that is read again may become a few more, or get a start token."""
    return int(max(1, min(MOST_TOKENS, run.dense.processor.model_max_length // 3)))
