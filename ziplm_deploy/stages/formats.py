"""Files of causal language models for other runtimes: GGUF for llama.cpp, and what onnxruntime-genai reads.

They hold the weights of ``model.onnx``, or describe it. GGUF files are timed and scored in llama.cpp if the recipe asks
for it (``benchmark.engines``). Where llama.cpp itself serves, they are what members are exported as.
"""

from __future__ import annotations

from exporters import ExportError, SpecialTokens, write_genai_config
from exporters.genai import CONFIG_NAME
from exporters.gguf_checks import check_parts, check_types
from exporters.gguf_tokenizer import tokenizer_keys
from ziplm_deploy.artifacts import content_key
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError, UnsupportedModelError
from ziplm_deploy.models.causal import end_tokens
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.gguf_source import gguf_package
from ziplm_deploy.models.member_files import load
from ziplm_deploy.recipe import Recipe, Variant
from ziplm_deploy.run import gguf
from ziplm_deploy.run.gguf import GgufFile
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import check_gguf, export_gguf
from ziplm_deploy.stages.stage import Stage


def write_formats(run: Run) -> None:
    """Further files of every model, as ``export.gguf`` and ``export.genai`` ask for them."""
    file_type = run.recipe.export.gguf
    for member in run.members:
        if file_type is not None and not run.recipe.environment.runs_gguf:
            _write_gguf(run, GgufFile(member, file_type))
        else:
            run.folder.set_note("unchecked GGUF", None, member=member.name)
        if run.recipe.export.genai:
            _write_genai(run, member)
        else:
            run.folder.set_note("no genai", None, member=member.name)


def measured_gguf_files(run: Run) -> list[GgufFile]:
    """Files of all members that are timed and scored in llama.cpp beside those of another engine, if asked for."""
    file_type = run.recipe.export.gguf
    if file_type is None or gguf.ENGINE not in run.recipe.benchmark.engines:
        return []
    return [GgufFile(member, file_type) for member in run.members]


def check_formats(run: Run) -> None:
    """Refuse files that this model cannot have, or that nothing here can run, before any long work.

    Raises:
        UnsupportedModelError: the model has a part, or a tokenizer, that GGUF cannot hold; or no token ends its texts.
        EnvironmentMismatchError: the package ``gguf`` is not installed.
        EngineError: llama.cpp is not installed, or a release of it that cannot be asked for logits.
    """
    file_type = run.recipe.export.gguf
    if run.recipe.export.genai and not end_tokens(run.dense.model, run.dense.processor):
        raise UnsupportedModelError(
            "export.genai: expected a token that ends a text, found none in the model's settings or its tokenizer; set "
            "eos_token_id in config.json, or leave the field out"
        )
    if file_type is None:
        return
    gguf_package()
    try:
        check_types(file_type)
        parts = causal_parts(run.dense.model)
        check_parts(parts)
        tokenizer_keys(run.gguf_export.tokenizer, len(parts.embedding), None)
    except ExportError as error:
        way_out = "choose another environment.engine" if run.recipe.environment.runs_gguf else "leave the field out"
        raise UnsupportedModelError(f"export.gguf: {error}; or {way_out}") from error
    if run.recipe.environment.runs_gguf or run.recipe.benchmark.engines:
        get_engine(gguf.ENGINE).start_worker(WorkerOptions()).close()


def _write_gguf(run: Run, file: GgufFile) -> None:
    member, path = file.member, file.path
    key = content_key(weights=run.file_hash(member.weights), type=file.file_type, name=run.recipe.name)

    def work() -> None:
        model = load(member.folder)
        export_gguf(run, model, path, member.name)
        try:
            check_gguf(run, model, path, member.name)
        except EngineError as error:
            if run.recipe.benchmark.engines:
                raise
            unchecked = f"{member.name}: {path.name} was not compared with torch: {error}"
            run.folder.set_note("unchecked GGUF", unchecked, member=member.name)
        else:
            run.folder.set_note("unchecked GGUF", None, member=member.name)

    run.folder.make(f"gguf {member.name}", key, [path], work)


def _write_genai(run: Run, member: Member) -> None:
    path, onnx = member.folder / CONFIG_NAME, member.folder / Variant.FP32.file_name
    tokenizer = run.dense.processor
    tokens = SpecialTokens(end_tokens(run.dense.model, tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id)

    def work() -> None:
        try:
            write_genai_config(onnx, tokens)
        except ExportError as error:  # of a member that lost all attention: the others have theirs
            run.folder.set_note("no genai", f"{member.name}: no {CONFIG_NAME}: {error}", member=member.name)
        else:
            run.folder.set_note("no genai", None, member=member.name)

    run.folder.make(f"genai {member.name}", content_key(onnx=run.file_hash(onnx), tokens=vars(tokens)), [path], work)


def _asked(recipe: Recipe) -> bool:
    return (recipe.export.gguf is not None and not recipe.environment.runs_gguf) or recipe.export.genai


STAGE = Stage("formats", lambda run: "files for other runtimes", write_formats, _asked)
