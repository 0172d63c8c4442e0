"""Language models trained by TRL's `SFTTrainer` under a recipe's rules."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import perpetune as pt
from perpetune.core.errors import ConfigError, RunError

pytest.importorskip("trl")

SETTINGS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
WEEKS = {
    "faq": {"where is my parcel": "it is on the way", "can i pay later": "yes within thirty days"},
    "dates": {"monday the first": "01 06 2026", "friday the fifth": "05 06 2026"},
}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(root, tasks, row=lambda p, r: {"prompt": p, "response": r}):
    for task, pairs in tasks.items():
        (root / task).mkdir(parents=True)
        for split, times in (("train", 6), ("test", 1)):
            rows = [row(f"{p} {i % 3}", r) for i in range(times) for p, r in pairs.items()]
            (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weeks"), WEEKS)


@pytest.fixture(scope="module")
def stream(folder):
    return pt.load_stream(folder, metric="exact_match")


@pytest.fixture(scope="module")
def model(tiny_lm):
    words = " ".join(f"{p} {r}" for pairs in WEEKS.values() for p, r in pairs.items()).split()
    return tiny_lm("llama", words)


def tensors(run):
    from safetensors.torch import load_file

    files = sorted(p for p in run.rglob("*.safetensors") if "predictions" not in p.name)
    return {f"{p.parent.name}/{p.name}/{k}": v for p in files for k, v in load_file(p).items()}


@pytest.mark.parametrize("recipe", ["olora"])
def test_the_first_start_chooses_trl_and_trains_as_our_own_trainer(recipe, stream, model, tmp_path):
    for name in ("trl", "perpetune"):
        chosen = None if name == "trl" else name
        pt.Learner(model, recipe, tmp_path / name, training=SETTINGS, trainer=chosen).learn(stream)
        assert yaml.safe_load((tmp_path / name / "run.yaml").read_text(encoding="utf-8"))["trainer"] == name
    theirs, ours = tensors(tmp_path / "trl"), tensors(tmp_path / "perpetune")
    assert theirs.keys() == ours.keys() and len(theirs) > 4
    for key, value in theirs.items():  # the same batches and the same loss; Adam makes signs of rounding errors
        assert (value - ours[key]).abs().max() < 5e-3, key
