"""The runs of a comparison: divided among comparisons on one folder, and each one's failure its own."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from perpetune.core.errors import ConfigError, RunError
from perpetune.learning.config import CompareConfig
from perpetune.operations import grid
from perpetune.operations.compare import compare, workers
from perpetune.operations.grid import Outcome, attempt, in_turn, outcomes
from perpetune.operations.ray_workers import _there, wants
from perpetune.runs.locks import claimed
from tests.operations.test_workers import Said, job, settings


class Elsewhere:
    """Another comparison, which has the claim to a run until it is told to leave it."""

    def __init__(self, path: Path) -> None:
        self._path, self._leave, there = path, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(there,), daemon=True)
        self._thread.start()
        assert there.wait(10)

    def _hold(self, there: threading.Event) -> None:
        with claimed(self._path) as mine:
            assert mine
            there.set()
            self._leave.wait(60)

    def leaves(self) -> None:
        self._leave.set()
        self._thread.join()


def test_a_claim_is_one_process_s_and_is_waited_for(tmp_path):
    path = tmp_path / "lora" / "seed-0" / "own"
    other = Elsewhere(path)
    with claimed(path) as mine:
        assert not mine
    threading.Timer(0.2, other.leaves).start()
    with claimed(path, wait=True) as mine:
        assert mine
    assert not path.exists()  # the run is made by who makes it


def test_what_is_made_elsewhere_comes_last():
    said, asked = Said(), []

    def make(each, wait):
        asked.append((each.name, wait))
        return Outcome(elsewhere=not wait and each.name in "ac")

    found = [each.name for each, _ in outcomes(in_turn(make), [job(name) for name in "abcd"], said)]
    assert found == ["b", "d", "a", "c"]
    assert asked == [("a", False), ("b", False), ("c", False), ("d", False), ("a", True), ("c", True)]
    assert [line.split(":")[0] for line in said.lines] == ["a seed 0", "c seed 0"]


def test_a_comparison_leaves_a_run_to_another_and_ends_with_all(tmp_path, monkeypatch):
    learned = []

    def run_job(config, each, threads=None):
        learned.append(each.name)
        if each.name == "frozen_ridge":  # the last of those that nobody else makes
            other.leaves()
        return []

    monkeypatch.setattr(grid, "run_job", run_job)
    config = settings(recipes=["frozen_ncm", "lora", "frozen_ridge"], controls=False)
    other = Elsewhere(tmp_path / "frozen_ncm" / "seed-0" / "own")
    assert compare(config, tmp_path, "image") == ([], [])
    assert learned == ["lora", "frozen_ridge", "frozen_ncm"]


@pytest.mark.parametrize(
    ("error", "again", "told"),
    [
        (RunError("no room:\n give more"), False, "no room: give more"),
        (TypeError("of a piece"), False, "TypeError: of a piece (unforeseen; PERPETUNE_TRACEBACK=1 shows where)"),
        (OSError(5, "the disk went away"), True, "OSError: [Errno 5] the disk went away"),
        (MemoryError(), True, "MemoryError"),
    ],
)
def test_an_error_is_one_line_and_only_the_machine_s_is_tried_again(error, again, told, tmp_path, monkeypatch):
    def run_job(*_):
        raise error

    monkeypatch.setattr(grid, "run_job", run_job)
    outcome = attempt(settings(), None, replace(job("lora"), path=tmp_path / "lora"), False)
    assert (outcome.error, outcome.again) == (told, again)
    assert bool(outcome.trace) == (not isinstance(error, RunError))
    with claimed(tmp_path / "lora") as mine:
        assert mine


def test_one_error_that_nobody_foresaw_leaves_the_others(tmp_path, monkeypatch):
    def run_job(config, each, threads=None):
        if each.name == "lora":
            raise TypeError("of a piece")
        return []

    monkeypatch.setattr(grid, "run_job", run_job)
    config = settings(recipes=["lora", "frozen_ncm"], seeds=[0, 1], controls=False)
    _, failed = compare(config, tmp_path, "image")
    assert [label for label, _ in failed] == ["lora seed 0", "lora seed 1"] and "TypeError: of a piece" in failed[0][1]


def test_a_folder_that_cannot_be_written_is_the_run_s_error(tmp_path):
    (tmp_path / "file").write_text("")
    outcome = attempt(settings(), None, replace(job("lora"), path=tmp_path / "file" / "lora"), False)
    assert "in the way of a run directory: give another one (--out)" in outcome.error and not outcome.again


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"address": "auto"}, "add --on ray"),
        ({"on": "ray", "jobs": 2}, "on Ray say what a run takes"),
        ({"num_gpus": 1.5}, "a whole number, or less than 1"),
        ({"num_gpus": 64}, "give fewer"),
    ],
)
def test_settings_that_do_not_fit_together(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message), workers(settings(**given), tmp_path, Said()):
        pass


def test_without_ray_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'--on ray needs Ray: pip install "perpetune\[ray\]"'):
        with workers(settings(on="ray"), tmp_path, Said()):
            pass


def test_what_ray_reserves_for_a_run():
    machines, said = [{"CPU": 8, "memory": 9}, {"CPU": 4, "GPU": 2}], Said()

    def wanted(**given) -> tuple[float, float]:
        return tuple(wants(CompareConfig(stream={"source": "digits"}, **given), machines, said).values())

    assert wanted() == (1, 1) and wanted(device="cpu") == (1, 0) and wanted(num_cpus=4, num_gpus=0.5) == (4, 0.5)
    assert wanted(num_cpus=8, num_gpus=0) == (8, 0) and not said.lines
    assert wanted(num_cpus=8) == (8, 1)
    assert "no machine of the cluster has 8 CPUs and 1 GPUs for a run: the comparison waits" in said.lines[0]


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seen").write_text("")
    make = in_turn  # never called
    there = str(tmp_path / "seen")
    assert f"does not see {tmp_path}/gone: start" in _there(make, job("a"), False, str(tmp_path / "gone"), there).error
    assert f"does not see {tmp_path}: start" in _there(make, job("a"), False, str(tmp_path), there + "-not").error
