"""How far finished runs have moved on general prompts: the figures that a run with `general:` measures itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.general_prompts import PROMPTS, main
from perpetune import Learner, load_stream
from perpetune.learning import general as module
from perpetune.learning.general import KL, SAME, read_general

pytestmark = pytest.mark.usefixtures("quick_collection")

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
ASKED = ["the film market", "good", "a band and a team and the world", "awful science"]


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_runs_are_measured_and_left_as_they_are(tiny_lm, word_stream, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "LONGEST", 6)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(ASKED), encoding="utf-8")
    stream = load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=4, test_limit=3)
    settings = {"training": {**TRAINING, "learning_rate": 3e-2}}
    runs = tmp_path / "runs"
    for recipe in ("lora", "frozen_label_text", "color"):
        Learner(tiny_lm("llama"), recipe, runs / recipe, **settings).learn(stream)
    shutil.copytree(runs / "lora", runs / "stopped")
    shutil.rmtree(runs / "stopped" / "commits" / "0002-news")
    told = Learner(tiny_lm("llama"), "lora", tmp_path / "told", general=ASKED, **settings).learn(stream)
    measured = {g["name"]: g["value"] for g in told.guarantees if g["task"] == "news"}
    before = bytes_of(runs)
    records = main([*map(str, sorted(runs.iterdir())), str(tmp_path / "none"), "--prompts", str(file)])
    assert bytes_of(runs) == before
    found = {record["recipe"]: record for record in records}
    assert found.keys() == {"lora", "frozen_label_text", "color"}
    assert found["lora"]["kl"] == measured[KL] > 1e-3
    assert found["lora"]["same"] == 1 - measured[SAME] < 1 and found["lora"]["prompts"] == len(ASKED)
    assert found["lora"]["same"] <= found["lora"]["first"]
    untouched = found["frozen_label_text"]
    assert (untouched["kl"], untouched["first"], untouched["same"]) == (0, 1, 1)
    shown, passed_over = capsys.readouterr()
    assert f"| lora | 0 | {found['lora']['kl']:.4f} |" in shown
    assert found["color"]["kl"] > 1e-3
    assert "stopped: not finished, 1 of 2" in passed_over
    assert "none: " in passed_over


def test_prompts_that_cannot_be_had_end_it(tmp_path):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--prompts", str(tmp_path / "none.txt")])


def test_the_prompts_are_one_line_questions():
    prompts = read_general(PROMPTS)
    assert len(prompts) == len({json.dumps(p) for p in prompts}) == 40
    assert all(len(p) == 1 and len(p[0]["content"]) < 80 for p in prompts)
