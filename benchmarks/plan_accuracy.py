"""The plan beside the run: time, memory and disk, each as a ratio of what was planned to what it took.

    python -m benchmarks.plan_accuracy --model PATH/TO/all-MiniLM-L6-v2 --stream ../shared/streams/cl-benchmark

Plan and run each have a process of their own, one after the other, so that neither peak hides the other. Run it on a
quiet machine: it compares seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .command import Benchmark, Option

RECIPES = ("lora", "pegp_lora_fresh", "sotu", "routed")
TASKS = ("agnews", "amazon", "dbpedia", "sst2", "yelp")


def measured(what: str, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds, peak memory and disk of the plan or of the run, in a new process."""
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--one", what, json.dumps(settings)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def one(what: str, settings: dict[str, Any]) -> dict[str, float]:
    from time import perf_counter

    import perpetune as pt
    from perpetune.core.environment import peak_memory
    from perpetune.operations.plan import make_plan

    stream = pt.load_stream(**settings["stream"])
    with tempfile.TemporaryDirectory() as folder:
        options = {"training": settings["training"], "max_length": settings["max_length"]}
        learner = pt.Learner(settings["model"], settings["recipe"], Path(folder) / "run", **options)
        if what == "plan":
            plan = make_plan(learner, stream)
            return {"seconds": plan.seconds, "memory": plan.memory, "disk": plan.disk, "trial": plan.trial_seconds}
        begun = perf_counter()
        result = learner.learn(stream)
        seconds = perf_counter() - begun
        disk = sum(commit.size for commit in result.commits)
        return {"seconds": seconds, "memory": peak_memory(learner.device), "disk": disk}


def show(record: dict[str, Any]) -> None:
    cells = [record["recipe"]]
    for name, unit, digits in (("seconds", 1, 0), ("memory", 1e6, 0), ("disk", 1e6, 2)):
        plan, run = record["plan"][name], record["run"][name]
        cells += [f"{plan / unit:.{digits}f}", f"{run / unit:.{digits}f}", f"{plan / run:.3f}"]
    print(f"| {' | '.join(cells)} | {record['plan']['trial']:.0f} s |", flush=True)


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.one:
        print(json.dumps(one(options.one[0], json.loads(options.one[1]))))
        return []
    stream = {
        "source": options.stream,
        "tasks": options.tasks.split(","),
        "train_limit": options.train_limit,
        "test_limit": options.test_limit,
    }
    figures = [f"{name}, plan | run | ratio" for name in ("seconds", "memory in MB", "disk in MB")]
    print(f"| recipe | {' | '.join(figures)} | the plan took |")
    print("| --- |" + " --- |" * 10)
    records = []
    for recipe in options.recipes.split(","):
        settings = {"model": options.model, "recipe": recipe, "stream": stream, "max_length": 32}
        settings["training"] = {"num_train_epochs": 1}
        records.append({"recipe": recipe, **{what: measured(what, settings) for what in ("plan", "run")}})
        show(records[-1])
    return records


OPTIONS = (
    Option("--one", None, argparse.SUPPRESS, nargs=2),
    Option("--model", None, "an encoder"),
    Option("--stream", None, "a folder of tasks"),
    Option("--tasks", ",".join(TASKS), "names, with commas"),
    Option("--recipes", ",".join(RECIPES), "names, with commas"),
    Option("--train-limit", 1000, "training rows of a task"),
    Option("--test-limit", 500, "test rows of a task"),
)
main = Benchmark("plan_accuracy", __doc__, OPTIONS, compare).main


if __name__ == "__main__":
    main()
