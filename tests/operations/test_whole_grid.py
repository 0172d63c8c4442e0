"""Whole comparisons in processes, on a Ray cluster of two machines, and two at a time on one folder: none loses a
run, and a killed one goes on after its last finished task."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from perpetune.metrics.records import read_records
from perpetune.operations.ray_workers import on_ray
from perpetune.runs.directory import read_journal
from tests.calling import call
from tests.conftest import REPOSITORY
from tests.operations.makers import node
from tests.operations.test_workers import Said, job, settings

pytestmark = pytest.mark.processes

DEADLY = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path

import perpetune as pt


@dataclass
class Deadly(pt.Rule):
    """Kills its process in the second task, the first time that it comes there."""

    def begin_task(self, task):
        if task.index == 1:
            try:
                os.close(os.open("killed", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture
def grid_of_two(tiny_bert, word_stream, tmp_path, monkeypatch) -> Path:
    """A configuration of two runs, one of which kills its process once; in a folder with the piece that does."""
    lora = {"type": "LoraConfig", "r": 2, "target_modules": ["query"]}
    deadly = {
        "name": "deadly",
        "tuner": lora,
        "rules": [{"type": "Deadly", "module": "deadly"}],
        "consolidation": {"type": "Merge"},
    }
    config = {
        "model": str(tiny_bert(width=16, layers=1)),
        "stream": {"source": str(word_stream), "tasks": ["films", "news"], "train_limit": 16},
        "recipes": [deadly, "lora"],
        "controls": False,
        "imports": ["deadly"],
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8},
        "out": "out",
    }
    (tmp_path / "deadly.py").write_text(DEADLY)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    return tmp_path / "out"


def all_made(out: Path) -> None:
    assert {r.recipe for r in read_records(out / "results.json")} == {"deadly", "lora"}
    events = [(e["event"], e.get("task")) for e in read_journal(out / "deadly" / "seed-0" / "own")]
    assert events == [("start", None), ("task", "films"), ("resume", None), ("task", "news")]


def test_a_killed_run_goes_on_and_the_others_are_kept(grid_of_two, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "compare", "c.yaml", "--jobs", 2)
    assert code == 0 and "deadly seed 0: its process was killed (SIGKILL" in err, err
    all_made(grid_of_two)


def test_two_comparisons_on_one_folder_divide_the_runs(grid_of_two, monkeypatch):
    """The first of which is killed with the run that kills: the other takes it over."""
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    line = [sys.executable, "-m", "perpetune.cli", "compare", "c.yaml"]
    both = [
        subprocess.Popen([*line, "--json", f"{n}.json"], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
        for n in range(2)
    ]
    said = [each.communicate(timeout=600)[1].decode() for each in both]
    assert sorted(each.returncode for each in both) == [-9, 0], said
    all_made(grid_of_two)
    starts = [e["event"] for e in read_journal(grid_of_two / "lora" / "seed-0" / "own")].count("start")
    assert starts == 1, said  # learned by one; the other, if it came there, found all tasks learned
    survivor = next(n for n, each in enumerate(both) if each.returncode == 0)
    assert {r.recipe for r in read_records(Path(f"{survivor}.json"))} == {"deadly", "lora"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two machines, which are processes here, with a CPU each."""
    pytest.importorskip("ray", reason="no Ray: pip install ray")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine takes longer than Ray's 30
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        yield made.address
    finally:
        made.shutdown()


def test_ray_makes_all_runs_on_both_machines_whatever_is_killed(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    todo = [*(job("meet", 2) for _ in range(2)), *(job(name) for name in ("once", "always", "flaky", "broken", "last"))]
    config = settings(on="ray", address=cluster, retries=1)
    with on_ray(partial(node, tmp_path), config, tmp_path / "out", Said()) as workers:
        found = [(job.name, outcome) for job, outcome in workers(todo, False)]
    assert len(found) == len(todo)
    for name, outcome in found:
        assert bool(outcome.records) == (name not in ("always", "broken")), (name, outcome)
        tries = {"always": 2, "once": 2, "flaky": 2, "broken": 1, "last": 1, "meet": 2}[name]
        assert len(list(tmp_path.glob(f"{name}-*"))) == tries, name
    errors = {name: outcome.error for name, outcome in found if outcome.error}
    assert errors["broken"] == "it cannot be made"
    assert "its process or its machine was lost, 2 times: start the same command again" in errors["always"]
    meeting = [outcome.records[0] for name, outcome in found if name == "meet"]
    assert len({record["node"] for record in meeting}) == 2
    assert {record["folder"] for record in meeting} == {str(tmp_path)}
    assert not list((tmp_path / "out").iterdir())  # what shows that the folder is shared is gone


def test_a_whole_comparison_on_ray(cluster, grid_of_two, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "compare", "c.yaml", "--on", "ray", "--address", cluster)
    assert code == 0, err
    all_made(grid_of_two)
