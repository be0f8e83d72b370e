"""The program itself: errors become messages and exit codes here, and options that several commands share."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ziplm_deploy.errors import ZipLMError

MISSED_TARGET = 3
UNDECIDED = 4  # the measurement is too noisy to say whether a target was reached
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TERMINATED = 143  # 128 + SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in order, as Ctrl-C does."""


_asked: list[KeyboardInterrupt] = []  # by signals, to end the command in hand


def end_in_order() -> None:
    """Let SIGTERM, from ``docker stop`` or a batch system, and Ctrl-C end workers and remove what is half-written.

    A second SIGTERM ends the process at once. Ctrl-C stays without effect where it is, as in a shell's background jobs.
    """

    def end(number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _asked.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise _asked[-1]

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


class _Edge(TyperGroup):
    """The one place where errors become messages and exit codes. Unexpected exceptions keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        _asked.clear()
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            raise _ended(error) from error
        except Exception as error:
            if _asked:  # what is written in C++ makes an error of its own of an interrupt
                raise _ended(_asked[-1]) from error
            if (failure := _failed(error)) is not error:
                raise failure from error
            raise


def _ended(error: KeyboardInterrupt) -> typer.Exit:
    """How a command ends that was asked to."""
    terminated = isinstance(error, Terminated)
    what = "terminated" if terminated else "interrupted"
    typer.echo(f"\n{what}: nothing half-written is left; the same command continues where it was", err=True)
    return typer.Exit(TERMINATED if terminated else INTERRUPTED)


def _failed(error: Exception) -> Exception:
    """How a command ends that raised ``error``; with itself, where nobody expected it."""
    if isinstance(error, ZipLMError):
        typer.echo(f"error: {error}", err=True)
        return typer.Exit(error.exit_code)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        typer.echo(f"error: expected free disk space{where}, found none; free some and run the same again", err=True)
        return typer.Exit(1)
    return error


app = typer.Typer(
    cls=_Edge,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a Transformer as much faster as you need on this CPU, and measure that it is.",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; fields: ziplm-deploy recipe-reference.")]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", "-o", help="Folder for the run's folder.")]
Speedups = Annotated[str | None, typer.Option(help="Targets instead of the recipe's, as in 1.5,2,3.")]
Seed = Annotated[int | None, typer.Option(help="Seed instead of the recipe's.")]
Threads = Annotated[int | None, typer.Option(help="environment.threads instead of the recipe's.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, progress on stderr.")]
