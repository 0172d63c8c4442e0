"""Damage is found wherever it is, and one command goes back to the last whole commit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

import perpetune as pt
from perpetune.cli.app import main
from perpetune.operations.verify import Verification, repair, verify
from perpetune.runs.directory import Run

MADE = Path(__file__).parents[1] / "data" / "made_before" / "learned"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(MADE / "lora", tmp_path / "lora"))


def commits(run: Path) -> list[Path]:
    return sorted((run / "commits").iterdir())


def flipped(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_whole_run_is_whole(run):
    found = verify(run)
    assert found.passed and found.whole == commits(run)[-1].name and not found.lost
    assert found.tasks == pt.Result(run).tasks and found.checked > 3 * len(commits(run))
    assert repair(run) == (found, None)


@pytest.mark.parametrize("seed", range(12))
def test_a_byte_that_is_flipped_or_missing_anywhere_is_found(seed, run):
    generator = random.Random(seed)
    number = generator.randrange(1, len(commits(run)))
    folder = commits(run)[number]
    file = generator.choice(sorted(folder.iterdir()))
    place = generator.randrange(file.stat().st_size)
    if seed % 2:
        flipped(file, place)
    else:
        file.write_bytes(file.read_bytes()[:place])
    before = [c.name for c in commits(run)]
    found = verify(run)
    assert not found.passed and found.whole == before[number - 1]
    # a flipped byte in a manifest may read as JSON: then the next commit does not follow it, or a file does not fit
    assert {damage.where for damage in found.damages} <= {*before[number:]}
    if file.name != "commit.json":
        assert (found.damages[0].where, found.damages[0].file) == (folder.name, file.name)


def test_the_newest_manifest_of_earlier_versions_has_no_commit_that_knows_its_hash(run):
    """Its own files are known by it, and its parent: what else it says is checked when the next task is committed.
    Today's has its own hash (tests/runs/test_faults.py)."""
    manifest = commits(run)[-1] / "commit.json"
    manifest.write_text(manifest.read_text().replace('"parent": "', '"parent": "0'))
    assert [d.what for d in verify(run).damages] == ["does not follow the commit before it"]


def test_one_command_goes_back_to_the_last_whole_commit_and_deletes_nothing(run, capsys):
    names = [c.name for c in commits(run)]
    file = commits(run)[2] / "predictions.safetensors"
    flipped(file, file.stat().st_size - 1)
    with pytest.raises(pt.RunError) as told:
        pt.Result(run).records()
    command = str(told.value).split("`")[1]
    assert command == f"perpetune verify {run} --repair"
    with pytest.raises(SystemExit) as code:
        main(["verify", str(run), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code.value.code == 1 and report["whole"] == names[1]
    assert report["lost"] == [names[2].split("-", 1)[1]] and report["apart"] == names[3:]
    with pytest.raises(SystemExit) as code:
        main(command.split()[1:])
    assert code.value.code == 0 and "goes on after" in capsys.readouterr().out
    assert [c.name for c in commits(run)] == names[:2] and verify(run).passed
    assert sorted(c.name for c in (run / "damaged-1").iterdir()) == names[2:]
    assert pt.Result(run).tasks == tuple(report["tasks"])


def test_a_commit_that_is_gone(run):
    names = [c.name for c in commits(run)]
    shutil.rmtree(commits(run)[1])
    found, folder = repair(run)
    assert found.whole == names[0] and "does not follow" in found.damages[0].what
    assert [c.path.name for c in Run.read(run).commits] == names[:1] and folder == run / "damaged-1"


def test_what_cannot_be_repaired_says_so(run, tmp_path):
    (run / "run.yaml").write_text("")
    found = verify(run)
    assert found.damages[0].where == "run.yaml" and "does not open" in found.summary()
    with pytest.raises(pt.ConfigError, match="restore it from a copy"):
        repair(run)
    with pytest.raises(pt.RunError, match="is no run"):
        verify(tmp_path)


def test_a_run_that_is_in_use_is_not_touched(run):
    file = commits(run)[-1] / "predictions.safetensors"
    flipped(file, 100)
    from perpetune.runs.directory import _lock

    lock = _lock(run)
    try:
        with pytest.raises(pt.RunError, match="in use"):
            repair(run)
    finally:
        lock.release()
    assert isinstance(verify(run), Verification) and not (run / "damaged-1").exists()
