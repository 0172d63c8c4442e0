"""The command line: parses, calls, prints. Heavy imports only inside the commands that need them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import ConfigError, LostProcess, PerpetuneError, first_line
from ..core.meeting import first_tells, tell
from ..core.paths import OF_THE_PATH, no_path
from ..core.processes import first, launched
from . import generate, inspect, manage, predict, run, verify

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for panel, commands in {
    "Train": (run.demo, run.run, run.compare),
    "Look": (inspect.report, inspect.log, inspect.diff, inspect.gate),
    "Use": (predict.predict, generate.generate),
    "Make something of a run": (
        manage.adopt,
        manage.export,
        manage.serve_config,
        manage.revert,
        manage.tune_scale,
        verify.verify,
    ),
    "Choose": (inspect.list_, run.recommend),
}.items():
    for command in commands:
        app.command(command.__name__.rstrip("_").replace("_", "-"), rich_help_panel=panel)(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perpetune {__version__} ({', '.join(_beside())})")
        raise typer.Exit


def _beside() -> list[str]:
    """The versions that decide bits, without importing what has them."""
    found = [f"python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"]
    for name in ("torch", "transformers", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


@app.callback()
def perpetune(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and those of torch …")
    ] = False,
) -> None:
    """Fine-tune a pre-trained model on one task after another, and keep what it knew.

    Start with `perpetune demo`. Then give it your own model and a folder of tasks:

    `perpetune run --model sentence-transformers/all-MiniLM-L6-v2 --stream my_tasks/ --recipe routed --out runs/routed`
    """
    if launched() > 1 and context.invoked_subcommand != "run":
        raise ConfigError(
            f"{launched()} processes were started together, which is for `perpetune run`: start this command alone"
        )
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit: 0 where all is well, 1 where a gate is closed or a run of a comparison failed.

    An error is one line on stderr and exit code 2, never a traceback; PERPETUNE_TRACEBACK=1 shows it. Ctrl-C is 130.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            # without typer's own way of showing errors, which takes a box of five lines
            code = app(args=arguments, prog_name="perpetune", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if os.environ.get("PERPETUNE_TRACEBACK"):
            raise
        line = _line(error)
        if first():
            tell(line)
        own = isinstance(error, LostProcess) or not isinstance(error, PerpetuneError)
        if first() or own or not first_tells(line):
            typer.echo(f"perpetune: {line}", err=True)
        code = 2
    if code == 130 and first():  # also from typer, which turns Ctrl-C into it
        typer.echo("perpetune: interrupted; every finished task is safe, the same command goes on after it", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: object) -> None:
    """A warning as a line of its own: where in the code it was raised helps nobody who types commands."""
    if first():
        typer.echo(f"perpetune: warning: {' '.join(str(message).split())}", err=True)


def _line(error: Exception) -> str:
    """One line that tells what is wrong, and of whom an error is that nobody foresaw."""
    if isinstance(error, PerpetuneError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.errno in OF_THE_PATH:
        return no_path(error.filename, error)
    usage = getattr(error, "format_message", None)  # typer's, of whichever click it brings
    if usage is not None:
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context is not None else ""
        return " ".join(usage().split()) + see
    told = (
        " ".join(str(error).split()) if type(error).__module__.startswith(("pydantic", "yaml")) else first_line(error)
    )
    return f"{type(error).__name__}: {told} (unforeseen; PERPETUNE_TRACEBACK=1 shows where)"
