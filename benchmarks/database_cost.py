"""What the whole OBS database costs: BERT-base (12 layers, 768/3072, 13 head counts, 45 widths), and growth with shape.

Figures: ``bert_base_seconds``, from Hessians in memory to all levels of all modules, median of the repeats;
``extra_memory_bytes``, highest resident memory less that of the loaded model: Hessians, working memory and levels of
one module at a time, which go to the disk.
Every case runs in a process of its own, since peak memory only ever rises. Inputs are synthetic with the traits of
real ones: few directions carry most of the energy, and the FFN's are GELU outputs whose means are not zero. Collecting
Hessians from a model is not part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics as summary
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Figure, load_average, write_result
from shapes import Shape, dense_model

from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.levels import ffn_widths, head_counts
from ziplm_deploy.models.modules import PrunableModule, output_linear, prunable_modules
from ziplm_deploy.pruning.database import Database, estimate_bytes, iter_levels, save_levels
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.recipe import PruneConfig

HEAD_DIM = 64


def synthetic_stats(width: int, ffn: bool, seed: int) -> InputMoments:
    """Moments of 2 x width tokens: directions of a power-law spectrum, mixed, through GELU for an FFN."""
    generator = torch.Generator().manual_seed(seed)
    latent = min(width, 512)
    scale = torch.arange(1, latent + 1, dtype=torch.float32) ** -0.5
    mixing = torch.randn(latent, width, generator=generator) * scale[:, None]  # [latent, d]
    x = torch.randn(2 * width, latent, generator=generator) @ mixing  # [N, d]
    x += 0.3 * torch.randn(x.shape, generator=generator)
    if ffn:
        x = torch.nn.functional.gelu(x - 1)
    hessian = (x.T @ x).double() / len(x)  # [d, d]
    return InputMoments(hessian, x.mean(0, dtype=torch.float64), len(x))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run_case(shape: Shape, threads: int) -> dict[str, Any]:
    """Build the database of one shape in this process; seconds, bytes, and a check of what was built."""
    torch.set_num_threads(threads)
    model = dense_model(shape)
    modules = prunable_modules(model)
    levels = {"attention": head_counts(shape.heads), "ffn": ffn_widths(shape.intermediate_size)}
    sizes = {module.name: levels[module.kind] for module in modules}
    before_bytes = resident_bytes()
    stats = {
        module.name: synthetic_stats(module.structures * module.group_size, module.kind == "ffn", seed)
        for seed, module in enumerate(modules)
    }
    marks = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "database.safetensors"
        built = iter_levels(model, stats, sizes, PruneConfig(), progress=lambda *_: marks.append(time.perf_counter()))
        save_levels(path, built, sizes)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        database = Database.load(path)
    seconds = {module.name: end - start for module, start, end in zip(modules, marks, marks[1:], strict=False)}
    return {
        "layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "ffn_width": shape.intermediate_size,
        "seconds": marks[-1] - marks[0],
        "ffn_seconds": summary.median(s for name, s in seconds.items() if name.endswith("ffn")),
        "attention_seconds": summary.median(s for name, s in seconds.items() if name.endswith("attention")),
        "extra_memory_bytes": peak_bytes - before_bytes,
        "estimated_bytes": estimate_bytes(modules, sizes, shape.hidden_size),
        "database_bytes": database.size_bytes,
        "levels": sum(len(found) for found in database.modules.values()),
        "largest_check_error": max(check(model, module, stats, database) for module in modules[:2]),
        "load_average": load_average(),
    }


def check(model: torch.nn.Module, module: PrunableModule, stats: dict[str, InputMoments], database: Database) -> float:
    """Difference of stored and directly computed relative error, at a level in the middle."""
    linear, moments = output_linear(model, module), stats[module.name]
    found = database.modules[module.name]
    level = found[sorted(found)[len(found) // 2]]
    columns = (level.kept[:, None] * module.group_size + torch.arange(module.group_size)).flatten()
    weight = linear.weight.detach().double()
    change = weight.clone()
    change[:, columns] -= level.weight.double()
    shift = linear.bias.detach().double() - level.bias.double()
    mean_power = 2 * shift @ (change @ moments.mean) + shift.square().sum()
    error = ((change @ moments.hessian) * change).sum() + mean_power
    bias = linear.bias.detach().double()
    power = ((weight @ moments.hessian) * weight).sum() + 2 * bias @ (weight @ moments.mean) + bias.square().sum()
    difference = abs(float(error / power) - level.relative_error)
    if difference > 1e-5:
        raise AssertionError(f"{module.name}: stored error is off by {difference:.3g}")
    return difference


def run_apart(layers: int, width: int, threads: int) -> dict[str, Any]:
    """:func:`run_case` in a fresh process."""
    command = [sys.executable, __file__, "--case", str(layers), str(width), "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{layers:3d} layers, FFN {width:5d}: {row['seconds']:7.1f} s, {row['extra_memory_bytes'] / 1e9:5.2f} GB extra",
        flush=True,
    )
    return row


def shape_of(layers: int, width: int) -> Shape:
    """FFN four times the hidden size, heads of 64, a vocabulary that plays no part."""
    return Shape(layers, hidden_size=width // 4, heads=width // 4 // HEAD_DIM, intermediate_size=width, vocab_size=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="layers of the main case; other than 12: no BERT-base")
    parser.add_argument("--width", type=int, default=3072, help="FFN width of the main case")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the main case")
    parser.add_argument(
        "--widths", type=int, nargs="*", default=[1536, 3072, 4096, 8192], help="growth, one layer each"
    )
    parser.add_argument("--depths", type=int, nargs="*", default=[3, 6], help="growth, layers at the main width")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/database_cost.json")
    parser.add_argument(
        "--case", type=int, nargs=2, metavar=("LAYERS", "WIDTH"), help="one case; prints its row as JSON"
    )
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(shape_of(*options.case), options.threads)))
        return
    main_rows = [run_apart(options.layers, options.width, options.threads) for _ in range(options.repeats)]
    growth = [run_apart(depth, options.width, options.threads) for depth in options.depths]
    growth += [run_apart(1, width, options.threads) for width in options.widths]
    seconds = [row["seconds"] for row in main_rows]
    memory = [float(row["extra_memory_bytes"]) for row in main_rows]
    n = len(main_rows)
    name = "bert_base" if (options.layers, options.width) == (12, 3072) else "other_shape"
    figures = {
        f"{name}_seconds": Figure(summary.median(seconds), "s", "<= 180", n, (min(seconds), max(seconds))),
        "extra_memory_bytes": Figure(max(memory), "bytes", "<= 4e9", n, (min(memory), max(memory))),
    }
    settings = {"threads": options.threads, "prune": PruneConfig().model_dump(mode="json"), "hidden": "width / 4"}
    write_result("database_cost", figures, main_rows + growth, settings, options.output)


if __name__ == "__main__":
    main()
