"""Stock dynamic INT8 of ONNX Runtime: what the one-line export of sentence-transformers writes on this CPU.

``export_dynamic_quantized_onnx_model(model, "avx512_vnni", …)`` (sentence-transformers 5.7 and 6.2,
``backend/quantize.py``) calls ``AutoQuantizationConfig.avx512_vnni(is_static=False)`` of optimum-onnx 0.1.0
(``optimum/onnxruntime/configuration.py``), in the same way ``arm64``, ``avx2`` or ``avx512``, and hands it to
``ORTQuantizer.quantize`` (``optimum/onnxruntime/quantization.py``): ``ONNXQuantizer`` in mode ``IntegerOps``, 8-bit
activations without sign, symmetric 8-bit weights (without sign for ``avx2``, with it for the others) with a scale for
each output (``per_channel=True``; ``optimum-cli onnxruntime quantize`` has it off unless asked), full range, every
operator of ``IntegerOpsRegistry``: also products of activations and embeddings, which this package leaves as they are.

The name of the CPU is the user's choice there; here it follows the CPU's flags. optimum itself writes the file where it
is installed. transformers 5 does not go with it: there the same quantizer gets the same arguments.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import onnx

from ziplm_deploy.baselines.base import Baseline, DenseSource, installed_version, said
from ziplm_deploy.compression.int8.scales import quiet
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.machine.scratch import scratch_root

# Names that optimum has, the best for a CPU first: a flag that it needs, whether weights have a sign.
PRESETS = {
    "avx512_vnni": ("avx512_vnni", True),
    "avx512": ("avx512f", True),
    "avx2": ("avx2", False),
    "arm64": ("asimd", True),
}
OPTIMUM = "optimum-onnx"
READ_IN = "0.1.0"  # release of optimum-onnx that the arguments are of


def preset_of(machine: MachineInfo) -> str:
    """Name of optimum's settings for a CPU; raises :class:`EngineError` where it has none."""
    for name, (flag, _) in PRESETS.items():
        if flag in machine.isa_flags:
            return name
    raise EngineError(
        f"expected a CPU with AVX2 or ARM's NEON, which stock INT8 has settings for, found {machine.cpu_model}; leave "
        "onnxruntime-int8 out of benchmark.baselines"
    )


def optimum_version() -> str | None:
    """Version of the installed optimum-onnx; None without it."""
    try:
        return installed_version(OPTIMUM, "")
    except EngineError:
        return None


def quantize_with_optimum(source: Path, destination: Path, preset: str) -> None:
    """Write the INT8 file of ``source`` by optimum's own quantizer."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    config = getattr(AutoQuantizationConfig, preset)(is_static=False)
    with tempfile.TemporaryDirectory(prefix="baseline-", dir=scratch_root()) as folder:
        # A file beside no config.json and no tokenizer: optimum would load and save them, too.
        alone = Path(folder) / "source" / "model.onnx"
        alone.parent.mkdir()
        shutil.copyfile(source, alone)
        ORTQuantizer(alone).quantize(config, save_dir=Path(folder), file_suffix="quantized")
        shutil.copyfile(Path(folder) / "model_quantized.onnx", destination)


def quantize_as_optimum(source: Path, destination: Path, preset: str) -> None:
    """Write the same file by the quantizer that optimum calls, with optimum's arguments."""
    from onnxruntime.quantization import QuantizationMode, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    has_sign = PRESETS[preset][1]
    quantizer = ONNXQuantizer(
        model=onnx.load(str(source)),
        static=False,
        per_channel=True,
        mode=QuantizationMode.IntegerOps,
        weight_qType=QuantType.QInt8 if has_sign else QuantType.QUInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        reduce_range=False,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(IntegerOpsRegistry),
        extra_options={
            "WeightSymmetric": True,
            "ActivationSymmetric": False,
            "EnableSubgraph": False,
            "ForceSymmetric": False,
        },
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(destination), False)


class OnnxRuntimeInt8(Baseline):
    """Dynamic INT8 with optimum's settings for this CPU."""

    title: ClassVar[str] = "stock dynamic INT8 of ONNX Runtime"
    engine: ClassVar[str] = "onnxruntime"
    files: ClassVar[tuple[str, ...]] = ("model.onnx",)
    scales_span_batch: ClassVar[bool] = True

    def tool(self) -> str:
        own, version = optimum_version(), installed_version("onnxruntime", "pip install onnxruntime")
        if own is not None:
            return f"{OPTIMUM} {own} with onnxruntime {version}"
        return f"onnxruntime {version}, arguments of {OPTIMUM} {READ_IN}"

    def settings(self, machine: MachineInfo) -> str:
        return f"AutoQuantizationConfig.{preset_of(machine)}(is_static=False)"

    def make(self, dense: DenseSource, folder: Path) -> None:
        write = quantize_as_optimum if optimum_version() is None else quantize_with_optimum
        try:
            with quiet():
                write(dense.onnx, folder / self.files[0], preset_of(dense.machine))
        except (EngineError, OSError):
            raise
        except Exception as error:  # what quantizers raise shares no base
            raise EngineError(
                f"expected {self.tool()} to quantize {dense.onnx}, found: {said(error)}; leave onnxruntime-int8 out of "
                "benchmark.baselines"
            ) from error


BASELINE = OnnxRuntimeInt8()
