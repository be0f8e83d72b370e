"""DeepSparse on the CPU: the engine that makes zeros fast. It has reached its end of life and pins old packages."""

from __future__ import annotations

from ziplm_deploy.artifacts import MachineInfo
from ziplm_deploy.engines.base import Engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine import machine_info
from ziplm_deploy.side_environments import DEEPSPARSE


def check_instruction_sets(machine: MachineInfo) -> None:
    """Raise :class:`EngineError` on a CPU whose instructions the engine was not built for: it would only crash."""
    if not {"avx2", "asimd"} & set(machine.isa_flags):
        raise EngineError(
            f"expected a CPU with AVX2 (or ARM's NEON) for deepsparse, found {machine.cpu_model} with "
            f"{' '.join(machine.isa_flags) or 'none that it knows'}; use engine onnxruntime"
        )


class DeepSparseEngine(Engine):
    """Threads as asked; its worker runs in an environment of its own."""

    name = "deepsparse"
    notice = DEEPSPARSE.notice
    may_abort = True  # an assertion of its compiler fails at some widths, e.g. an FFN of 904 with AVX-512

    def version(self) -> str:
        check_instruction_sets(machine_info())
        return DEEPSPARSE.version()

    def interpreter(self) -> str:
        return DEEPSPARSE.interpreter()
