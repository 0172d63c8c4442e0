"""From results to what a report page is made of."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..learning.task_free import drift_facts
from ..metrics.accuracy import FORMULAS
from ..runs.result import Result
from . import ReportData

MOST_FLIPS = 24


def report_data(results: Sequence[Result], records: Sequence[Any], kind: str) -> ReportData:
    """
    Args:
        results: the run itself for kind "run"; may be empty for a comparison, whose records name their runs.
        records: `ResultRecord`s.
        kind: "run" or "compare".
    """
    if not records:
        raise RunError("there is nothing to report yet: no task is learned")
    runs = list(results) or [
        Result(p) for p in dict.fromkeys(r.run for r in records) if (Path(p) / "run.yaml").is_file()
    ]
    first = runs[0] if runs else None
    stream: dict[str, Any] = first.config["stream"] if first else {}
    start = next((e for e in (first.journal if first else []) if e["event"] == "start"), {})
    return ReportData(
        title=f"{records[0].recipe} on {records[0].stream}"
        if kind == "run"
        else f"Recipes compared on {records[0].stream}",
        kind=kind,  # type: ignore[arg-type]
        records=[r.model_dump() for r in records],
        stream=records[0].stream,
        scenario=stream.get("scenario", records[0].scenario),
        tasks=records[0].tasks,
        labels=_labels(first) if first else {},
        reverted=first.reverted if kind == "run" and first else (),
        model=records[0].model,
        command=_command(start.get("command") or sys.argv),
        versions={k: str(v) for k, v in start.get("versions", {}).items()},
        created=time.strftime("%Y-%m-%d"),
        formulas=FORMULAS,
        routes=_routes(runs),
        drift=drift_facts(first) if first else None,
        flips=_flips(first) if kind == "run" and first else None,
        losses=_losses(first) if kind == "run" and first else (),
    )


def _routes(runs: Sequence[Result]) -> list[dict[str, Any]]:
    found = [(run, run.routing()) for run in runs]
    return [
        {
            "recipe": run.config["recipe"]["name"],
            "tasks": routing.tasks,
            "accuracy": routing.accuracy,
            "accuracy_micro": routing.accuracy_micro,
            "asked": routing.asked,
            "confusion": routing.confusion.tolist(),
        }
        for run, routing in found
        if routing
    ]


def _losses(result: Result) -> list[dict[str, Any]]:
    last = {e["task"]: e for e in result.journal if e["event"] == "task"}
    events = [last[c.manifest["task"]] for c in result.active if c.manifest["task"] in last]
    told = [(e["task"], e["steps"], [p for p in e.get("losses", ()) if p[1] is not None]) for e in events]
    return [{"task": task, "steps": steps, "points": points} for task, steps, points in told if points]


def _command(argv: Sequence[str]) -> str:
    return shlex.join([Path(argv[0]).name, *argv[1:]])


def _labels(result: Result) -> dict[str, list[str]]:
    texts = result.config["stream"]["labels"]
    known = {}
    for head, scenario in result.readings[:1]:
        _, targets = result.predictions(head, scenario)
        known = {task: [texts[c] for c in sorted(set(found.tolist()))] for task, found in targets.items()}
    return known


def _flips(result: Result) -> list[dict[str, Any]] | None:
    """A few test examples that were right at some point and are wrong at the end; None where the stream is gone."""
    from ..core.errors import PerpetuneError
    from ..learning.gone_data import unchanged
    from ..metrics.flips import flips
    from ..streams import load_again

    if not result.readings:
        return None
    try:
        stream = load_again(result.config["stream"], result.tasks, learned=result.tasks)
        commits = {name: c for c in result.active for name in c.manifest.get("data", {})}
    except (PerpetuneError, TypeError):
        return None
    if not all(task.name in commits and unchanged(commits[task.name], task) for task in stream):
        return None  # the data is not what was learned any more
    rows, targets = result.predictions(*result.readings[0])
    found, flipped = [], flips(rows, targets, result.tasks)
    for task in stream:
        _, indices = flipped.get(task.name, (None, [])) if len(task.test) else (None, [])  # its data may be gone
        for i in list(indices)[: max(1, MOST_FLIPS // max(1, len(stream.tasks)))]:
            example = task.test[int(i)]
            was = next(r[task.name][i] for r in rows if task.name in r and r[task.name][i] == targets[task.name][i])
            now = int(rows[-1][task.name][i])  # -1: a generated answer that is no label, for instance
            entry = {
                "task": task.name,
                "label": stream.labels[example["label"]],
                "was": stream.labels[int(was)],
                "now": stream.labels[now] if now >= 0 else "none of the labels",
            }
            if "image" in example:
                entry["image"] = _picture(example["image"])
            else:
                entry["text"] = " ⏐ ".join(example[c] for c in stream.inputs)[:300]
            found.append(entry)
    return found[:MOST_FLIPS]


def _picture(image: Any) -> str:
    """A PIL image as a PNG in a data URL; photographs in CMYK, which PNG does not know, in RGB."""
    import base64
    import io

    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
