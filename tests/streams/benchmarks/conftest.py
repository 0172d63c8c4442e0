"""Small folders of the layouts in which text benchmarks are published, with all that is known to be odd about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perpetune.streams.benchmarks.instructions import SUPERNI_ORDERS, TRACE_TASKS

STARS = ["very negative", "negative", "neutral", "positive", "very positive"]
# TASK/DATASET of CL_Benchmark -> labels.json, in prompt order
LABELS = {
    "SC/yelp": STARS,
    "SC/amazon": STARS,
    "SC/IMDB": ["Good", "Bad"],
    "SC/SST-2": ["Good", "Bad"],
    "TC/agnews": ["World", "Sports", "Business", "Science or Technology"],
    "TC/dbpedia": ["Company", "Educational Institution", "Artist", "Athlete"],
    "TC/yahoo": ["Society & Culture", "Science & Mathematics", "Health"],
    "NLI/MNLI": ["neutral", "entailment", "contradiction"],
    "NLI/CB": ["entailment", "contradiction", "neutral"],
    "NLI/RTE": ["contradiction", "entailment"],
    "QQP/QQP": ["False", "True"],
    "BoolQA/BoolQA": ["True", "False"],
    "COPA/COPA": ["A", "B"],
    "MultiRC/MultiRC": ["False", "True"],
    "WiC/WiC": ["True", "False"],
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def natural(task: str, split: str, count: int, **more: Any) -> dict[str, Any]:
    """A task file of Natural Instructions."""
    instances = [
        {"id": f"{i}", "input": f"{task} {split} {i}", "output": [f"answer {i % 3}", "other"]} for i in range(count)
    ]
    return {"Definition": [f"Do what {task} asks. "], "Positive Examples": [], "Instances": instances, **more}


@pytest.fixture
def cl_benchmark(tmp_path: Path) -> Path:
    """`CL_Benchmark` with two training and one test row a label; dev.json is test.json; MNLI has a test row "-"."""
    root = tmp_path / "CL_Benchmark"
    for place, labels in LABELS.items():
        rows = {
            split: [{"label": y, "sentence": f"Text: {place} {split} {y} {i}\n"} for i in range(count) for y in labels]
            for split, count in (("train", 2), ("test", 1))
        }
        if place == "NLI/MNLI":
            rows["test"].insert(1, {"label": "-", "sentence": "nobody agreed"})
        for split, file in (("train", "train"), ("test", "test"), ("test", "dev")):
            write(root / place / f"{file}.json", rows[split])
        write(root / place / "labels.json", labels)
    return root


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The folder of TRACE with three, two and two rows a task."""
    root = tmp_path / "LLM-CL-Benchmark_5000"
    for task in TRACE_TASKS:
        for file, count in (("train", 3), ("eval", 2), ("test", 2)):
            rows = [
                {"prompt": f"{task} {file} {i}?", "answer": i if "NumGLUE" in task else f"yes {i}"}
                for i in range(count)
            ]
            write(root / task / f"{file}.json", rows)
    return root


@pytest.fixture
def sapt(tmp_path: Path) -> Path:
    """`CL_Benchmark` of SAPT: four training and two test instances a task, one training answer empty."""
    root = tmp_path / "sapt" / "CL_Benchmark"
    for task in SUPERNI_ORDERS[1]:
        train = natural(task, "train", 4)
        train["Instances"].append({"input": "nothing to say", "output": " "})
        write(root / "SuperNI" / task / "train.json", train)
        for file in ("dev", "test"):
            write(root / "SuperNI" / task / f"{file}.json", natural(task, "test", 2, Definition="Do it."))
    return root


@pytest.fixture
def natural_instructions(tmp_path: Path) -> Path:
    """Natural Instructions: one file a task, twenty instances."""
    root = tmp_path / "natural-instructions"
    for task in SUPERNI_ORDERS[1]:
        write(root / "tasks" / f"{task}.json", natural(task, "all", 20))
    return root
