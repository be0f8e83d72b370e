"""Tokens a second of SmolLM2's files here and of other engines: prefill and decode, one thread, one interleaved run.

``python benchmarks/decoder_speed.py --run FOLDER`` takes a finished run, such as ``quickstart_decoder.yaml``, its
files in float32 and in INT8 if it has them, and beside them the dense model in torch, in llama.cpp
(F16, Q8_0, Q4_0; the extra llamacpp), in stock ``ORTModelForCausalLM`` (``--optimum-python``: an interpreter with
optimum-onnx), in onnxruntime-genai (``--genai-python``) and in OpenVINO (``--openvino-python``: an interpreter with
optimum-intel, whose stateful export it is). ``--compiled``: torch compiled, too, with its cache of one length. Further
folders of ``--run`` add their INT8 files: runs of the same plans with other settings of ``compress.int8``. Each round
starts every contestant once, in random order, in a process of its own with huge pages where the system grants them; a
round's figure is the median of its runs.

Ratios are of the dense model, the other engine's milliseconds over ours; "fastest" is our fastest dense file whose
perplexity is within 3 % of float32, by the run's own scores; those of llama.cpp's files are on the same windows, in
llama.cpp. ``decode_bandwidth_share``: bytes of weights that a token reads, over its time, over what one core reads a
second at best (product of a 512 MB matrix with a vector).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import ROOT, Figure, load_average, write_result
from scipy import stats

from exporters import GgufSettings, export_gguf
from ziplm_deploy.compression.records import Int8Record
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.machine.huge_pages import why_no_huge_pages, with_huge_pages
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.gguf_source import gguf_file_of
from ziplm_deploy.recipe import Recipe, load_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.tasks import EvaluationSet, get_task
from ziplm_deploy.tasks.generation import window_tokens

RUNNERS = ROOT / "benchmarks" / "decoder_speed_runners.py"
GGUF_TYPES = ("F16", "Q8_0", "Q4_0")
ROTARY = ("rotary.cosine", "rotary.sine")  # a token reads one row of them
WITHIN = 0.03  # of float32's perplexity


@dataclass(frozen=True)
class Contestant:
    """A model in an engine; ``bytes_read``: weights that a decoded token reads, 0 where unknown."""

    name: str
    engine: str
    model: Path
    python: str = sys.executable
    perplexity: float | None = None
    bytes_read: int = 0


def all_of_ours(runs: list[Path]) -> list[Contestant]:
    """Files of the first run, and the compressed ones of the others."""
    found = ours(runs[0])
    for run in runs[1:]:
        found += [each for each in ours(run) if not each.name.endswith(" fp32")]
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise SystemExit(f"expected runs whose compressed files differ in their settings, found {', '.join(names)}")
    return found


def form_of(recipe: Recipe) -> str:
    """What the INT8 files of a run are called here."""
    settings = recipe.compress.int8
    if settings.mixed:
        return "mixed"
    return "int4" if settings.weight_only_4 else "int8"


def ours(run: Path) -> list[Contestant]:
    """Every file of every model of the run; INT8 files also where the run was stopped before its report had them."""
    recipe, report = load_recipe(run / "recipe.yaml"), FamilyReport.load(run / "report.json")
    found = []
    for member in report.members:
        scores = {file.file: file.accuracy.get("inverse_perplexity") for file in member.files}
        for path in sorted((run / member.folder).glob("model*.onnx")):
            score = scores.get(path.name)
            variant = "fp32" if path.stem == "model" else path.stem.removeprefix("model_")
            if variant == "int8":  # the report may be that of the run before its settings of INT8 changed
                score = Int8Record.load(run / "compression" / member.name / "int8.json").whole_score
            perplexity = None if score is None else 1 / score
            name = f"ours {member.name} {form_of(recipe) if variant == 'int8' else variant}"
            found.append(Contestant(name, "onnxruntime", path, perplexity=perplexity, bytes_read=bytes_read(path)))
    return found


def bytes_read(path: Path) -> int:
    """Weights of a file, but for tables of which a token reads one row: an embedding that no product reads."""
    graph = onnx.load(str(path), load_external_data=False).graph
    products = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    total = 0
    for item in graph.initializer:
        if item.name in products and item.name not in ROTARY:
            size = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.data_type)).itemsize
            total += int(np.prod(item.dims)) * size
    return total


def others(run: Path, folder: Path, options: argparse.Namespace) -> list[Contestant]:
    """The dense model in other engines, as far as they are installed."""
    recipe = load_recipe(run / "recipe.yaml")
    model, processor = load_dense(recipe.model)
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    found = [Contestant("torch eager", "torch", checkpoint)]
    if options.compiled:
        found.append(Contestant("torch compiled", "torch-compiled", checkpoint))
    for kind in GGUF_TYPES:
        path = folder / f"{kind}.gguf"
        source = gguf_file_of(recipe.model.path) or processor
        export_gguf(causal_parts(model), path, source, GgufSettings(kind, kind))  # type: ignore[arg-type]
        perplexity = llama_cpp_perplexity(recipe, processor, path)
        found.append(Contestant(f"llama.cpp {kind}", "llama.cpp", path, perplexity=perplexity))
    if options.optimum_python:
        exported = folder / "optimum"
        command = [options.optimum_python, "-m", "optimum.exporters.onnx", "--model", str(checkpoint)]
        subprocess.run([*command, "--task", "text-generation-with-past", str(exported)], check=True)
        found.append(Contestant("ORTModelForCausalLM", "optimum", exported, options.optimum_python))
    if options.openvino_python:
        exported = folder / "openvino"
        command = [options.openvino_python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", str(checkpoint), "--task", "text-generation-with-past", "--weight-format", "fp32"]
        subprocess.run([*command, str(exported)], check=True)
        found.append(Contestant("OpenVINO", "openvino", exported, options.openvino_python))
    if options.genai_python:
        found.append(Contestant("onnxruntime-genai", "genai", run / "dense", options.genai_python))
    return found


def llama_cpp_perplexity(recipe: Recipe, processor: Any, path: Path) -> float | None:
    """Of a GGUF file in llama.cpp, on the windows that the run scored its files on; None where it scored none."""
    if recipe.data.evaluation is None:
        return None
    task = get_task(recipe.model)
    documents = task.load_rows(recipe.data, "evaluation", recipe.seed)
    rows = task.settle_rows(documents, recipe.data, "evaluation", recipe.seed, processor)
    data = EvaluationSet(rows, processor, window_tokens(recipe.data, processor), batch_size=1)
    environment = recipe.environment.model_copy(update={"engine": "llamacpp"})
    with open_runner(environment, path) as runner:
        return 1 / task.evaluate(runner, data)[task.metric_name]


def started(engine: str, model: Path | None, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one process of a contestant measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if not why_no_huge_pages():
        environment = with_huge_pages(environment)
    command = [python, str(RUNNERS), engine, *([str(model)] if model else [])]
    sizes = {"prefill": options.prefill, "decode": options.decode, "repeats": options.repeats}
    command += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{answer.stderr[-4000:]}")
    return dict(json.loads(answer.stdout.strip().splitlines()[-1]))


def rounds_of(contestants: list[Contestant], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Medians of every contestant, round by round."""
    generator = np.random.default_rng(options.seed)
    found: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    for number in range(options.rounds):
        for index in generator.permutation(len(contestants)):
            contestant = contestants[index]
            answer = started(contestant.engine, contestant.model, contestant.python, options)
            medians = {name: float(np.median(answer[name])) for name in ("prefill_ms", "decode_ms")}
            found[contestant.name].append({**answer, **medians})
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return found


def row_of(contestant: Contestant, rounds: list[dict[str, Any]], prefill: int) -> dict[str, Any]:
    """A contestant's figures with their range over rounds."""
    row: dict[str, Any] = {"name": contestant.name, "engine": contestant.engine, "perplexity": contestant.perplexity}
    for phase, tokens in (("prefill", prefill), ("decode", 1)):
        ms = [each[f"{phase}_ms"] for each in rounds]
        row |= {
            f"{phase}_ms": float(np.median(ms)),
            f"{phase}_ms_spread": [min(ms), max(ms)],
            f"{phase}_tokens_per_second": 1000 * tokens / float(np.median(ms)),
        }
    huge = min(each["huge_page_bytes"] for each in rounds)
    return {**row, "rounds": len(rounds), "version": rounds[0]["version"], "bytes_read": contestant.bytes_read} | {
        "huge_page_megabytes": huge / 1e6
    }


def ratio(slower: list[dict[str, Any]], faster: list[dict[str, Any]], phase: str, goal: str) -> Figure:
    """Milliseconds over milliseconds, round by round: their geometric mean with Student's interval."""
    logs = np.log([a[f"{phase}_ms"] / b[f"{phase}_ms"] for a, b in zip(slower, faster, strict=True)])
    mean, n = float(logs.mean()), len(logs)
    half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    spread = (float(np.exp(logs.min())), float(np.exp(logs.max())))
    return Figure(float(np.exp(mean)), "x", goal, n, spread, (float(np.exp(mean - half)), float(np.exp(mean + half))))


def figures_of(
    contestants: list[Contestant], found: dict[str, list[dict[str, Any]]], gigabytes_per_second: float
) -> dict[str, Figure]:
    """The ratios that the program is for, of the dense model."""
    plain = next(each for each in contestants if each.name == "ours dense fp32")
    limit = (1 + WITHIN) * (plain.perplexity or float("inf"))
    dense = [each for each in contestants if each.name.startswith("ours dense")]
    allowed = [each for each in dense if each is plain or (each.perplexity or float("inf")) <= limit]
    fastest = min(allowed, key=lambda each: float(np.median([a["decode_ms"] for a in found[each.name]])))
    figures = {}
    if "ORTModelForCausalLM" in found:
        stock = found["ORTModelForCausalLM"]
        figures["decode_ratio_to_optimum"] = ratio(stock, found[plain.name], "decode", ">= 1.2")
        figures["prefill_ratio_to_optimum"] = ratio(stock, found[plain.name], "prefill", "")
    if "onnxruntime-genai" in found:
        figures["decode_ratio_to_genai"] = ratio(found["onnxruntime-genai"], found[plain.name], "decode", "")
    for phase in ("decode", "prefill"):
        quantized = found["llama.cpp Q8_0"]
        figures[f"{phase}_ratio_to_llama_cpp_q8"] = ratio(quantized, found[fastest.name], phase, ">= 1.3")
    for each in dense:
        if each is not plain and each is not fastest and each.perplexity and plain.perplexity:
            name = each.name.split()[-1]
            for phase in ("decode", "prefill"):
                rate = ratio(found["llama.cpp Q8_0"], found[each.name], phase, "")
                figures[f"{phase}_ratio_of_{name}_to_llama_cpp_q8"] = rate
            loss = 100 * (each.perplexity / plain.perplexity - 1)
            figures[f"perplexity_loss_of_{name}_percent"] = Figure(loss, "%", "", 1)
    ms = [each["decode_ms"] for each in found[plain.name]]
    shares = [plain.bytes_read / 1e6 / each / gigabytes_per_second for each in ms]
    figures["decode_bandwidth_share"] = Figure(
        float(np.median(shares)), "", ">= 0.8", len(shares), (min(shares), max(shares))
    )
    figures["read_bandwidth"] = Figure(gigabytes_per_second, "GB/s", "", 1)
    if fastest is not plain and fastest.perplexity and plain.perplexity:
        loss = 100 * (fastest.perplexity / plain.perplexity - 1)
        figures["perplexity_loss_of_fastest_percent"] = Figure(loss, "%", "", 1)  # by which it was chosen, so no goal
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folder of a finished run, and of others")
    parser.add_argument("--optimum-python", help="interpreter with optimum-onnx")
    parser.add_argument("--genai-python", help="interpreter with onnxruntime-genai; needs a run with export.genai")
    parser.add_argument("--openvino-python", help="interpreter with optimum-intel")
    parser.add_argument("--compiled", action="store_true", help="torch compiled, too: minutes in its first process")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3, help="requests a process")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contestant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/decoder_speed.json")
    options = parser.parse_args()
    load, recipes = load_average(), [load_recipe(run / "recipe.yaml") for run in options.run]
    with tempfile.TemporaryDirectory(prefix="ziplm-speed-") as folder:
        contestants = all_of_ours(options.run) + others(options.run[0], Path(folder), options)
        for contestant in contestants:  # what fails does so before hours of rounds; what compiles does so here
            started(contestant.engine, contestant.model, contestant.python, options)
        bandwidth = max(started("bandwidth", None, sys.executable, options)["gigabytes_per_second"] for _ in range(3))
        found = rounds_of(contestants, options)
    rows = [row_of(contestant, found[contestant.name], options.prefill) for contestant in contestants]
    settings = {
        "prefill": options.prefill,
        "decode": options.decode,
        "repeats": options.repeats,
        "rounds": options.rounds,
        "threads": 1,
        "int8": {form_of(recipe): recipe.compress.int8.model_dump(mode="json") for recipe in recipes},
        "huge_pages": not why_no_huge_pages(),
        "load_average_before": load,
    }
    write_result("decoder_speed", figures_of(contestants, found, bandwidth), rows, settings, options.output)


if __name__ == "__main__":
    main()
