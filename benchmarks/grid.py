"""What a comparison takes on one and two workers, in processes and on Ray, and when a worker is killed.

    python -m benchmarks.grid

A micro BERT with random weights learns `--tasks` small tasks with LoRA, once for each of `--runs` seeds. Every row is
`perpetune compare` from its start to its end, with one thread a run. The first row is one process without workers; two
comparisons are started at the same time on one folder. A worker that is killed: the first run that has learned half of
its tasks kills its process (SIGKILL). Ray's workers are machines of a cluster that is there before the comparison
begins: processes here, with one CPU each. The last columns say whether the results are those of the first row, and how
many tasks were learned in all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml

from .command import Benchmark, Option, WrongOption
from .many_tasks import make_model, make_stream

# a rule of a user's own, which does what an operating system does when memory runs out
PIECE = """
import os, signal
from dataclasses import dataclass

import perpetune as pt


@dataclass
class Killing(pt.Rule):
    at: int = 1

    def begin_task(self, task):
        if task.index == self.at and os.path.exists("kill"):
            os.remove("kill")
            os.kill(os.getpid(), signal.SIGKILL)
"""
ROWS = [  # who makes the runs, how many of them, and whether one is killed
    ("one process", 1, False),
    ("two comparisons", 2, False),
    *((where, *how) for where in ("processes", "Ray") for how in ((1, False), (2, False), (2, True))),
]
NAMES = tuple(dict.fromkeys(where for where, *_ in ROWS))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    wanted = options.where.split(",")
    if unknown := set(wanted) - set(NAMES):
        raise WrongOption(f"--where takes {','.join(NAMES)}, and not {', '.join(sorted(unknown))}")
    print("| runs are made by | workers | one is killed | seconds | ratio | same results | tasks learned |")
    print("| --- | ---: | --- | ---: | ---: | --- | ---: |")
    found: list[dict[str, Any]] = []
    first: list[Any] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_model(folder / "model")
        make_stream(folder / "stream", options.tasks)
        (folder / "killing.py").write_text(PIECE, encoding="utf-8")
        (folder / "grid.yaml").write_text(yaml.safe_dump(configuration(options)), encoding="utf-8")
        for number, (where, workers, killed) in enumerate(ROWS):
            if where not in wanted:
                continue
            out = folder / f"out-{number}"
            if killed:
                (folder / "kill").touch()
            with cluster(workers) if where == "Ray" else contextlib.nullcontext("") as address:
                seconds = compared(folder, out, where, workers, address)
            if (folder / "kill").exists():
                raise SystemExit(f"{where}: nothing was killed")
            results = results_of(out)
            first = first or results
            record = {"where": where, "workers": workers, "killed": killed, "seconds": seconds}
            record |= {"ratio": seconds / (found[0] if found else record)["seconds"], "same": results == first}
            found.append(record | {"learned": tasks_learned(out)})
            show(found[-1])
    return found


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    lora = {"type": "LoraConfig", "r": 4, "target_modules": ["query", "value"]}
    rule = {"type": "Killing", "module": "killing", "at": options.tasks // 2}
    return {
        "model": "model",
        "stream": "stream",
        "recipes": [{"name": "mine", "tuner": lora, "rules": [rule], "consolidation": {"type": "Merge"}}],
        "seeds": list(range(options.runs)),
        "controls": False,
        "imports": ["killing"],
        "device": "cpu",
        "num_cpus": 1,
        "training": {"max_steps": options.steps, "per_device_train_batch_size": 12},
    }


def compared(folder: Path, out: Path, where: str, workers: int, address: str) -> float:
    """Seconds of the comparison, or of the two."""
    import perpetune

    how = {
        "processes": ["--jobs", str(workers), "--num-gpus", "0"],  # by which a lone worker is a process of its own, too
        "Ray": ["--on", "ray", "--address", address],
    }.get(where, [])
    line = [sys.executable, "-m", "perpetune.cli", "compare", "grid.yaml", "--out", str(out), *how]
    environment = {**os.environ, "PYTHONPATH": str(Path(perpetune.__file__).parents[1])}
    begun = perf_counter()
    started = [
        subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2 if where == "two comparisons" else 1)
    ]
    said = [each.communicate()[1].decode() for each in started]
    seconds = perf_counter() - begun
    if any(each.returncode for each in started):
        raise SystemExit(f"{' '.join(line)}: {said}")
    return seconds


def results_of(out: Path) -> list[Any]:
    """What was found, without times and memory."""
    from perpetune.metrics.records import read_records

    return sorted((r.seed, r.head, r.scenario, r.matrix) for r in read_records(out / "results.json"))


def tasks_learned(out: Path) -> int:
    from perpetune.runs.directory import read_journal

    runs = out.glob("*/seed-*/*/journal.jsonl")
    return sum(event["event"] == "task" for journal in runs for event in read_journal(journal.parent))


@contextlib.contextmanager
def cluster(machines: int) -> Iterator[str]:
    """The address of a Ray cluster of this many machines."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine takes longer than Ray's 30
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(machines - 1):
            made.add_node(num_cpus=1)
        yield made.address
    finally:
        made.shutdown()


def show(record: dict[str, Any]) -> None:
    cells = [record["where"], record["workers"], "yes" if record["killed"] else "", f"{record['seconds']:.1f}"]
    cells += [f"**{record['ratio']:.2f}**", "yes" if record["same"] else "NO", record["learned"]]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


OPTIONS = (
    Option("--runs", 6, "runs of the grid", least=2),
    Option("--tasks", 10, "tasks of each", least=2),
    Option("--steps", 60, "optimizer steps of each task", least=1),
    Option("--where", ",".join(NAMES), "who makes the runs, with commas"),
)
# a row is printed as soon as it is there
main = Benchmark("grid", __doc__, OPTIONS, measure, show=lambda records: None).main

if __name__ == "__main__":
    main()
