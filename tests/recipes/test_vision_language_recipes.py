"""Recipes on a LLaVA-like model: what they tune, that they run and resume, and that they keep what they promise."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from perpetune import Learner, ModelError, load_stream
from perpetune.core.tensors import relative_change
from perpetune.models.answer_scoring import positions
from perpetune.models.loading import load_language_model
from perpetune.recipes import make_recipe
from perpetune.rules.linear_sites import linear_sites
from perpetune.tuners import as_tuner

# recipes that differ in what they tune or see: a tower changes nothing else
CASES = ["lora", "inflora", "sotu", "oft", "gpm", "pegp_lora_fresh", "pegp_adapter", "pegp_prompt", "pegp_prefix"]
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
TASKS = {
    "films": [("a great film?", "good"), ("the <image> movie", "bad")],
    "sport": [("which team", "sport"), ("<image> the game of the team is great", "business")],
    "world": [("the world", "science"), ("market <image>", "great")],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source("films", ...)`: a stream of two questions a task, each about pictures of its own."""
    folder = tmp_path_factory.mktemp("pictured")
    draw = np.random.default_rng(0)
    for task, asked in TASKS.items():
        (folder / task).mkdir()
        for split, count in (("train", 4), ("test", 2)):
            lines = []
            for i in range(count):
                path = folder / task / f"{split}{i}.png"
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
                prompt, response = asked[i % 2]
                lines.append(json.dumps({"image": path.name, "prompt": prompt, "response": response}))
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines))
    return functools.cache(lambda *tasks: load_stream(folder, tasks=tasks))


# ---- what is tuned ----


def trained(folder, recipe):
    model = load_language_model(folder)
    model.model = as_tuner(make_recipe(recipe).tuner).attach(model.model)
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("recipe", ["lora", "pegp_adapter", "pegp_prompt", "pegp_prefix", "pegp_ia3"])
def test_the_decoder_is_tuned_and_the_tower_is_not(recipe, tiny_llava):
    """Both have layers of the same names (`q_proj`)."""
    names = trained(tiny_llava(), recipe)
    assert names and all(".language_model.layers." in name for name in names), names


def test_lora_has_eight_sites(tiny_llava):
    model = load_language_model(tiny_llava())
    model.model = as_tuner(make_recipe("pegp_lora_fresh").tuner).attach(model.model)
    sites, loose = linear_sites(model)
    assert len(sites) == 8 and not loose
    ends = {site.name.partition("language_model.layers.")[2] for site in sites}
    assert ends == {f"{i}.self_attn.{p}.{f}" for i in (0, 1) for p in ("q_proj", "v_proj") for f in "AB"}


def test_layers_that_are_asked_for_are_tuned_in_the_tower_too(tiny_llava):
    names = trained(tiny_llava(), {"name": "lora", "target": ["q_proj"]})
    assert {"vision_tower" in name for name in names} == {True, False}
    assert any("vision_tower" in name for name in trained(tiny_llava(), "oft"))  # which asks for all linear layers
    with pytest.raises(ModelError, match="no layer with a bias"):
        trained(tiny_llava(), "pegp_bias")  # the tower has biases, LLaMA none


# ---- runs ----


@pytest.mark.parametrize("recipe", CASES)
def test_every_recipe_learns_resumes_and_opens_again(recipe, source, tiny_llava, tmp_path):
    model = tiny_llava()
    Learner(model, recipe, tmp_path / "r", training=TRAINING).learn(source("films"))
    learner = Learner(model, recipe, tmp_path / "r", training=TRAINING)
    stream = source("films", "sport")
    result = learner.learn(stream)  # of which the first task is learned already
    assert [e["task"] for e in result.journal if e["event"] == "task"] == ["films", "sport"]
    assert all(g["holds"] is not False for g in result.guarantees), result.guarantees
    assert {r.head for r in result.records()} == {"language"}
    again = Learner.open(tmp_path / "r")
    examples, classes = learner.backbone.prepare(stream.tasks[1].test), range(len(stream.labels))
    expected = learner.backbone.outputs(examples, 4, classes=classes)
    assert torch.equal(again.backbone.outputs(examples, 4, classes=classes), expected)
    asked = [(row["image"], row["prompt"]) for row in stream.tasks[0].test]
    assert again.predict(asked) == learner.predict(asked)


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(source, tiny_llava, tmp_path, same_bits_when_stopped):
    stream, model = source(*TASKS), tiny_llava()

    def learn(name):
        heads = ["language", {"type": "language_generated", "longest": 4}]
        Learner(model, "pegp_lora_fresh", tmp_path / name, heads=heads, training=TRAINING).learn(stream)

    same_bits_when_stopped(learn)


# ---- the guarantee ----


def moved(model, recipe, source, folder):
    """What learning a second task does: (relative change of the log-likelihoods of the first task's responses; the same
    of all logits along its sequences; log-likelihoods of the second task's responses before, and after)."""
    training = {**TRAINING, "num_train_epochs": 20, "learning_rate": 1e-2}
    learner = Learner(model, recipe, folder, training=training)
    log_p, logits = {}, {}
    for tasks in (["films"], ["films", "sport"]):
        learner.learn(source(*tasks))
        backbone = learner.backbone.eval()
        backbone.open(source(*TASKS).labels, ["options"])
        for task in source("films", "sport"):
            batch = backbone.collate(backbone.prepare(task.train))
            batch.pop("labels")
            with torch.no_grad():
                log_p[task.name, len(tasks)] = backbone(**batch)[:, 0]
                batch.pop("answers")
                seen = backbone.model(**batch, **positions(backbone.model, batch)).logits
            logits[task.name, len(tasks)] = seen[batch["attention_mask"].bool()]
    changes = [relative_change(found["films", 2], found["films", 1]) for found in (log_p, logits)]
    return *changes, log_p["sport", 1], log_p["sport", 2]


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_old_answers_about_images_stay_as_likely_under_projection(kind, tiny_llava, source, tmp_path):
    model = tiny_llava(kind, width=64)
    change, of_logits, before, after = moved(model, {"name": "pegp_lora_fresh", "energy": 1.0}, source, tmp_path / "r")
    assert max(change, of_logits) < 1e-5
    assert (after > before + 1).all(), (before, after)  # while the new responses grow likely
    if kind == "llava":  # without the rule they move
        change, of_logits, _, _ = moved(model, "lora", source, tmp_path / "free")
        assert min(change, of_logits) > 0.05


def test_the_tower_is_protected_where_it_is_tuned(tiny_llava, source, tmp_path):
    """Projector and tower read images alone, the decoder both: what they compute of old images stays."""
    targets = ["q_proj", "v_proj", "linear_1", "linear_2"]
    recipe = {"name": "pegp_lora_fresh", "energy": 1.0, "target": targets}
    model = tiny_llava(width=64)
    change, of_logits, before, after = moved(model, recipe, source, tmp_path / "r")
    assert max(change, of_logits) < 1e-5
    assert (after > before).all()
    change, of_logits, _, _ = moved(model, {"name": "lora", "target": targets}, source, tmp_path / "free")
    assert min(change, of_logits) > 0.05
