"""How far finished runs of a language model have moved from the untouched model, on prompts that belong to no task.

    python -m benchmarks.general_prompts runs/language-smollm2-weeks/*/seed-*/*

What `general:` measures while a run is made, for runs that were made without it: KL(p_0 || p_t) of next-token
distributions, in nats, and the share of prompts to which the greedy answer, or its first token, is still that of the
untouched model. Where every task has an adapter, each prompt is routed to one. Runs are read and left as they are;
those that have not learned all tasks of their stream, or must be told the task, are named and passed over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import perpetune as pt
from perpetune.core.errors import PerpetuneError
from perpetune.learning.general import General, read_general
from perpetune.runs.directory import Run

from .command import Benchmark, Option, WrongOption, figure, quiet_transformers, threads

PROMPTS = Path(__file__).parents[1] / "configs" / "general_prompts.jsonl"


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        prompts = read_general(options.prompts)
    except PerpetuneError as error:
        raise WrongOption(str(error)) from error
    quiet_transformers()
    records = []
    for path in options.runs:
        try:
            found = moved(Path(path), prompts, options.model)
        except PerpetuneError as error:  # the other runs are measured all the same
            found = str(error)
        if isinstance(found, str):
            print(f"{path}: {found}: passed over", file=sys.stderr)
        else:
            records.append(found)
    return records


def moved(path: Path, prompts: Sequence[Any], model: str | None = None) -> dict[str, Any] | str:
    """What was measured of a run, or why nothing was.

    Args:
        prompts: as `Learner` takes them; model: where the base model of the run lies now, if it has moved.
    """
    run = Run.read(path)
    learned = run.commits[-1].manifest["learned"] if run.commits else ()
    tasks = run.config["stream"]["tasks"]
    if not learned or not {*tasks} <= {*learned}:
        return f"not finished, {len(learned)} of {len(tasks)} tasks learned"
    learner = pt.Learner.open(path, general=prompts, **({"model": model} if model else {}))
    if not learner.state.general:
        return "it must be told the task of a prompt"
    general, size = learner.state.general[0], learner.setup.batch_size
    assert isinstance(general, General)
    routed = general.routed(learner.backbone, size, learner.state.consolidation.states)
    answers = general.answers(learner.backbone, size, routed)
    return {
        "recipe": run.config["recipe"]["name"],
        "seed": run.config["seed"],
        "tasks": len(learned),
        "kl": general.kl(learner.backbone, size, routed),
        "first": sum(old[:1] == new[:1] for old, new in answers) / len(answers),
        "same": sum(old == new for old, new in answers) / len(answers),
        "prompts": len(answers),
    }


def show(records: Sequence[dict[str, Any]]) -> None:
    """As a table of the documentation, the smallest KL first."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    for record in sorted(records, key=lambda r: (r["kl"], r["recipe"], r["seed"])):
        print("| " + " | ".join(cell(record) for cell in COLUMNS.values()) + " |")


COLUMNS = {
    "recipe": figure("recipe", "s"),
    "seed": figure("seed", "d"),
    "KL, nats": figure("kl", ".4f"),
    "same first token": figure("first", ".0%"),
    "same answer": figure("same", ".0%"),
    "prompts": figure("prompts", "d"),
}
OPTIONS = (
    Option("runs", None, "run directories", nargs="+"),
    Option("--prompts", str(PROMPTS), "file of prompts, .jsonl or .txt"),
    Option("--model", None, "where the base model lies now, if it has moved"),
    threads(),
)
main = Benchmark("general_prompts", __doc__, OPTIONS, measure, show).main


if __name__ == "__main__":
    main()
