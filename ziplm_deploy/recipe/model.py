"""The section ``model``: which model, and what it does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.pair_prompt import QWEN3_RERANKER, PairPrompt, takes_instruction

TaskName = Literal[
    "sentence-similarity",
    "text-classification",
    "multi-label-classification",
    "text-regression",
    "reranking",
    "question-answering",
    "token-classification",
    "fill-mask",
    "text-generation",
    "image-classification",
    "image-feature-extraction",
]

Pooling = Literal["mean", "cls", "max", "lasttoken", "pooler"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
ScoreActivation = Literal["Identity", "Sigmoid", "Tanh", "Softplus", "LogSigmoid"]  # they leave the order of scores
_DEFAULTS: dict[str, Any] = {"pooling": "mean", "normalize": True, "prompt": "", "similarity": "cosine"}
_OF_RETRIEVAL = ("query_prompt", "passage_prompt", "dimensions")
OF_CAUSAL_RERANKERS = ("pair_prompt", "instruction", "answer_tokens")


class ModelConfig(Frozen):
    path: str = Field(
        description="Local folder, hub id, or `package:NAME` for a model that an installed Python package ships."
    )
    task: TaskName = Field(description="What the model does; decides head, data columns, metric and ONNX outputs.")
    metric: str | None = Field(
        None,
        description="Metric that budgets, report and choices go by: `f1`, `matthews`, `f1:LABEL`; default: the task's.",
    )
    revision: str | None = Field(None, description="Hub revision; only used with a hub id.")
    pooling: Pooling | None = Field(
        None,
        description="How models of embeddings turn vectors into one: of texts `mean`, `cls`, `max` or `lasttoken`, of "
        "images `cls`, or `mean` or `max` of the patches; default: as the model's files say, else `mean` of tokens, "
        "`cls` of images. Towers of CLIP and SigLIP have their own.",
    )
    normalize: bool | None = Field(
        None,
        description="Scale embeddings to length 1; default: as the model's files say, else true.",
    )
    prompt: str | None = Field(
        None,
        description="Text put before every text (sentence-similarity); default: the model's own default prompt.",
    )
    query_prompt: str | None = Field(
        None,
        description="Text put before every query of `data.retrieval`; default: the prompt `query` of the model's "
        "files, else `model.prompt` of the recipe, as encode_query() has it.",
    )
    passage_prompt: str | None = Field(
        None,
        description="Text put before every passage of `data.retrieval`; default: the prompt `document`, else `passage` "
        "or `corpus` of the model's files, else `model.prompt` of the recipe.",
    )
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="Numbers of an embedding that retrieval is scored with, too, of Matryoshka models; default: the "
        "sizes that the model's files name.",
    )
    similarity: Similarity | None = Field(
        None,
        description="How embeddings are compared: `cosine`, `dot`, `euclidean` or `manhattan`; default: as the model's "
        "files say, else `cosine`.",
    )
    pair_prompt: str | None = Field(
        None,
        description="What a causal reranker reads of a pair: a text with `{query}`, `{document}` and perhaps "
        "`{instruction}`, or `qwen3-reranker` for that of Qwen3-Reranker, or `''` for pairs as the tokenizer puts them "
        "together; default: `qwen3-reranker` for language models of type qwen3.",
        exclude_if=lambda prompt: prompt is None,
    )
    instruction: str | None = Field(
        None,
        min_length=1,
        description="What `{instruction}` in `pair_prompt` stands for; default: the default prompt of the model's "
        "files, else that of Qwen3-Reranker.",
        exclude_if=lambda text: text is None,
    )
    answer_tokens: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="Tokens whose logits make the score of a reranking language model, as its vocabulary spells them: "
        'of yes, and of no, which is taken off; default: as the model\'s files say, else `["yes", "no"]`.',
        exclude_if=lambda tokens: tokens is None,
    )

    score_activation: ScoreActivation | None = Field(
        None,
        description="What stands over the output of text-regression before it is compared with labels, as CrossEncoder "
        "has it: `Sigmoid` for labels of 0 to 1; files hold the output before it; default: as the model's files say, "
        "else `Identity`.",
        exclude_if=lambda name: name is None,
    )

    @field_validator("answer_tokens", mode="before")
    @classmethod
    def _answers_are_texts(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(each, bool) for each in value):
            raise ValueError(
                f'expected texts in quotes, ["yes", "no"], found {value}: YAML reads yes and no without quotes as '
                "true and false; quote them"
            )
        return value

    @model_validator(mode="after")
    def _prompts_fit(self) -> ModelConfig:
        asked = [name for name in OF_CAUSAL_RERANKERS if getattr(self, name) is not None]
        if asked and self.task != "reranking":
            raise ValueError(f"expected task reranking for {asked[0]}, found {self.task}; leave the field out")
        if self.score_activation is not None and self.task != "text-regression":
            raise ValueError(f"expected task text-regression for score_activation, found {self.task}; leave it out")
        if self.pair_prompt:
            PairPrompt.parse(self.pair_prompt)
        if self.instruction is not None and not takes_instruction(
            QWEN3_RERANKER if self.pair_prompt is None else self.pair_prompt
        ):
            raise ValueError(
                "expected a pair_prompt with {instruction} for an instruction, found none in it; leave the field out"
            )
        return self

    @model_validator(mode="after")
    def _images_have_no_last_token(self) -> ModelConfig:
        if self.task == "image-feature-extraction" and self.pooling == "lasttoken":
            raise ValueError(
                "expected model.pooling cls, mean or max for images, which have no last token, found lasttoken"
            )
        return self

    @property
    def makes_embeddings(self) -> bool:
        """Whether the task is to make embeddings, of texts or of images."""
        return self.task in ("sentence-similarity", "image-feature-extraction")

    @property
    def head(self) -> tuple[Pooling, bool]:
        """Pooling and normalization, as they are given or as is usual."""
        settings = self.with_defaults()
        return settings.pooling or "mean", settings.normalize is not False

    @property
    def prompt_of_queries(self) -> str:
        """Text before every query."""
        return (self.prompt or "") if self.query_prompt is None else self.query_prompt

    @property
    def prompt_of_passages(self) -> str:
        """Text before every passage."""
        return (self.prompt or "") if self.passage_prompt is None else self.passage_prompt

    def with_defaults(self) -> ModelConfig:
        """A copy in which every setting of embeddings has a value: its own, or that of a model that says nothing."""
        usual = _DEFAULTS | ({"pooling": "cls"} if self.task == "image-feature-extraction" else {})
        own = self.model_dump(include=set(_DEFAULTS), exclude_none=True)
        return self.model_copy(update={**usual, **own})

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What results depend on, for content keys: not where the model lies, whose content has a hash of its own, nor
        by what it is judged, search included.

        Fields that came later are left out where they are as they were before there were such fields.
        """
        settings = self.with_defaults().model_dump(exclude={"path", "revision", "metric", *_OF_RETRIEVAL})
        added = {"prompt", "similarity", "score_activation", *OF_CAUSAL_RERANKERS}
        return {name: value for name, value in settings.items() if name not in added or value != _DEFAULTS.get(name)}
