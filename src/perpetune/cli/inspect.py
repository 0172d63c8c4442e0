"""Commands that read a finished run: report, log, diff, gate; and list, which shows what there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .kinds import KINDS
from .options import (
    AsJson,
    Import,
    MaxFlips,
    MaxForgetting,
    MaxLossIncrease,
    MinClassAccuracy,
    MinGain,
    Model,
    Run,
    imports,
)
from .output import print_tables, show, write_page

if TYPE_CHECKING:
    from ..metrics.accuracy import AccuracyMatrix


def report(
    path: Annotated[Path, typer.Argument(help="A run directory, or a folder with results.json of a comparison.")],
    convention: Annotated[
        str | None,
        typer.Option(help="Print the figures as other code computes them: pilot, mammoth, avalanche, gem, trace."),
    ] = None,
    geometry: Annotated[
        float | None,
        typer.Option(
            metavar="TOLERANCE", help="Print how the LoRA updates of the tasks lie to each other (collisions above it)."
        ),
    ] = None,
) -> None:
    """Write the report of a run or a comparison again, from what its directory holds."""
    from ..core.errors import ConfigError
    from ..learning.task_free import drift_summary
    from ..metrics.records import read_records
    from ..operations.compare import found_records
    from ..runs.result import Result

    records = read_records(path / "results.json") if (path / "results.json").is_file() else found_records(path)
    if records:
        if geometry is not None:
            raise ConfigError(f"{path} is a comparison: --geometry is for one of its runs ({records[0].run})")
        print_tables(records)
        if convention:
            for record in records:
                label = f"{record.recipe} seed {record.seed} · head {record.head} · {record.scenario}"
                typer.echo(_in_convention(label, record.accuracy_matrix(), convention))
        typer.echo(f"report: {write_page([], records, path / 'report' / 'index.html', 'compare')}")
        return
    result = Result(path)
    typer.echo("\n".join([result.summary(), *drift_summary(result)]))
    if geometry is not None:
        from ..metrics.geometry import geometry_lines

        typer.echo("\n".join(geometry_lines(result.geometry(geometry), geometry)))
    if convention:
        for head, kind in result.readings:
            typer.echo(_in_convention(f"head {head} · {kind}", result.matrix(head, kind), convention))
    typer.echo(f"report: {write_page([result], result.records(), path / 'report' / 'index.html', 'run')}")


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="One of the kinds above; without one, all kinds and the recipes.", metavar="[KIND]"),
    ] = None,
) -> None:
    from rich.console import Console

    from .catalogue import tables

    for part in tables(kind):
        Console().print(part)


_ABOUT = "\n".join(f"- **{name}**: {kind.about}" for name, kind in KINDS.items())
list_.__doc__ = f"""What there is to choose from: what each does, where it is published, and its settings.

`perpetune list recipes`

A recipe is a method, and fills four slots: a tuner, rules, a consolidation (which may need a router) and a head. A
stream is the tasks that it learns. The kinds are:

{_ABOUT}

What installed packages add, under the entry points `perpetune.recipes` and `perpetune.pieces`, is listed with it.
"""


def log(path: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """The tasks that a run has learned, newest last: when, how long, how well right after, how well now."""
    from rich.console import Console

    from ..runs.result import Result
    from .catalogue import log_table

    Console().print(log_table(Result(path)))


def diff(
    run: Run,
    before: Annotated[str | None, typer.Argument(metavar="[A]", help="A task, its number, or untouched.")] = None,
    after: Annotated[str | None, typer.Argument(metavar="[B]", help="The same; default the newest task.")] = None,
    model: Model = None,
    import_: Import = None,
    all_: Annotated[bool, typer.Option("--all", help="All weights that changed, not the first 20.")] = False,
    geometry: Annotated[
        bool, typer.Option("--geometry", help="Also lengths of rows and hyperspherical energy, what rotations keep.")
    ] = False,
    json: AsJson = False,
) -> None:
    """What changed in the weights between two points of a run; by default, what the newest task changed.

    `perpetune diff runs/sotu untouched news`

    For every weight W the change ||W_b - W_a|| / ||W_a|| (Frobenius), the largest first, and the share of entries that
    changed; where tasks leave masked deltas, how many entries the masks share. The points are the base (`untouched`,
    or 0), each task when it was learned (by name) or taken out (`revert-NAME`), or their numbers (1, 2, ...).
    """
    from ..operations.diff import difference

    imports(import_)
    found = difference(run, before, after, model=model, geometry=geometry)
    show(found.to_dict() if json else found.table(None if all_ else 20))


def gate(
    run: Run,
    max_forgetting: MaxForgetting = None,
    min_gain: MinGain = None,
    max_flips: MaxFlips = None,
    max_loss_increase: MaxLossIncrease = None,
    min_class_accuracy: MinClassAccuracy = None,
    head: Annotated[str | None, typer.Option(help="Which head; default the first.")] = None,
    scenario: Annotated[str | None, typer.Option(help="class, task or domain; default that of the stream.")] = None,
    json: AsJson = False,
) -> None:
    """Judge the newest task of a run, for a weekly job: exit code 0 if it may stay, 1 if not, 2 for an error.

    `perpetune run week.yaml && perpetune gate runs/weekly --max-forgetting 0.02 --min-gain 0.01`

    No earlier task may lose more than --max-forgetting. The newest must gain --min-gain over the model before it; over
    the untouched model, or else always predicting its most frequent class, where the head could not name the classes
    before. A broken promise of the newest task closes the gate too. Reads the predictions stored in the run; no model
    is loaded. Tasks whose test data is gone are not judged, and named.

    Where responses are free text that nobody repeats word for word, --min-gain 0 --max-loss-increase 0.1: the loss on
    the test responses of an earlier task, in nats a token, may be so much higher than when the task was learned.

    After `perpetune revert`: no other task may have lost more than --max-forgetting by it.
    """
    from ..operations.gate import judge
    from ..runs.result import Result

    verdict = judge(
        Result(run),
        max_forgetting=max_forgetting,
        min_gain=min_gain,
        max_flips=max_flips,
        max_loss_increase=max_loss_increase,
        min_class_accuracy=min_class_accuracy,
        head=head,
        scenario=scenario,
    )
    show(verdict.to_dict() if json else verdict.table())
    raise typer.Exit(0 if verdict.passed else 1)


def _in_convention(label: str, matrix: AccuracyMatrix, convention: str) -> str:
    from ..metrics.conventions import in_convention

    figures = in_convention(matrix, convention).items()
    told = ", ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in figures)
    return f"{convention} · {label}: {told}"
