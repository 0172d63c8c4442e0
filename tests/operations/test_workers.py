"""Runs in processes of this machine: a lost one is one run's affair, and each has its devices and threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from perpetune.core.errors import ConfigError
from perpetune.core.progress import Progress
from perpetune.learning.config import CompareConfig
from perpetune.operations.grid import Job
from perpetune.operations.workers import deals_devices, dealt, environments, processes, threads_each, visible_devices
from tests.conftest import REPOSITORY
from tests.operations.makers import made


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def job(name: str, seed: int = 0) -> Job:
    return Job(name, name, seed, None, Path(name))


def settings(**given) -> CompareConfig:
    return CompareConfig(stream={"source": "digits"}, **given)


def test_a_killed_process_is_one_runs_affair(tmp_path):
    said = Said()
    todo = [job(name) for name in ("fine", "once", "always", "flaky", "broken", "last")]
    with processes(partial(made, tmp_path), [{}, {}], 1, said) as workers:
        found = {job.name: outcome for job, outcome in workers(todo, False)}
    assert found.keys() == {job.name for job in todo}
    for name, tries in {"fine": 1, "once": 2, "flaky": 2, "last": 1, "always": 2, "broken": 1}.items():
        assert len(list(tmp_path.glob(f"{name}-*"))) == tries, name  # what cannot be made is not tried again
        assert bool(found[name].records) == (name not in ("always", "broken")), found[name]
    assert found["broken"].error == "it cannot be made"
    assert "killed (SIGKILL, as when memory runs out), 2 times: start the same command again" in found["always"].error
    assert sum("once seed 0: its process was killed" in line for line in said.lines) == 1
    assert sum("flaky seed 0: OSError: the disk went away; it is gone on with" in line for line in said.lines) == 1


def test_each_worker_has_its_devices_and_takes_one_run_after_another(tmp_path):
    each = [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    with processes(partial(made, tmp_path), each, 0, Progress()) as workers:
        # the two that meet are made at the same time
        found = [o.records[0] for _, o in workers([job("meet", 2), job("meet", 2), *map(job, "abcd")], False)]
    assert {record["gpu"] for record in found if record["name"] == "meet"} == {"2", "3"}
    assert len({(record["gpu"], record["pid"]) for record in found}) == 2


def test_workers_end_with_the_comparison_even_if_it_is_killed(tmp_path):
    program = (
        "import sys\nfrom functools import partial\nfrom pathlib import Path\n"
        "from perpetune.core.progress import Progress\nfrom perpetune.operations.workers import processes\n"
        "from tests.operations.makers import slow\nfrom tests.operations.test_workers import job\n"
        "if __name__ == '__main__':\n"
        "    with processes(partial(slow, Path(sys.argv[1])), [{}], 2, Progress()) as workers:\n"
        "        list(workers([job('endless')], False))\n"
    )
    (tmp_path / "program.py").write_text(program)
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    started = subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path], env={**os.environ, **path})
    try:
        while not (tmp_path / "pid").exists():
            assert started.poll() is None
            time.sleep(0.05)
        worker = int((tmp_path / "pid").read_text())
        os.kill(worker, 0)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    gone = Path(f"/proc/{worker}")
    if not gone.parent.joinpath("self").exists():
        pytest.skip("no /proc, which tells whether a process is there")
    while gone.exists() and "State:\tZ" not in (gone / "status").read_text():
        time.sleep(0.05)  # the suite's time limit ends it


@pytest.mark.parametrize(
    ("devices", "given", "shares"),
    [
        ("0123", {"jobs": 2}, ["0", "1"]),
        ("01", {"jobs": 4}, ["0", "1", "0", "1"]),
        ("57", {"jobs": 2, "num_gpus": 2}, ["57", "57"]),
        ("0123", {"jobs": 2, "num_gpus": 2}, ["01", "23"]),
        ("01", {"jobs": 4, "num_gpus": 0.5}, ["0", "0", "1", "1"]),
        ("01", {"jobs": 2, "num_gpus": 0}, ["", ""]),
        ("0123", {"jobs": 2, "device_map": "auto"}, ["01", "23"]),
        ("0", {"jobs": 2, "device_map": "auto"}, ["0", "0"]),
    ],
)
def test_devices_are_dealt(devices, given, shares):
    assert dealt(list(devices), settings(**given)) == [list(share) for share in shares]


def test_without_devices_nothing_is_dealt_and_none_can_be_asked_for():
    assert dealt([], settings(jobs=2)) == [None, None]
    with pytest.raises(ConfigError, match="--num-gpus 2 for each run, and 1 can be seen here"):
        dealt(["0"], settings(num_gpus=2))


def test_a_device_that_the_user_names_is_not_dealt():
    assert deals_devices(settings()) and deals_devices(settings(device="cuda"))
    assert not deals_devices(settings(device="cpu")) and not deals_devices(settings(device="cuda:1", num_gpus=0))
    with pytest.raises(ConfigError, match="leave one of them out"):
        deals_devices(settings(device="cuda:1", num_gpus=1))


@pytest.mark.parametrize(("told", "found"), [("2,GPU-5", ["2", "GPU-5"]), ("", []), ("1,-1,2", ["1"]), ("-1", [])])
def test_visible_devices_are_as_cuda_reads_them(told, found, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert visible_devices() == found


def test_environment_of_workers(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    one, two = environments(settings(jobs=2, num_cpus=3))
    assert one == {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "4"} and two["CUDA_VISIBLE_DEVICES"] == "6"
    assert environments(settings(jobs=2, num_cpus=3, device="cpu")) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_runs_at_a_time_take_no_more_threads_than_one_alone(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for alone, jobs, expected in ((1, 2, 1), (8, 2, 4), (8, 16, 1), (3, 2, 3)):
        monkeypatch.setattr("torch.get_num_threads", lambda alone=alone: alone)
        assert threads_each(jobs) == expected
