"""Prints, task by task, what can be had (chance, majority, the untouched model, a task learned alone), and what recipes
keep of it at the end, as tables for a page of docs/results.

python docs/make_tasks.py runs/language/results.json --alone runs/language-alone/*/
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perpetune import Result
from perpetune.metrics.records import ResultRecord, read_records


def percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}" if values else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def floor(record: ResultRecord) -> dict[str, tuple[float, float, float]]:
    """Of each task: chance among its classes, the share of its most frequent class, the untouched model."""
    result = Result(record.run or "")
    _, targets = result.predictions(record.head, "task")
    untouched = result.matrix(record.head, "task").baseline
    counts = {task: np.unique(targets[task], return_counts=True)[1] for task in result.tasks}
    return {t: (1 / len(n), float(n.max() / n.sum()), untouched[i]) for i, (t, n) in enumerate(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="results.json of one comparison or several")
    parser.add_argument("--alone", type=Path, nargs="*", default=[], help="runs on one task each")
    parser.add_argument("--head", default="language")
    options = parser.parse_args()
    records = [r for path in options.records for r in read_records(path) if r.head == options.head]
    told = [r for r in records if r.scenario == "task"]
    known, tasks = floor(told[0]), told[0].tasks
    alone: dict[str, list[float]] = {}
    for path in options.alone:
        result = Result(path)
        alone.setdefault(result.tasks[0], []).append(float(result.matrix(options.head, "task").values[0, 0]))
    rows = [[t, *(percent([value]) for value in known[t]), percent(alone.get(t, []))] for t in tasks]
    print(table(("task", "chance", "majority", "untouched model", "learned alone"), rows), end="\n\n")
    for scenario in ("class", "task"):
        rows = []
        for recipe in dict.fromkeys(r.recipe for r in records):
            some = [r for r in records if (r.recipe, r.scenario) == (recipe, scenario)]
            last = np.array([r.matrix[-1] for r in some], dtype=float)
            rows.append([recipe, *(percent(column.tolist()) for column in last.T), percent(last.mean(1).tolist())])
        print(f"At the end, {scenario}-incremental:\n\n{table(('recipe', *tasks, 'mean'), rows)}\n")


if __name__ == "__main__":
    main()
