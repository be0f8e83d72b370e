"""What the pipeline is a list of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ziplm_deploy.recipe import Recipe
from ziplm_deploy.run.run import Run

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage(Generic[Result]):
    """One stage: a function of the run, or of the run and a generation of its members.

    Attributes:
        name: what the console calls it.
        describe: what it is about to do, in words; gets the same arguments as ``work``.
        work: does it; skips by content key what was done before, see ``RunFolder.make``.
        shown: whether a run of this recipe announces it; one that has nothing to do, or only tidies up, is not shown.
    """

    name: str
    describe: Callable[..., str]
    work: Callable[..., Result]
    shown: Callable[[Recipe], bool] = lambda recipe: True

    def __call__(self, run: Run, *generation: Any) -> Result:
        if self.shown(run.recipe):
            run.announce(self.name, self.describe(run, *generation))
        return self.work(run, *generation)
