"""The command for models of two towers: one member of each within one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ziplm_deploy.cli.app import MISSED_TARGET, UNDECIDED, AsJson, app


@app.command("pair-towers")
def pair_towers(
    text_run: Annotated[Path, typer.Argument(metavar="TEXT_RUN", help="Folder of a finished run of the text tower.")],
    image_run: Annotated[Path, typer.Argument(metavar="IMAGE_RUN", help="The same of the image tower.")],
    budget_ms: Annotated[float, typer.Option(help="Milliseconds of one request, for all its calls of both towers.")],
    text_calls: Annotated[float, typer.Option(help="Calls of the text tower in one request.")] = 1,
    image_calls: Annotated[float, typer.Option(help="Calls of the image tower in one request.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", help="Write all pairs to this file, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose one member of each tower: the pair that finds most within one budget. Measures no latency."""
    from ziplm_deploy.artifacts import check_writable
    from ziplm_deploy.cli import console
    from ziplm_deploy.reporting import tower_pairs

    if output is not None:
        check_writable(output)
    found = tower_pairs.pair_towers(text_run, image_run, budget_ms, text_calls, image_calls)
    if output is not None:
        found.save(output)
    console.print_json(found.model_dump(mode="json")) if as_json else console.print_tower_pairs(found)
    if found.chosen is not None:
        return
    is_open = any(pair.fits == "undecided" for pair in found.pairs)
    typer.echo(f"{'undecided' if is_open else 'missed'}: no pair fits into {budget_ms:g} ms beyond noise", err=True)
    raise typer.Exit(UNDECIDED if is_open else MISSED_TARGET)
