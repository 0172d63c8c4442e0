"""What the benchmark of faults draws and counts, without its runs (tests/runs/test_faults.py has small ones)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.fault_settings import Generator
from benchmarks.fault_trials import Child
from benchmarks.faults import Trial, show, summarised
from perpetune.core.errors import ConfigError
from perpetune.learning.config import RunConfig, load_config
from tests.conftest import REPOSITORY

KILLED_IN_A_BAR = """
import os, signal
from tqdm import tqdm
from benchmarks.fault_trials import own_bars

own_bars()
tqdm(total=1, disable=True)  # as the benchmark makes its model
for number in range(2):
    child = os.fork()
    if not child:
        if not number:
            tqdm.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        tqdm(total=1, disable=True)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert ended == 0 and len(os.listdir("/proc/self/task")) == 1
"""


def said(tmp_path: Path, text: str, code: int) -> Child:
    file = tmp_path / "said.txt"
    file.write_text(text, encoding="utf-8")
    child = Child(0, file)
    child.code = code
    return child


@pytest.mark.parametrize(
    ("text", "code", "wrong"),
    [
        ("learned\n", 0, ""),
        ("perpetune: warning: slow\nperpetune: the disk is full\n", 2, ""),
        ("perpetune: OSError: no (unforeseen; PERPETUNE_TRACEBACK=1 shows where)\n", 2, "nobody foresaw it"),
        ("Traceback (most recent call last):\n  ...\nOSError: no\n", 1, "a traceback: OSError: no"),
        ("", 2, "exit code 2 and 0 lines"),
        ("perpetune: a\nperpetune: b\n", 2, "exit code 2 and 2 lines"),
    ],
)
def test_a_refusal_is_one_line(text, code, wrong, tmp_path):
    told = said(tmp_path, text, code).told()
    assert told.startswith(wrong) and bool(told) is bool(wrong)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux tells them")
def test_a_process_killed_while_it_makes_a_bar_stops_no_later_one():
    """What two started processes waited for in a trial of `ranks`: a lock that all forked processes shared."""
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_BAR], cwd=REPOSITORY, env=given, timeout=20)
    assert done.returncode == 0


def test_generated_configurations_are_those_of_their_seeds(tmp_path):
    trials = SimpleNamespace(model=tmp_path / "m", stream=tmp_path / "s", training={"max_steps": 2})
    generator, refused, config = Generator(trials), 0, tmp_path / "c.yaml"  # type: ignore[arg-type]
    for seed in range(80):
        content, options = generator.draw(seed)
        assert (content, options) == generator.draw(seed) and all(isinstance(o, str) for o in options)
        config.write_bytes(content)
        try:
            load_config(config, RunConfig, {})
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 10 < refused < 70


def test_what_is_wrong_is_counted_and_ends_the_command(capsys):
    trials = [Trial("full", 0, "refused"), Trial("full", 1, "refused", "a traceback"), Trial("two", 0, "3 tasks kept")]
    records = summarised(trials)
    assert [(r["kind"], r["trials"], r["wrong"]) for r in records] == [("full", 2, 1), ("two", 1, 0)]
    with pytest.raises(SystemExit) as stop:
        show(records)
    assert stop.value.code == 1 and "full" in capsys.readouterr().out
    show(records[1:])
