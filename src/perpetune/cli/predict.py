"""The command that predicts new inputs with a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Import, Model, Run, imports


def predict(
    run: Run,
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Texts, prompts or files of images.", show_default=False)
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="CSV, JSON (lines) or Parquet with the input columns, or a text in a line."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The input with a column `prediction`, as .csv, .jsonl or .parquet."),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="NAME=text", help="What the file calls an input; may be given again.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Which head to read; by default the first of the recipe.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B", help="Choose among these classes alone.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Whose adapter reads, where each task has one; by default the router finds out.")
    ] = None,
    model: Model = None,
    import_: Import = None,
) -> None:
    """Predict new inputs: one label in a line, or a file with them.

    `perpetune predict runs/weekly "where is my parcel"`

    `perpetune predict runs/weekly --input new.csv --output predicted.csv`
    """
    from ..core.errors import ConfigError
    from ..learning.learner import Learner
    from ..streams.predict_files import as_inputs, check_output, picture, read_inputs, write_predictions

    if bool(inputs) == (input_ is not None):
        raise ConfigError("give inputs to predict, or a file of them: `perpetune predict RUN TEXT`, or --input FILE")
    if output is not None:
        if input_ is None:
            raise ConfigError("--output goes with --input; inputs of the command line are answered there")
        check_output(output)
    names = dict(_renamed(text) for text in columns or ())
    imports(import_)
    learner = Learner.open(run, model=model)
    known = tuple(learner.state.known.inputs)
    chosen = None if classes is None else [part.strip() for part in classes.split(",") if part.strip()]
    if input_ is None:
        if known[0] == "image" and len(known) > 1:
            raise ConfigError(f"this run reads {' and '.join(known)} together: give --input FILE with these columns")
        read: dict[str, Callable[[str], Any]] = {"image": picture, "messages": _asked}
        given = list(map(read.get(known[0], str), inputs or ()))
    else:
        rows = read_inputs(input_, known, names)
        given = as_inputs(rows, known)
    predictions = learner.predict(given, head=head, classes=chosen, task=task)
    if output is None:
        typer.echo("\n".join(predictions))
        return
    write_predictions(output, rows, predictions)
    typer.echo(f"{output}: {len(predictions)} predictions")


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _renamed(text: str) -> tuple[str, str]:
    from ..core.errors import ConfigError

    old, separator, new = text.partition("=")
    if not separator or not old.strip() or not new.strip():
        raise ConfigError(f"--columns takes name=text, not `{text}`")
    return old.strip(), new.strip()
