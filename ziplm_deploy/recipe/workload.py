"""The section ``environment``: where members will serve, and the calls that they will answer there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ziplm_deploy.machine.huge_pages import why_no_huge_pages
from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.choices import page_names

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[page_names("engines", "worker", suffix="_session")]


class Workload(Frozen):
    """The calls that a model serves; today one, which stands for all."""

    batch_size: int = Field(1, ge=1, le=4096, description="Requests in one call: 1 for latency, 16+ for throughput.")
    seq_len: int = Field(128, ge=4, le=8192, description="Tokens a request (ignored for image models).")

    @property
    def scenario(self) -> str:
        """MLPerf name of the serving pattern."""
        return "SingleStream" if self.batch_size == 1 else "Offline"

    def describe(self) -> str:
        return f"batch {self.batch_size}, {self.seq_len} tokens"


class Environment(Frozen):
    """Engine, threads and workload: what a latency belongs to, beside the machine."""

    engine: EngineName = Field(
        "onnxruntime", description="Engine that will serve; `openvino` is an extra, `deepsparse` needs a set-up."
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

    def describe(self) -> str:
        """In words, as reports and error messages show it."""
        pages = ", huge pages" if self.huge_pages else ""
        return f"{self.engine}, {self.workload.describe()}, {self.threads} thread(s){pages}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What results depend on, for content keys; flat, as keys have it since before there were workloads."""
        pages = {"huge_pages": True} if self.huge_pages else {}
        return {"engine": self.engine, "threads": self.threads, **pages, **self.workload.model_dump(mode="json")}


def with_nested_workload(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment as files of schema 1 have it, batch size and tokens beside the engine, in today's form."""
    calls = {name: environment[name] for name in ("batch_size", "seq_len") if name in environment}
    return {**{name: value for name, value in environment.items() if name not in calls}, "workload": calls}
