"""The commands. Whatever is heavy is imported in the command that needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ziplm_deploy.cli import towers  # noqa: F401  its command is registered with its import
from ziplm_deploy.cli.app import (
    MISSED_TARGET,
    UNDECIDED,
    AsJson,
    OutputDir,
    Quiet,
    RecipePath,
    Seed,
    Speedups,
    Threads,
    app,
    end_in_order,
)
from ziplm_deploy.cli.inputs import (
    console_progress,
    memory_limit_bytes,
    on_engines,
    onnx_files,
    resolved_recipe,
    validated,
)
from ziplm_deploy.errors import UsageError
from ziplm_deploy.recipe import BenchmarkConfig, Environment, Recipe, recipe_reference

if TYPE_CHECKING:
    from ziplm_deploy.latency.benchmark import TimedFile
    from ziplm_deploy.latency.record import BenchmarkRecord
    from ziplm_deploy.latency.verdict import Outcome
    from ziplm_deploy.progress import Progress
    from ziplm_deploy.reporting.records import FamilyReport


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, hub id, package:NAME, the folder of a family member, or a model type."),
    ] = None,
    types: Annotated[bool, typer.Option("--types", help="All model types: what can be pruned, or why not.")] = False,
    tower: Annotated[str | None, typer.Option(help="Of a model with two: text or image.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what can be pruned in a model, layer by layer, or in every type of models."""
    from ziplm_deploy.cli import console
    from ziplm_deploy.models import inspection
    from ziplm_deploy.models.model_types import model_type_of, model_types

    if types == (model is not None):
        raise UsageError("expected a model or --types, found " + ("both" if types else "none") + "; give one of them")
    if model is None:
        found = model_types()
        console.print_json([each.as_row() for each in found]) if as_json else console.print_types(found)
        return
    if tower not in (None, "text", "image"):
        raise UsageError(f"expected --tower text or image, found {tower}; name one of the two")
    side = cast(Literal["text", "image"] | None, tower)
    rows = inspection.inspect_model(model, side)
    config = inspection.model_config(model, side)
    kind = model_type_of(config.model_type, config)
    if as_json:
        console.print_json({"type": kind.as_row(), "layers": rows})
        return
    console.print_rows(model, rows)
    console.print_type(kind)


def _stage(work: Callable[[Recipe, Progress], None]) -> Callable[[Recipe, Progress], None]:
    """Make a command of ``work``: it gets a recipe and what users may change in it by options."""

    def command(
        recipe: RecipePath,
        output_dir: OutputDir = None,
        speedups: Speedups = None,
        seed: Seed = None,
        threads: Threads = None,
        quiet: Quiet = False,
    ) -> None:
        work(resolved_recipe(recipe, output_dir, speedups, seed, threads), console_progress(quiet))

    app.command(work.__name__, help=work.__doc__)(command)
    return work


def _reporting_stage(
    work: Callable[[Recipe, Progress], FamilyReport],
) -> Callable[[Recipe, Progress], FamilyReport]:
    """Make a command of ``work`` that ends in a report, which may be printed as JSON."""

    def command(
        recipe: RecipePath,
        output_dir: OutputDir = None,
        speedups: Speedups = None,
        seed: Seed = None,
        threads: Threads = None,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        resolved = resolved_recipe(recipe, output_dir, speedups, seed, threads)
        _finish(work(resolved, console_progress(quiet)), resolved, as_json)

    app.command(work.__name__, help=work.__doc__)(command)
    return work


@_stage
def profile(resolved: Recipe, progress: Progress) -> None:
    """Measure the latency table of the recipe's model on this CPU."""
    from ziplm_deploy import api

    table = api.profile(resolved, progress)
    typer.echo(
        f"{len(table.cells)} cells in {table.total_seconds:.0f} s, dense {table.dense.median_ms:.2f} ms, "
        f"base {table.base.median_ms:.2f} ms: {resolved.run_dir / 'profile.json'}"
    )


@_stage
def prune(resolved: Recipe, progress: Progress) -> None:
    """Profile where needed, then plan and build a smaller torch model for every target."""
    from ziplm_deploy import api

    for name, plan in api.prune(resolved, progress).items():
        place = resolved.run_dir if resolved.recover.mode == "none" else resolved.run_dir / "pruning"
        typer.echo(f"{name}: predicted {plan.predicted_speedup:.2f}x: {place / name}")


@_stage
def recover(resolved: Recipe, progress: Progress) -> None:
    """Prune to measured targets, then train each member towards the dense model's answers."""
    from ziplm_deploy import api

    for name, record in api.recover(resolved, progress).items():
        typer.echo(
            f"{name}: {record.steps} steps in {record.seconds:.0f} s on {record.device}, "
            f"{record.samples_per_second:.0f} examples/s: {resolved.run_dir / name}"
        )


@_stage
def export(resolved: Recipe, progress: Progress) -> None:
    """Prune where needed, then write model.onnx (model.gguf for llama.cpp) of the dense model and of every member."""
    from ziplm_deploy import api
    from ziplm_deploy.artifacts import file_bytes

    for name, path in api.export(resolved, progress).items():
        typer.echo(f"{name}: {file_bytes(path) / 1e6:.1f} MB: {path}")


@_stage
def compress(resolved: Recipe, progress: Progress) -> None:
    """Make the further files of every member: model_int8.onnx, model_sparse.onnx, model_sparse_int8.onnx."""
    from ziplm_deploy import api
    from ziplm_deploy.artifacts import file_bytes

    for name, path in api.compress(resolved, progress).items():
        typer.echo(f"{name}: {file_bytes(path) / 1e6:.1f} MB: {path}")


@app.command()
def benchmark(
    inputs: Annotated[list[Path], typer.Argument(metavar="RECIPE | ONNX...", help="A recipe, or ONNX files.")],
    batch_size: Annotated[int, typer.Option(help="ONNX files: requests in one call.")] = 1,
    seq_len: Annotated[int, typer.Option(help="ONNX files: tokens a request.")] = 128,
    threads: Annotated[int | None, typer.Option(help="Intra-op threads (ONNX files: 1).")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="ONNX files: onnxruntime (default), openvino, deepsparse; again for every file on each."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="ONNX files: interleaved rounds.")] = 80,
    processes: Annotated[int, typer.Option(help="ONNX files: processes of each, one after the other.")] = 5,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="ONNX files: GiB that a process may take; default: the machine's, or the container's."
        ),
    ] = None,
    again: Annotated[bool, typer.Option(help="Recipe: measure again what was measured before.")] = False,
    output: Annotated[Path | None, typer.Option("-o", help="Write the record, with raw samples, to this file.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time all members of a recipe, or any ONNX files, against the first (the baseline), interleaved.

    With several engines, the baseline is the first file on the first engine.
    """
    from ziplm_deploy.artifacts import check_writable
    from ziplm_deploy.cli import console

    if output is not None:
        check_writable(output)  # not after minutes of measuring
    open_targets: dict[str, Outcome] = {}
    if any(path.suffix == ".onnx" for path in inputs):
        if again:
            raise UsageError(
                "expected --again with a recipe, found ONNX files, which are always measured; leave it out"
            )
        workload = {"batch_size": batch_size, "seq_len": seq_len}
        settings = validated(BenchmarkConfig, rounds=rounds, processes=processes)
        names = list(dict.fromkeys(engine or ["onnxruntime"]))
        environments = [
            validated(Environment, engine=name, threads=1 if threads is None else threads, workload=workload)
            for name in names
        ]
        files = on_engines(onnx_files(inputs), names, memory_limit_bytes(memory_limit))
        record = _compare_files(files, environments, settings, console_progress(quiet))
    elif len(inputs) == 1:
        resolved = resolved_recipe(inputs[0], threads=threads)
        record = _compare_members(resolved, console_progress(quiet), again)
        open_targets = _not_reached(record, resolved)
    else:
        raise UsageError(
            f"expected one recipe or ONNX files (*.onnx), found {len(inputs)} other files; name one recipe"
        )
    if output is not None:
        record.save(output)
    console.print_json(record.model_dump(mode="json")) if as_json else console.print_benchmark(record)
    for name, found in open_targets.items():
        typer.echo(f"{found}: {name}", err=True)
    _exit_with(list(open_targets.values()))


def _exit_with(verdicts: Sequence[str]) -> None:
    """Exit code of a run whose targets were judged so; returns if all were reached."""
    if "missed" in verdicts:
        raise typer.Exit(MISSED_TARGET)
    if "undecided" in verdicts:
        raise typer.Exit(UNDECIDED)


def _compare_files(
    files: dict[str, TimedFile], environments: list[Environment], settings: BenchmarkConfig, progress: Progress
) -> BenchmarkRecord:
    """Time every file in every environment; these differ in their engines only."""
    from ziplm_deploy.engines import get_engine
    from ziplm_deploy.latency.benchmark import compare

    names = [environment.engine for environment in environments]
    for notice in filter(None, (get_engine(name).notice for name in names)):
        typer.echo(notice, err=True)
    what = f"{len(files) // len(names)} ONNX file(s) on {', '.join(names)}"
    progress.stage(f"benchmark: {what}, and the baseline again, interleaved", 1, 1)
    return compare(files, environments[0], settings, next(iter(files)), progress.step, note=progress.note)


def _compare_members(recipe: Recipe, progress: Progress, again: bool) -> BenchmarkRecord:
    from ziplm_deploy import api

    return api.benchmark(recipe, progress, again=again)


def _not_reached(record: BenchmarkRecord, recipe: Recipe) -> dict[str, Outcome]:
    """Members of whose targets this record does not say that they are reached."""
    from ziplm_deploy.latency.verdict import outcome
    from ziplm_deploy.recipe import file_label, member_name

    found: dict[str, Outcome] = {}
    for target in recipe.speedups:
        ratio = record.variant(file_label(member_name(target), recipe.target)).ratio
        noisy = record.itself.floor > recipe.benchmark.tolerance
        found[member_name(target)] = "undecided" if noisy else outcome(ratio, target, recipe.benchmark)
    return {name: verdict for name, verdict in found.items() if verdict in ("missed", "undecided")}


@_reporting_stage
def report(resolved: Recipe, progress: Progress) -> FamilyReport:
    """Evaluate and report a benchmarked run again; measures no latency."""
    from ziplm_deploy import api

    return api.report(resolved, progress)


@_reporting_stage
def run(resolved: Recipe, progress: Progress) -> FamilyReport:
    """The whole way: profile, calibrate, prune, export, benchmark, recover, compress, evaluate, report."""
    from ziplm_deploy import api

    return api.run_recipe(resolved, progress)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show CPU, granted cores, engines and how well this machine can time anything (an A/A run)."""
    from ziplm_deploy.cli import console
    from ziplm_deploy.cli import doctor as checks

    findings = checks.examine(note=lambda text: typer.echo(text, err=True))
    console.print_json(findings) if as_json else console.print_findings(findings)


@app.command()
def setup(
    name: Annotated[str, typer.Argument(help="deepsparse or neural-compressor.")],
    python: Annotated[str | None, typer.Option(help="Interpreter to build on, such as python3.11.")] = None,
) -> None:
    """Install an engine or tool whose packages do not fit beside the others, in an environment of its own."""
    from ziplm_deploy.machine.side_environments import ENVIRONMENTS

    if name not in ENVIRONMENTS:
        raise UsageError(f"expected what needs a set-up: {' or '.join(ENVIRONMENTS)}, found {name!r}")
    from ziplm_deploy.engines import ENGINES, get_engine

    if name in ENGINES:
        from ziplm_deploy.machine.info import machine_info

        get_engine(name).check_machine(machine_info())
    environment = ENVIRONMENTS[name]
    typer.echo(f"{environment.notice}; installing into {environment.folder}", err=True)
    interpreter = environment.create(python)
    typer.echo(f"{name} {environment.version(interpreter)}: {interpreter}")
    if environment.variable in os.environ:
        typer.echo(f"{environment.variable} names another Python, which is used instead; unset it", err=True)


@app.command()
def guide(
    name: Annotated[str | None, typer.Argument(help="Name of a guide; without it all are listed.")] = None,
) -> None:
    """Print a guide, or what guides there are."""
    from ziplm_deploy import guides

    if name is not None:
        typer.echo(guides.read_guide(name))
        return
    for each in guides.guide_names():
        typer.echo(f"{each}: {guides.first_sentence(each)}")


@app.command()
def new(
    name: Annotated[str | None, typer.Argument(help="Name of a ready recipe; without it all are listed.")] = None,
) -> None:
    """Print a ready recipe for a task, to be saved and filled in: ziplm-deploy new text-classification > my.yaml."""
    from ziplm_deploy import guides

    typer.echo("\n".join(guides.recipe_names()) if name is None else guides.recipe_text(name).rstrip())


@app.command("recipe-reference")
def print_recipe_reference() -> None:
    """Print every recipe field with default and meaning, as a Markdown table."""
    typer.echo(recipe_reference())


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="report, recipe, table, plan or benchmark.")]) -> None:
    """Print the JSON schema of a file that this program reads or writes."""
    from ziplm_deploy.reporting.schema import json_schema

    typer.echo(json.dumps(json_schema(kind), indent=1))


def _finish(report: FamilyReport, recipe: Recipe, as_json: bool) -> None:
    from ziplm_deploy.cli import console
    from ziplm_deploy.machine import distributed

    if not distributed.is_first():
        return
    if as_json:
        console.print_json(
            {"kind": report.KIND, "schema_version": report.SCHEMA_VERSION, **report.model_dump(mode="json")}
        )
    else:
        console.print_family(report, recipe.run_dir)
    for member in report.members:
        if member.verdict in ("missed", "undecided"):
            measured = f"{member.name} measured {member.served.measured_speedup:.2f}x"
            typer.echo(f"{member.verdict}: {measured}: {member.reason}", err=True)
    _exit_with([member.verdict for member in report.members])


def main() -> None:
    """Entry point of ``ziplm-deploy``."""
    end_in_order()
    app()
