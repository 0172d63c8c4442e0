"""The run directory: there or not there, and never silently wrong."""

from __future__ import annotations

import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import torch

from perpetune.core.errors import RunError
from perpetune.runs import directory
from perpetune.runs.config_file import read_config
from perpetune.runs.directory import Run, read_journal

CONFIG = {
    "model_name": "m",
    "model": {"fingerprint": "abc", "pooling": "mean"},
    "stream": {"name": "s", "scenario": "class", "tasks": ["a"], "labels": ["x", "y"], "source": {}},
    "recipe": {"name": "lora", "rank": 8},
    "seed": 0,
    "versions": {"torch": "1"},
}


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted((path / "commits").rglob("*")) if p.is_file()}


def commit(run: Run, task: str = "a", value: float = 1.0) -> None:
    run.commit(
        task,
        {
            "weights.safetensors": {"w": torch.full((3, 2), value)},
            "facts.json": {"k": [1, 2]},
            "memory.parquet": datasets.Dataset.from_dict({"text": ["a"], "label": [0]}),
        },
        {"learned": [task], "guarantees": []},
    )


def test_a_commit_reads_back_what_was_written(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run)
    run.close()
    again = Run.open(tmp_path / "r", CONFIG)
    (found,) = again.commits
    assert torch.equal(found.tensors("weights.safetensors")["w"], torch.ones(3, 2))
    assert found.json("facts.json") == {"k": [1, 2]}
    assert found.rows("memory.parquet")[0] == {"text": "a", "label": 0}


def test_a_commit_that_was_not_renamed_is_not_there(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run)
    (tmp_path / "r" / "commits" / ".0001-b").mkdir()
    run.close()
    again = Run.open(tmp_path / "r", CONFIG)
    assert len(again.commits) == 1 and not list((tmp_path / "r" / "commits").glob(".*"))


def test_a_full_disk_leaves_the_finished_tasks(tmp_path, monkeypatch):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run)
    before = files(tmp_path / "r")

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_file", full)
        with pytest.raises(RunError, match="disk is full.*every finished task is safe"):
            commit(run, "b")
    assert files(tmp_path / "r") == before
    commit(run, "b")
    assert len(run.commits) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_journal_on_a_full_disk_is_a_clear_error(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    (tmp_path / "r" / "journal.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="disk is full"):
        run.note("task")


def test_a_read_only_directory_is_a_clear_error(tmp_path, monkeypatch):
    if os.geteuid() == 0:  # root may write anywhere, so the system's answer is given in its stead
        real = Path.mkdir

        def refuse(self, *args, **kwargs):
            if self.name == "commits":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="read-only.*--out"):
        Run.open(tmp_path / "r", CONFIG)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "r").write_text("something else")
    with pytest.raises(RunError, match="in the way"):
        Run.open(tmp_path / "r", CONFIG)


def test_a_folder_with_other_files_is_not_taken_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds other files"):
        Run.open(tmp_path, CONFIG)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_file_is_named(tmp_path, damage):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run)
    path = run.commits[0].path / "weights.safetensors"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-5])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(RunError, match=r"weights\.safetensors is (damaged|missing).*start again"):
        run.commits[0].tensors("weights.safetensors")


def test_a_damaged_manifest_is_named(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run)
    run.close()
    manifest = run.commits[0].path / "commit.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(RunError, match=r"commit\.json is damaged"):
        Run.open(tmp_path / "r", CONFIG)


def test_a_changed_history_is_refused(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run), commit(run, "b")
    run.close()
    manifest = run.commits[0].path / "commit.json"
    facts = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}
    manifest.write_text(json.dumps({**facts, "learned": ["z"]}))  # as earlier versions wrote it, without its own hash
    with pytest.raises(RunError, match="does not follow the commit before it"):
        Run.open(tmp_path / "r", CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"recipe": {"name": "lora", "rank": 4}}, r"recipe\.rank was 8, now it is 4"),
        ({"model": {"fingerprint": "def", "pooling": "mean"}}, "another base model"),
        ({"stream": {**CONFIG["stream"], "scenario": "task"}}, r"stream\.scenario"),
    ],
)
def test_another_configuration_is_refused_once_a_task_is_learned(tmp_path, change, message):
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run, "untouched")
    run.close()
    other = Run.open(tmp_path / "r", {**CONFIG, **change})  # nothing is lost with the old one
    assert not other.commits and read_config(tmp_path / "r") == {**CONFIG, **change}
    other.close()
    run = Run.open(tmp_path / "r", CONFIG)
    commit(run, "untouched")
    commit(run)
    run.close()
    before = files(tmp_path / "r")
    with pytest.raises(RunError, match=message):
        Run.open(tmp_path / "r", {**CONFIG, **change})
    assert files(tmp_path / "r") == before and read_config(tmp_path / "r") == CONFIG


def test_other_versions_and_a_longer_stream_are_welcome(tmp_path):
    Run.open(tmp_path / "r", CONFIG).close()
    grown = {**CONFIG, "versions": {"torch": "2"}, "stream": {**CONFIG["stream"], "tasks": ["a", "b"]}}
    run = Run.open(tmp_path / "r", grown)
    assert read_config(tmp_path / "r")["stream"]["tasks"] == ["a"]  # nothing is written before it is known to fit
    run.grow(grown)
    run.close()
    assert read_config(tmp_path / "r")["stream"]["tasks"] == ["a", "b"]


HERE = f"import sys; sys.path[:] = {sys.path!r}\n"
OPEN = HERE + "from perpetune.runs.directory import Run; run = Run.open(sys.argv[1], {}); "


def test_two_processes_cannot_share_a_run(elsewhere, tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    refused = elsewhere.run(OPEN, tmp_path / "r")
    run.close()
    assert "RunError" in refused.stderr and "in use by another process: wait for it" in refused.stderr
    assert elsewhere(OPEN.replace("{})", f"{CONFIG!r})") + "print('opened')", tmp_path / "r") == "opened\n"


def test_one_process_cannot_open_a_run_twice(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    with pytest.raises(RunError, match="in use"):
        Run.open(tmp_path / "r", CONFIG)
    with ThreadPoolExecutor(1) as another:  # the thread that closes a run need not be the one that opened it
        another.submit(run.close).result()
    Run.open(tmp_path / "r", CONFIG).close()


def test_the_lock_of_a_killed_process_does_not_block(elsewhere, tmp_path):
    killed = elsewhere.run(OPEN + "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", tmp_path / "r")
    assert killed.returncode != 0 and (tmp_path / "r" / ".lock").exists()
    Run.open(tmp_path / "r", {}).close()


def test_a_disk_that_cannot_lock_is_a_clear_error(tmp_path, monkeypatch):
    def none(self):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(directory.FileLock, "_acquire", none)
    with pytest.raises(RunError, match="cannot lock files.*--out"):
        Run.open(tmp_path / "r", CONFIG)


def test_the_journal_survives_a_cut_last_line(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    run.note("task", index=0)
    with open(tmp_path / "r" / "journal.jsonl", "a") as journal:
        journal.write('{"event": "ta')
    run.close()
    Run.open(tmp_path / "r", CONFIG).note("resumed")
    assert [e["event"] for e in read_journal(tmp_path / "r")] == ["task", "resumed"]


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(RunError, match="is no run"):
        read_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a child process with a limit of its own")
def test_the_systems_own_refusal_to_write_is_understood(elsewhere, tmp_path):
    """safetensors hides the system's error in a text of its own: a real limit, not a stand-in."""
    code = (
        HERE + "import resource, signal, torch\n"
        "from perpetune.runs.directory import Run\nfrom perpetune.core.errors import RunError\n"
        "run = Run.open(sys.argv[1], {})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: run.commit('a', {'weights.safetensors': {'w': torch.zeros(10**5)}}, {})\n"
        "except RunError as error: print('CLEAR', error)\n"
    )
    assert "CLEAR the disk is full" in elsewhere(code, tmp_path / "r")
    assert list((tmp_path / "r" / "commits").iterdir()) == []


def test_tied_weights_are_written(tmp_path):
    run = Run.open(tmp_path / "r", CONFIG)
    shared = torch.ones(3)
    run.commit("a", {"weights.safetensors": {"a": shared, "b": shared}}, {})
    assert set(run.commits[0].tensors("weights.safetensors")) == {"a", "b"}
