"""The command that checks what lies in a run directory, and repairs it."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AsJson, Model, Run
from .output import show


def verify(
    run: Run,
    repair: Annotated[
        bool, typer.Option("--repair", help="Go back to the last whole commit; later ones are set aside, not deleted.")
    ] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Also load the base model and compare all its weights with those of the run.")
    ] = False,
    model: Model = None,
    json: AsJson = False,
) -> None:
    """Check every file of a run against the hashes that were written with it, and say what can still be had.

    `perpetune verify runs/weekly`

    Exit code 0 where all is as it was written, 1 where something is damaged. With --repair the first damaged commit and
    all later ones move to a folder `damaged-1` in the run, which then opens after the last whole commit; started again,
    it learns from there to the same bits.

    With --base the weights of the base model are read, whatever is remembered of its files (see `PERPETUNE_CACHE`).
    """
    from ..operations.verify import repair as repaired
    from ..operations.verify import verify as verified

    found, folder = repaired(run) if repair else (verified(run), None)
    show(found.to_dict() if json else found.table())
    if folder is not None:
        typer.echo(f"{folder} holds what was set aside; {run} goes on after {', '.join(found.tasks) or 'no task'}")
    if base:
        from ..models.fingerprint import forgotten
        from ..operations.verify import check_base

        with forgotten():
            check_base(run, model)
        typer.echo("the base model has the weights that the run was made with")
    raise typer.Exit(0 if found.passed or folder is not None else 1)
