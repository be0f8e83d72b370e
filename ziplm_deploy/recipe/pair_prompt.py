"""The text that a causal reranker reads of a query and a document, as a recipe writes it.

A prompt has ``{query}``, then ``{document}``, and perhaps ``{instruction}`` before. It is all that the model reads: no
special tokens are added. What is too long loses the end of the document; what follows it, from which the model answers,
is kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

QWEN3_RERANKER = "qwen3-reranker"  # name of the prompt of Qwen3-Reranker, from its model card
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PAIR_PROMPTS = {
    QWEN3_RERANKER: (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
}
_PLACE = re.compile(r"\{(instruction|query|document)\}")
_ROLES = {"instruction": "system", "query": "query", "document": "document"}  # of messages, by place


@dataclass(frozen=True)
class PairPrompt:
    """A prompt in pieces: texts at even positions, the names of places between them.

    Raises:
        ValueError: no query before one document, or several documents.
    """

    pieces: tuple[str, ...]
    instruction: str

    def __post_init__(self) -> None:
        places = self.pieces[1::2]
        if places.count("document") != 1 or places[-1] != "document" or "query" not in places:
            raise ValueError(
                "expected {query} and then, once and last, {document}, what is too long loses its end, found "
                f"{', '.join(f'{{{name}}}' for name in places) or 'none'}; write the text that the model was trained "
                "with"
            )

    @classmethod
    def parse(cls, prompt: str, instruction: str | None = None) -> PairPrompt:
        """A prompt by its name or its text."""
        return cls(tuple(_PLACE.split(PAIR_PROMPTS.get(prompt, prompt))), instruction or INSTRUCTION)

    @property
    def tail(self) -> str:
        """What follows the document."""
        return self.pieces[-1]

    def text(self, query: str, document: str) -> str:
        """What the model reads of a pair."""
        values = {"instruction": self.instruction, "query": query, "document": document}
        return "".join(values[piece] if index % 2 else piece for index, piece in enumerate(self.pieces))

    def chat_template(self) -> str:
        """This prompt in Jinja, for messages of the roles ``query`` and ``document``; one of ``system`` instructs anew.

        So do releases of sentence-transformers from 5.4 on put a pair together.
        """
        parts = [self._source(piece) if index % 2 else _literal(piece) for index, piece in enumerate(self.pieces)]
        return "{{ " + " ~ ".join(part for part in parts if part) + " }}"

    def _source(self, place: str) -> str:
        chosen = f'messages | selectattr("role", "eq", "{_ROLES[place]}") | map(attribute="content") | first'
        return f"({chosen} | default({_literal(self.instruction)}))" if place == "instruction" else f"({chosen})"


def takes_instruction(prompt: str) -> bool:
    """Whether a prompt, by its name or its text, has a place for an instruction."""
    return "instruction" in _PLACE.split(PAIR_PROMPTS.get(prompt, prompt))[1::2]


def _literal(text: str) -> str:
    """A text as Jinja writes it; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""
