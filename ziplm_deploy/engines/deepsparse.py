"""DeepSparse on the CPU: the engine that makes zeros fast. It has reached its end of life and pins old packages."""

from __future__ import annotations

from ziplm_deploy.engines.base import Engine
from ziplm_deploy.engines.side import SideEnvironment

ENVIRONMENT = SideEnvironment(
    engine="deepsparse",
    pythons=((3, 11), (3, 10), (3, 9), (3, 8)),
    packages=("deepsparse==1.8.0", "numpy<2", "setuptools<81"),
    notice="DeepSparse's licence allows evaluation, not production use; read it before you deploy",
)


class DeepSparseEngine(Engine):
    """Threads as asked; its worker runs in an environment of its own."""

    name = "deepsparse"
    notice = ENVIRONMENT.notice

    def version(self) -> str:
        return ENVIRONMENT.version()

    def interpreter(self) -> str:
        return ENVIRONMENT.interpreter()

    def disabled_optimizers(self, shapes: str) -> tuple[str, ...]:
        return ()
