"""Whatever happens to the process, the disk or the files of a run: nothing is lost, what is damaged is seen, what is
refused is refused in one line. Without a model; with one, and at full size, `python -m benchmarks.faults`."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.fault_trials import at_file_operation, contents, die, no_room
from perpetune.core import meeting
from perpetune.core.errors import ConfigError, LostProcess, PerpetuneError, RunError
from perpetune.core.files import as_sealed, sealed
from perpetune.operations.verify import repair, verify
from perpetune.runs.config_file import CONFIG, TWIN, read_config
from perpetune.runs.directory import Run, read_journal

SETTINGS = {
    "model_name": "m",
    "model": {"fingerprint": "abc"},
    "stream": {"name": "s", "scenario": "class", "tasks": ["a", "b"], "labels": ["x", "ÿ"], "source": {}},
    "recipe": {"name": "lora", "rank": 8},
    "seed": 0,
}
TASKS = ("untouched", "a", "b")
REFUSED = 2

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")


def learn(path: Path) -> None:
    run = Run.open(path, SETTINGS)
    for number, task in enumerate(TASKS[len(run.commits) :], len(run.commits)):
        files = {"weights.safetensors": {"w": torch.full((3, 2), number)}, "facts.json": {"of": task}}
        run.commit(task, files, {"learned": TASKS[1 : number + 1], "classes": [], "guarantees": []})
        run.note("task", task=task, train_seconds=0.5)
    run.close()


def forked(do: Callable[[], object]) -> tuple[int, str]:
    """The exit code of a process that does this, and, where it is `REFUSED`, the error that users read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 99
        try:
            do()
            code = 0
        except PerpetuneError as error:
            code = REFUSED
            os.write(writing, str(error).encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    learn(path)
    return path


def check_goes_on(path: Path, whole: Path) -> None:
    """What is there is part of a run that nothing happened to, and ends as that did."""
    there, expected = contents(path), contents(whole)
    assert there.items() <= expected.items()
    learn(path)
    assert contents(path) == expected and verify(path).passed


def test_killed_before_every_operation_on_a_file(whole, tmp_path):
    for number in range(100):
        path = tmp_path / f"{number}"

        def doomed(path=path, number=number):
            at_file_operation(number, die, path)()
            learn(path)

        code, _ = forked(doomed)
        check_goes_on(path, whole)
        if not code:
            break
        assert code == -9
    assert number > 20


def test_a_disk_that_is_full_at_any_byte(whole, tmp_path):
    codes = []
    for seed in range(24):
        draw, path = random.Random(seed), tmp_path / f"{seed}"
        limit, number = int(10 ** draw.uniform(0, 3)), draw.randrange(25)

        def cramped(path=path, number=number, limit=limit):
            at_file_operation(number, partial(no_room, limit), path)()
            learn(path)

        code, said = forked(cramped)
        codes.append(code)
        if code == REFUSED:
            assert "the disk is full" in said and "\n" not in said
        check_goes_on(path, whole)
    assert set(codes) == {0, REFUSED}


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_byte_anywhere_is_seen_and_mended(seed, whole, tmp_path):
    """Wherever it is in what decides the run; the journal only tells of it, and loses a line at most."""
    for trial in range(15):
        draw = random.Random(f"{seed} {trial}")
        path = Path(shutil.copytree(whole, tmp_path / f"{trial}"))
        file = draw.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size))
        content, at = file.read_bytes(), draw.randrange(file.stat().st_size)
        changed = bytes([content[at] ^ 1 << draw.randrange(8)])
        file.write_bytes(content[:at] if draw.random() < 0.4 else content[:at] + changed + content[at + 1 :])
        assert len(read_journal(path)) >= len(TASKS) - (file.name == "journal.jsonl") * len(TASKS)
        if file.name == "journal.jsonl":
            assert verify(path).passed and all(e["train_seconds"] == 0.5 for e in read_journal(path))
            continue
        assert not verify(path).passed, (file, at)
        try:
            Run.read(path)
        except RunError as error:
            assert "\n" not in str(error)
        if "0000-" not in str(file):
            assert repair(path)[1] == path / "damaged-1"
            check_goes_on(path, whole)


def test_each_fact_of_the_newest_commit_is_under_its_own_hash(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    manifest = sorted((path / "commits").iterdir())[-1] / "commit.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"b"', '"c"', 1), encoding="utf-8")
    assert [d.file for d in verify(path).damages] == ["commit.json"]
    with pytest.raises(RunError, match=r"commit\.json is damaged.*--repair"):
        Run.read(path)


@pytest.mark.parametrize("text", [json.dumps({"a": "ü", "b": [1]}), json.dumps({"a": {}, "z": "y" * 64}, indent=1)])
def test_a_seal_breaks_with_any_bit(text):
    """Bits that leave no JSON are seen by whoever reads it."""
    content = sealed(text).encode()
    assert as_sealed(content) and "sha256" in json.loads(content)
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        try:
            found = json.loads(bytes(changed))
        except ValueError:
            continue
        assert not as_sealed(bytes(changed)), found


def test_what_was_never_sealed_is_taken_as_it_is():
    assert all(as_sealed(text) for text in (b"{}", b'{"undoes": "a"}', b'{\n "files": {\n  "a": "b"\n }\n}', b""))


def test_run_yaml_has_its_hash_and_a_copy(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    written = (path / CONFIG).read_text(encoding="utf-8")
    assert yaml.safe_load(written) == read_config(path) == read_config(path, TWIN) == SETTINGS
    (path / CONFIG).write_text(written.replace("seed: 0", "seed: 1"), encoding="utf-8")
    with pytest.raises(RunError, match=r"not as it was written.*--repair.*remove its first line"):
        Run.open(path, SETTINGS)
    found, folder = repair(path)
    assert folder is not None and "can still be had: all" in found.summary()
    assert "seed: 1" in (folder / CONFIG).read_text(encoding="utf-8") and verify(path).passed
    (path / CONFIG).write_text(written.partition("\n")[2].replace("seed: 0", "seed: 1"), encoding="utf-8")
    assert read_config(path)["seed"] == 1  # who removes the hash means the change


def test_a_run_whose_configuration_is_gone_is_not_begun_again(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    (path / CONFIG).unlink()
    with pytest.raises(RunError, match=CONFIG):
        Run.open(path, SETTINGS)
    assert repair(path)[1] is not None and contents(path) == contents(whole)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ],
)
def test_a_process_that_has_ended_is_told_in_one_line(error, monkeypatch):
    with pytest.raises(RuntimeError), meeting.all_there():  # of one process it is somebody else's error
        raise error
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LostProcess, match="every finished task is safe, the same command"), meeting.all_there():
        raise error
    with pytest.raises(RuntimeError, match="size"), meeting.all_there():
        raise RuntimeError("a size that does not fit")


@pytest.mark.parametrize("slot", ["rules", "heads", "training", "name"])
def test_a_recipe_with_a_number_for_a_slot(slot):
    from perpetune.recipes import make_recipe

    with pytest.raises(ConfigError, match=f"`{slot}` of a recipe is a"):
        make_recipe({"tuner": {"type": "LoraConfig"}, slot: -0.5})
