from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from perpetune.report import ReportData


def result(recipe: str = "lora", tasks: Sequence[str] = ("a", "b", "c"), **changes: Any) -> dict[str, Any]:
    """A record as `run` leaves it: each task starts at 0.9 and loses 0.2 with every later one."""
    size = len(tasks)
    joint = recipe == "joint"
    matrix = [
        [
            None if (joint and i < size - 1) or (j > i and not joint) else max(0.0, 0.9 - 0.2 * max(i - j, 0))
            for j in range(size)
        ]
        for i in range(size)
    ]
    several = size > 1 and not joint
    record = {
        "recipe": recipe,
        "seed": 0,
        "scenario": "class",
        "head": "ridge",
        "tasks": list(tasks),
        "matrix": matrix,
        "baseline": [None] * size,
        "test_sizes": [100] * size,
        "final_accuracy": sum(matrix[-1]) / size,
        "average_incremental_accuracy": None if joint else 0.8,
        "forgetting": 0.3 if several else None,
        "backward_transfer": -0.3 if several else None,
        "forward_transfer": None,
        "plasticity": None if joint else 0.9,
        "intransigence": None,
        "flips": 0.25 if several else None,
        "train_seconds": 75.0,
        "evaluate_seconds": 2.5,
        "steps": 300,
        "trainable_parameters": 12345,
        "guarantees": [],
        "per_task": [
            {
                "task": t,
                "train_seconds": 25.0,
                "evaluate_seconds": 0.5,
                "steps": 100,
                "peak_memory_bytes": None,
                "disk_bytes": 2_000_000,
            }
            for t in tasks
        ],
        "run": f"runs/{recipe}-{changes.get('seed', 0)}",
    }
    return {**record, **changes}


def promise(value: float | None, bound: float | None, **changes: Any) -> dict[str, Any]:
    given = {"name": "drift", "value": value, "bound": bound, "unit": "", "source": "Merge", "note": "", "task": "a"}
    return {**given, **changes}


def page_of(records: Sequence[Any], **changes: Any) -> ReportData:
    given: dict[str, Any] = {
        "title": "A trial",
        "kind": "run" if len(records) == 1 else "compare",
        "records": records,
        "stream": "letters",
        "scenario": "class",
        "tasks": records[0]["tasks"] if records and isinstance(records[0], dict) else ["a"],
        "command": "perpetune run --recipe lora",
        "versions": {"perpetune": "0.1.0"},
        "formulas": {"forgetting": "mean over j < T of [max over j ≤ i < T of a(i, j) − a(T, j)]"},
    }
    return ReportData(**{**given, **changes})


@pytest.fixture(name="result")
def _result() -> Callable[..., dict[str, Any]]:
    return result


@pytest.fixture(name="promise")
def _promise() -> Callable[..., dict[str, Any]]:
    return promise


@pytest.fixture(name="page_of")
def _page_of() -> Callable[..., ReportData]:
    return page_of
