"""Command line: parse, config, stage, artifact. Whatever is heavy is imported in the command that needs it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ziplm_deploy.cli.inputs import on_engines, onnx_files, resolved_recipe, validated
from ziplm_deploy.errors import UsageError, ZipLMError
from ziplm_deploy.recipe import BenchmarkConfig, Environment, Recipe, recipe_reference

if TYPE_CHECKING:
    from ziplm_deploy.progress import Progress
    from ziplm_deploy.reporting.records import FamilyReport


MISSED_TARGET = 3


INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Edge(TyperGroup):
    """The one place where errors become messages and exit codes. Unexpected exceptions keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ZipLMError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("\ninterrupted: nothing half-written is left; the same command continues where it was", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = f" for {error.filename}" if error.filename else ""
            typer.echo(
                f"error: expected free disk space{where}, found none; free some and run the same again", err=True
            )
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Edge,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a Transformer encoder as much faster as you need on this CPU, and measure that it is.",
)


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; fields: ziplm-deploy recipe-reference.")]


OutputDir = Annotated[Path | None, typer.Option("--output-dir", "-o", help="Folder for the run's folder.")]


Speedups = Annotated[str | None, typer.Option(help="Targets instead of the recipe's, as in 1.5,2,3.")]


Seed = Annotated[int | None, typer.Option(help="Seed instead of the recipe's.")]


Threads = Annotated[int | None, typer.Option(help="environment.threads instead of the recipe's.")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, progress on stderr.")]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub id, package:NAME, or the folder of a family member.")],
    as_json: AsJson = False,
) -> None:
    """Show what can be pruned in a model, layer by layer."""
    from ziplm_deploy.cli import console
    from ziplm_deploy.models.inspection import inspect_model

    rows = inspect_model(model)
    console.print_json(rows) if as_json else console.print_rows(model, rows)


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
        work(resolved_recipe(recipe, output_dir, speedups, seed, threads), _progress(quiet))

    app.command(work.__name__, help=work.__doc__)(command)
    return work


def _reporting_stage(
    work: Callable[[Recipe, Progress], FamilyReport],
) -> Callable[[Recipe, Progress], FamilyReport]:
    """The same for work that ends in a report, which may be printed as JSON."""

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
        _finish(work(resolved, _progress(quiet)), resolved, as_json)

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
    """Prune where needed, then write model.onnx of the dense model and of every member."""
    from ziplm_deploy import api

    for name, path in api.export(resolved, progress).items():
        typer.echo(f"{name}: {path.stat().st_size / 1e6:.1f} MB: {path}")


@_stage
def compress(resolved: Recipe, progress: Progress) -> None:
    """Make the further files of every member: model_int8.onnx, model_sparse.onnx, model_sparse_int8.onnx."""
    from ziplm_deploy import api

    for name, path in api.compress(resolved, progress).items():
        typer.echo(f"{name}: {path.stat().st_size / 1e6:.1f} MB: {path}")


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
    rounds: Annotated[int, typer.Option(help="ONNX files: interleaved rounds.")] = 60,
    processes: Annotated[int, typer.Option(help="ONNX files: processes of each, one after the other.")] = 3,
    output: Annotated[Path | None, typer.Option("-o", help="Write the record, with raw samples, to this file.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time all members of a recipe, or any ONNX files, against the first (the baseline), interleaved.

    With several engines, the baseline is the first file on the first engine.
    """
    from ziplm_deploy.cli import console

    missed: list[str] = []
    if any(path.suffix == ".onnx" for path in inputs):
        files = onnx_files(inputs)
        shape = {"batch_size": batch_size, "seq_len": seq_len, "threads": 1 if threads is None else threads}
        names = list(dict.fromkeys(engine or ["onnxruntime"]))
        environments = [validated(Environment, engine=name, **shape) for name in names]
        settings = validated(BenchmarkConfig, rounds=rounds, processes=processes)
        from ziplm_deploy.engines import get_engine
        from ziplm_deploy.latency.benchmark import compare

        for notice in filter(None, (get_engine(item.engine).notice for item in environments)):
            typer.echo(notice, err=True)
        progress, subjects = _progress(quiet), on_engines(files, [item.engine for item in environments])
        what = f"{len(files)} ONNX file(s) on {', '.join(names)}"
        progress.stage(f"benchmark: {what}, and the baseline again, interleaved", 1, 1)
        record = compare(subjects, environments[0], settings, next(iter(subjects)), progress.step)
    elif len(inputs) == 1:
        resolved = resolved_recipe(inputs[0], None, None, None, threads)
        from ziplm_deploy import api
        from ziplm_deploy.recipe import file_label

        record = api.benchmark(resolved, _progress(quiet))
        missed = [
            f"{target:g}x"
            for target in resolved.speedups
            if record.variant(file_label(f"{target:g}x", resolved.compress.target)).speedup
            < target * (1 - resolved.benchmark.tolerance)
        ]
    else:
        raise UsageError(
            f"expected one recipe or ONNX files (*.onnx), found {len(inputs)} other files; name one recipe"
        )
    if output is not None:
        record.save(output)
    console.print_json(record.model_dump(mode="json")) if as_json else console.print_benchmark(record)
    if missed:
        typer.echo(f"missed: {', '.join(missed)}", err=True)
        raise typer.Exit(MISSED_TARGET)


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

    findings = checks.examine()
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


@app.command("recipe-reference")
def print_recipe_reference() -> None:
    """Print every recipe field with default and meaning, as a Markdown table."""
    typer.echo(recipe_reference())


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="report, recipe, table, plan or benchmark.")]) -> None:
    """Print the JSON schema of a file that this program reads or writes."""
    from ziplm_deploy.reporting.schema import json_schema

    typer.echo(json.dumps(json_schema(kind), indent=1))


def main() -> None:
    """Entry point of ``ziplm-deploy``."""
    app()


def _progress(quiet: bool) -> Progress:
    from ziplm_deploy.machine import distributed
    from ziplm_deploy.progress import ConsoleProgress
    from ziplm_deploy.progress import Progress as Silent

    return Silent() if quiet or not distributed.is_first() else ConsoleProgress()


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
    missed = [member for member in report.members if member.verdict == "missed"]
    for member in missed:
        typer.echo(f"missed: {member.name} measured {member.measured_speedup:.2f}x: {member.reason}", err=True)
    if missed:
        raise typer.Exit(MISSED_TARGET)
