"""The section ``environment``: where members will serve, and the calls that they will answer there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ziplm_deploy.documents import shown
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.machine.huge_pages import why_no_huge_pages
from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.choices import page_names
from ziplm_deploy.recipe.lengths import MAX_TOKENS, MIN_TOKENS, checked_histogram, read_histogram, representative

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[page_names("engines", "worker", suffix="_session")]


LONG_DECODE = 256  # tokens from which on decode calls are timed at a third length of the cache


@dataclass(frozen=True)
class Call:
    """One kind of call that a model answers, and the share of the workload's calls that are of this kind."""

    batch_size: int
    seq_len: int  # tokens a request
    weight: float = 1.0
    cache_length: int | None = None  # tokens before them whose keys and values are cached; None: no causal model

    def describe(self) -> str:
        """Its shape in words."""
        if self.cache_length is None:
            return f"batch {self.batch_size}, {self.seq_len} tokens"
        if not self.cache_length:
            return f"prefill of {self.seq_len} tokens, batch {self.batch_size}"
        return f"decode at {self.cache_length} tokens, batch {self.batch_size}"


class Workload(Frozen):
    """The calls that a model serves: one that stands for all, or calls of several lengths with their shares.

    Of causal language models a request is one prefill and, for every further token, one decode call with a cache that
    has grown by one; its latency is their sum. Decode calls are timed at two or three lengths of the cache, between
    which latency is linear.

    With ``lengths``, ``seq_len`` is the longest: texts are cut at it. A file of texts is counted when a run starts
    (:func:`ziplm_deploy.run.workload.with_counted_lengths`); until then there are no calls.
    """

    batch_size: int = Field(1, ge=1, le=4096, description="Requests in one call: 1 for latency, 16+ for throughput.")
    seq_len: int = Field(128, ge=MIN_TOKENS, le=MAX_TOKENS, description="Tokens a request (ignored for image models).")
    lengths: dict[int, float] | Path | None = Field(
        None,
        exclude_if=lambda lengths: lengths is None,
        description="Instead of `seq_len`: how long requests are, `{tokens: weight, …}`, or a file of lengths "
        "(`.json`, `.csv`, `.txt`) or of texts (`.txt`, `.jsonl`), whose tokens are counted. Up to eight lengths that "
        "stand for all are timed.",
    )

    prefill: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        exclude_if=lambda tokens: tokens is None,
        description="Text-generation, instead of `seq_len`: tokens of a prompt.",
    )
    decode: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        exclude_if=lambda tokens: tokens is None,
        description="Text-generation: tokens that are generated one by one after it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_prompt_and_answer(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "generate" in raw:  # the same with a name around it
            if not isinstance(raw["generate"], Mapping) or {"prefill", "decode", "batch_size"} & set(raw):
                raise ValueError(
                    f"expected generate as {{prefill: tokens, decode: tokens}}, found {shown(raw['generate'])}"
                )
            raw = {**{name: value for name, value in raw.items() if name != "generate"}, **raw["generate"]}
        if not isinstance(raw, dict) or (raw.get("prefill") is None and raw.get("decode") is None):
            return raw
        prefill, decode = raw.get("prefill"), raw.get("decode")
        if prefill is None or decode is None or raw.get("lengths") is not None:
            raise ValueError("expected both prefill and decode, and no lengths, for a workload that generates")
        for name, tokens in (("prefill", prefill), ("decode", decode)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MAX_TOKENS:
                raise ValueError(f"expected {name} as a number of tokens from 1 to {MAX_TOKENS}, found {shown(tokens)}")
        total = prefill + decode
        if not MIN_TOKENS <= total <= MAX_TOKENS:
            raise ValueError(
                f"expected {MIN_TOKENS} to {MAX_TOKENS} tokens of prefill and decode together, found {total}"
            )
        if raw.get("seq_len", total) != total:  # a resolved recipe has all, and they agree
            raise ValueError(f"expected prefill and decode or seq_len, found both ({shown(raw['seq_len'])} tokens)")
        return {**raw, "seq_len": total}

    @model_validator(mode="before")
    @classmethod
    def _of_representative_lengths(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("lengths") is None:
            return raw
        given, file = raw["lengths"], None
        if isinstance(given, (str, Path)):
            file = Path(given)
            histogram = read_histogram(file)
        elif isinstance(given, Mapping):
            histogram = checked_histogram(given)
        else:
            raise ValueError(f"expected lengths as {{tokens: weight, …}} or the path of a file, found {shown(given)}")
        lengths = None if histogram is None else representative(histogram)
        longest = None if lengths is None else max(lengths)
        if raw.get("seq_len", longest) != longest:  # a resolved recipe has both, and they agree
            raise ValueError(
                f"expected seq_len or lengths, found both ({shown(raw['seq_len'])} tokens, and lengths"
                + (f" up to {longest}); leave one of them out" if longest else "); leave one of them out")
            )
        return {**raw, "lengths": file} if lengths is None else {**raw, "lengths": lengths, "seq_len": longest}

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every call that is timed: of encoders from the shortest to the longest, with weights that add up to 1; of a
        causal model a prefill and decode calls, with weights that add up to the calls of a request.

        Raises:
            RecipeError: the lengths are those of texts that were not counted yet.
        """
        if self.prefill is not None and self.decode is not None:
            first, last = self.prefill, self.prefill + self.decode - 1  # cached tokens at the first and last decode
            shares = _trapezoid(first, last, self.decode)
            decodes = (Call(self.batch_size, 1, weight, length) for length, weight in shares.items())
            return (Call(self.batch_size, self.prefill, 1.0, 0), *decodes)
        if self.lengths is None:
            return (Call(self.batch_size, self.seq_len),)
        if isinstance(self.lengths, Path):
            raise RecipeError(
                f"expected counted lengths, found the file of texts {self.lengths}; a run counts them, elsewhere give "
                "environment.workload.lengths as {tokens: weight, …}"
            )
        total = math.fsum(self.lengths.values())
        return tuple(Call(self.batch_size, tokens, weight / total) for tokens, weight in sorted(self.lengths.items()))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of every call."""
        return tuple(call.weight for call in self.calls)

    @property
    def has_several(self) -> bool:
        """Whether there are calls of several kinds."""
        return (self.lengths is not None or self.generates) and len(self.calls) > 1

    @property
    def generates(self) -> bool:
        """Whether it is of a causal language model."""
        return self.prefill is not None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What results depend on, for content keys; of one call, as keys have it since before there were several."""
        one = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        if self.generates:
            return {**one, "prefill": self.prefill, "decode": self.decode}
        return {**one, "calls": [[call.seq_len, call.weight] for call in self.calls]} if self.has_several else one

    @property
    def scenario(self) -> str:
        """MLPerf name of the serving pattern."""
        return "SingleStream" if self.batch_size == 1 else "Offline"

    def describe(self) -> str:
        """In words, as reports and error messages show it."""
        if isinstance(self.lengths, Path):
            return f"batch {self.batch_size}, as long as the texts in {self.lengths.name}"
        if self.generates:
            return f"batch {self.batch_size}, {self.prefill} tokens of prompt and {self.decode} generated"
        if not self.has_several:
            return self.calls[0].describe()
        mean = math.fsum(call.weight * call.seq_len for call in self.calls)
        span = f"{self.calls[0].seq_len} to {self.calls[-1].seq_len} tokens"
        return f"batch {self.batch_size}, {span} ({len(self.calls)} lengths, {mean:.1f} on average)"


def _trapezoid(first: int, last: int, n_calls: int) -> dict[int, float]:
    """Cached tokens of decode calls that are timed, with weights under which a linear latency adds up exactly."""
    if first == last:
        return {first: float(n_calls)}
    if last - first < LONG_DECODE:
        return {first: n_calls / 2, last: n_calls / 2}
    middle = (first + last) / 2
    between = round(middle)
    end, rest = n_calls / 4, n_calls / 2
    shift = rest * (middle - between) / (last - first)  # keeps the mean length where the middle is between two tokens
    return {first: end - shift, between: rest, last: end + shift}


class Environment(Frozen):
    """Engine, threads and workload: what a latency belongs to, beside the machine."""

    engine: EngineName = Field(
        "onnxruntime",
        description="Engine that will serve; `openvino` and `llamacpp` (GGUF files: `export.gguf`) are extras, "
        "`deepsparse` needs a set-up.",
    )
    threads: int = Field(1, ge=1, description="Intra-op threads; never more than the process is granted.")
    huge_pages: bool = Field(
        False,
        description="Serve from huge pages: `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` for every process that is timed, "
        "and for yours; `auto`: where this system grants them.",
    )
    workload: Workload = Field(default_factory=Workload, description="The calls that it will answer.")

    @field_validator("huge_pages", mode="before")
    @classmethod
    def _where_granted(cls, value: object) -> object:
        return not why_no_huge_pages() if value == "auto" else value

    @property
    def runs_gguf(self) -> bool:
        """Whether its engine is llama.cpp, which runs GGUF files and no others."""
        return self.engine == "llamacpp"

    def describe(self) -> str:
        """In words, as reports and error messages show it."""
        pages = ", huge pages" if self.huge_pages else ""
        return f"{self.engine}, {self.workload.describe()}, {self.threads} thread(s){pages}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What results depend on, for content keys; flat, as keys have it since before there were workloads."""
        pages = {"huge_pages": True} if self.huge_pages else {}
        return {"engine": self.engine, "threads": self.threads, **pages, **self.workload.fingerprint}


def with_nested_workload(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment as files of schema 1 have it, batch size and tokens beside the engine, in today's form."""
    calls = {name: environment[name] for name in ("batch_size", "seq_len") if name in environment}
    return {**{name: value for name, value in environment.items() if name not in calls}, "workload": calls}
