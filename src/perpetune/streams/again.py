"""`load_again`: the tasks of a stream that a run wrote down."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import ConfigError
from .benchmarks import BENCHMARKS
from .load import load_stream
from .task import Stream
from .tokens import SOURCE, without_rows


def load_again(
    written: Mapping[str, Any], tasks: Sequence[str], source: str | None = None, learned: Collection[str] = ()
) -> Stream:
    """Tasks of the stream that a run wrote down, their classes numbered as they are in the run.

    Args:
        written: `stream` of a run.yaml.
        tasks: which; without any, a stream that has none.
        source: where the data lies now; None: where it lay.
        learned: as in `load_stream`.

    Raises:
        StreamError: the data is missing or malformed.
        ConfigError: the run does not say where its data lay.
    """
    labels, name = written["labels"], written["name"]
    if not tasks:
        return Stream(name, (), tuple(labels), written["scenario"], tuple(written["inputs"]))
    options = {"responses": "stripped", **written["source"], "tasks": list(tasks)}  # as all were read at first
    if source:  # of a benchmark, the data lies elsewhere, and its name stays
        options["data" if options.get("source") in BENCHMARKS and source not in BENCHMARKS else "source"] = source
    if options.get("source") == SOURCE:
        known = tuple(without_rows(task) for task in tasks)
        return Stream(name, known, tuple(labels), written["scenario"], tuple(written["inputs"]), written["source"])
    if "drift" in options:
        raise ConfigError(f"the tasks of `{name}` are parts that were found in a stream: only the run itself has them")
    if "source" not in options:
        raise ConfigError(f"this run does not say where the stream `{name}` comes from: give it (--stream)")
    stream = load_stream(**options, learned=learned)
    if name.endswith("(validation)"):
        stream = stream.on_validation()
    return replace(stream, name=name).numbered(labels)
