"""Places of a baseline in the run folder: what a user gets from the dense model without pruning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ziplm_deploy.baselines import Baseline, get_baseline


@dataclass(frozen=True)
class BaselineFiles:
    """Folder of one baseline; its name there is its name in benchmarks and tables, too."""

    name: str
    run_folder: Path

    @property
    def page(self) -> Baseline:
        return get_baseline(self.name)

    @property
    def folder(self) -> Path:
        return self.run_folder / "baselines" / self.name

    @property
    def paths(self) -> list[Path]:
        """What was made; the engine is given the first."""
        return [self.folder / name for name in self.page.files]

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")

    @property
    def scores(self) -> Path:
        return self.folder.with_name(f"{self.name}-accuracy.json")

    @property
    def outcomes(self) -> Path:
        return self.folder.with_name(f"{self.name}-outcomes.json")
