"""What commands print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..runs.result import Result


def write_page(results: list[Result], records: list[Any], path: Path, kind: str) -> Path:
    """The report page of a run or a comparison, at `path`."""
    from ..report import write_report
    from ..report.collect import report_data

    return write_report(path, report_data(results, records, kind))


def write_json(path: Path | None, records: list[Any]) -> None:
    """The records, where the user wants them."""
    from ..metrics.records import write_records

    if path is not None:
        write_records(path, records)


def print_tables(records: list[Any]) -> None:
    """One table for each scenario: recipes down, heads across, final accuracy with spread and forgetting."""
    from rich.console import Console

    from ..metrics.records import aggregate, table

    aggregated = aggregate(records)
    for kind in dict.fromkeys(r.scenario for r in records):
        Console().print(table(aggregated, kind))


def print_failed(failed: list[tuple[str, str]]) -> None:
    """The runs of a comparison that failed, with the reason, on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not failed:
        return
    table = Table("failed", "reason", caption="All others are kept; the same command tries these again.")
    for label, reason in failed:
        table.add_row(Text(label), Text(reason))
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 1000  # a log has no edge: each is one line
    console.print(table)


def show(found: Any) -> None:
    """A dictionary as JSON, anything else as rich shows it."""
    from rich.console import Console

    if isinstance(found, dict):
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log has no edge: names stay whole
    console.print(found)
