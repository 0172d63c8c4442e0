"""Adapters of an export answer as the run does, loaded by plain peft where perpetune cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

import perpetune as pt
from perpetune.learning.lora_factors import Factors, found_factors, joined
from tests.calling import call

pytestmark = pytest.mark.usefixtures("quick_collection")
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
TASKS = ["films", "news", "mood"]
LORA = {"r": 2, "lora_alpha": 6, "target_modules": "query_value"}
# arguments: the export, a file with inputs. Every adapter, by its name, onto the base of its own configuration.
ANSWER = """
import json, sys
sys.modules["perpetune"] = None
import torch
from pathlib import Path
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
folder, given = Path(sys.argv[1]), load_file(sys.argv[2])
routes = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
model, found = None, {}
for each in routes["adapters"]:
    name, path = each["name"], str(folder / each["folder"])
    config = PeftConfig.from_pretrained(path)
    if model is None:
        kind = AutoModelForCausalLM if config.task_type == "CAUSAL_LM" else AutoModel
        base = kind.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
    else:
        model.load_adapter(path, name)
for each in routes["adapters"]:
    model.set_adapter(each["name"])
    with torch.no_grad():
        output = model(**given)
    found[each["name"]] = output.logits if hasattr(output, "logits") else output.last_hidden_state
found["base"] = None
with torch.no_grad(), model.disable_adapter():
    output = model(**given)
found["base"] = output.logits if hasattr(output, "logits") else output.last_hidden_state
save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=TASKS, train_limit=16, test_limit=8)


@pytest.fixture(scope="module")
def prompts(word_stream):
    return pt.load_stream(word_stream, tasks=TASKS, pose="instruction", train_limit=8, test_limit=4)


def learned(model, stream, path, recipe):
    learner = pt.Learner(model, recipe, path, training=TRAINING)
    learner.learn(stream)
    return learner


def elsewhere(folder, inputs, tmp_path):
    """What each adapter of a folder makes of these inputs, in a process of its own without perpetune."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / "given")
    command = [sys.executable, "-I", "-c", ANSWER, str(folder), str(tmp_path / "given"), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(tmp_path / "found")


def outputs(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def inputs_of(learner, task):
    batch = learner.backbone.batch(learner.backbone.prepare(task.test))
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_every_task_has_its_adapter(kind, stream, prompts, tiny_lm, tiny_bert, tmp_path):
    model, data = (tiny_lm("llama"), prompts) if kind == "llama" else (tiny_bert(), stream)
    learner = learned(model, data, tmp_path / "r", "color")
    folder = learner.export(tmp_path / "a", format="adapters")
    inputs = inputs_of(learner, data.tasks[0])
    found = elsewhere(folder, inputs, tmp_path)
    assert set(found) == {*TASKS, "base"}
    with learner.recipe.consolidation.view(None):
        assert close(found["base"], outputs(learner.backbone.model, inputs))
    for index, task in enumerate(TASKS):
        with learner.recipe.consolidation.view(index):
            assert close(found[task], outputs(learner.backbone.model, inputs)), task
        assert not close(found[task], found["base"])
    told = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
    assert [each["tasks"] for each in told["adapters"]] == [[task] for task in TASKS]
    assert [each["labels"] for each in told["adapters"]] == [list(data.label_texts(t.classes)) for t in data]
    for commit, each in zip(sorted((tmp_path / "r" / "commits").iterdir())[1:], told["adapters"], strict=True):
        one, other = (load_file(f / "adapter_model.safetensors") for f in (commit, folder / each["folder"]))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)  # not a bit is changed
    print((folder/"README.md").read_text()); print(json.dumps(told, indent=1))
    print((folder/"films/adapter_config.json").read_text())
