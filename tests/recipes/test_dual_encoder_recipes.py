"""Recipes on dual encoders: they run, resume, open again, and leave alone what both towers made of old inputs."""

from __future__ import annotations

import functools

import numpy as np
import peft
import pytest
import torch
from PIL import Image

from perpetune import Learner, load_stream
from perpetune.models.loading import load_backbone
from perpetune.recipes import make_recipe
from perpetune.rules.linear_sites import linear_sites
from perpetune.rules.probes import Probes

LORA = ["sequential_lora", "lora", "olora"]  # a penalty on their factors is the same in any tower
PROJECTION = ["pegp_lora", "pegp_lora_fresh", "pegp_adapter", "pegp_prompt", "pegp_prefix", "gpm"]
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
LONG = {"num_train_epochs": 15, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
CLASSES = {"films": ["movie", "film"], "games": ["team", "game"], "mood": ["good", "bad"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """`pictures(*tasks)`: tasks of two classes, each class with a picture of its own under noise."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for task, labels in CLASSES.items():
        for label in labels:
            clean = generator.integers(0, 256, (8, 8, 3))
            for split, count in (("train", 4), ("test", 3)):
                (folder / task / split / label).mkdir(parents=True)
                for i in range(count):
                    noisy = np.clip(clean + generator.normal(0, 20, clean.shape), 0, 255).astype(np.uint8)
                    Image.fromarray(noisy).save(folder / task / split / label / f"{i}.png")
    return functools.cache(lambda *tasks: load_stream(folder, tasks=tasks or tuple(CLASSES)))


@pytest.mark.parametrize("recipe", [*LORA, *PROJECTION, "sotu", "replay"])
def test_every_recipe_learns_resumes_and_opens_again(recipe, pictures, tiny_clip, tmp_path):
    model = tiny_clip()
    Learner(model, recipe, tmp_path / "r", training=TRAINING).learn(pictures("films"))
    stream = pictures("films", "games")
    learner = Learner(model, recipe, tmp_path / "r", training=TRAINING)
    result = learner.learn(stream)  # of which the first task is learned already
    assert [e["task"] for e in result.journal if e["event"] == "task"] == ["films", "games"]
    assert all(g["holds"] is not False for g in result.guarantees), result.guarantees
    assert {r.head for r in result.records()} == {"ncm" if recipe == "sotu" else "contrastive"}
    again = Learner.open(tmp_path / "r")
    asked = stream.tasks[0].test["image"][:]
    examples = learner.backbone.prepare(stream.tasks[1].test)
    assert torch.equal(again.backbone.features(examples, 4), learner.backbone.features(examples, 4))
    assert again.predict(asked) == learner.predict(asked)


@pytest.mark.parametrize("recipe", ["color", "routed", "routed_product", {"name": "default", "features": 64}], ids=str)
def test_recipes_with_an_adapter_a_task_read_the_images(recipe, pictures, tiny_clip, tmp_path):
    stream = pictures("films", "games")
    learner = Learner(tiny_clip(), recipe, tmp_path / "r", training=TRAINING)
    assert {r.head for r in learner.learn(stream).records()} == {"linear"}
    asked = stream.tasks[0].test["image"][:]
    assert Learner.open(tmp_path / "r").predict(asked) == learner.predict(asked)


@pytest.fixture
def four(tmp_path):
    """Two tasks of two classes, of which each has one picture."""
    generator = np.random.default_rng(1)
    for task, labels in {"a": ["good movie", "bad game"], "b": ["team", "market"]}.items():
        for label in labels:
            for split in ("train", "test"):
                (tmp_path / "four" / task / split / label).mkdir(parents=True)
                picture = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                picture.save(tmp_path / "four" / task / split / label / "0.png")
    return tmp_path / "four"


def embeddings_after_each_task(learner, folder):
    """{(task, number of tasks learned): (its training images, its label texts)}"""
    found, stream = {}, load_stream(folder)
    for count in (1, 2):
        result = learner.learn(load_stream(folder, tasks=["a", "b"][:count]))
        model = learner.backbone
        for task in stream:
            images, texts = (
                model.features(model.prepare(task.train), 4),
                model.label_embeddings(stream.label_texts(task.classes)),
            )
            found[task.name, count] = images, texts
    return found, result


def moved(found, task):
    """|new - old| / |old| of the images and of the texts."""
    return [float((new - old).norm() / old.norm()) for new, old in zip(found[task, 2], found[task, 1], strict=True)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pegp_lora_fresh", "clip"), ("pegp_lora_fresh", "siglip"), ("pegp_lora", "clip"), ("pegp_adapter", "clip")],
)
def test_old_images_and_old_texts_stay_under_projection(name, kind, four, tiny_clip, tmp_path):
    """Under AdamW with weight decay, while the new task moves its own: both towers are protected."""
    recipe = make_recipe({"name": name, "energy": 1.0})
    recipe.rules[0].probes = 2
    learner = Learner(tiny_clip(kind), recipe, tmp_path / "r", training=LONG)
    found, result = embeddings_after_each_task(learner, four)
    assert max(moved(found, "a")) < 1e-5 < 1e-3 < max(moved(found, "b"))
    measured = {g["name"]: g for g in result.guarantees if g["task"] == "b"}
    assert measured["worst change of outputs on probes"]["holds"]
    assert measured["drift of a layer on old inputs |dW X| / |X|"]["holds"]
    assert measured["input directions in use"]["value"] < 0.9
    assert measured["change of the embeddings of earlier tasks' label texts"]["value"] < 1e-5


@pytest.mark.parametrize(
    "recipe", ["lora", {"name": "pegp_lora_released", "energy": 1.0}], ids=["no rule", "gradient projected"]
)
def test_without_the_rule_they_move(recipe, four, tiny_clip, tmp_path):
    learner = Learner(tiny_clip(), recipe, tmp_path / "r", training=LONG)
    found, _ = embeddings_after_each_task(learner, four)
    assert min(moved(found, "a")) > 0.01


def test_what_is_trained_stands_in_both_towers_and_all_of_it_is_protected(tiny_clip):
    """q and v of 2 x 2 layers: A and B of each; the projections into the common space are frozen, or protected."""
    for recipe, count in (("pegp_lora", 16), ("pegp_adapter", 16), ("gpm", 26)):
        backbone = load_backbone(tiny_clip(), "image")
        backbone.model = make_recipe(recipe).tuner.attach(backbone.model)
        sites, _ = linear_sites(backbone)
        assert len(sites) == count
        for tower in ("vision_model", "text_model"):
            assert sum(tower in site.name for site in sites) == count // 2 - (recipe == "gpm")
        assert any("_projection" in site.name for site in sites) == (recipe == "gpm")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    assert len(linear_sites(peft.get_peft_model(load_backbone(tiny_clip(), "image").model, config))[0]) == 32


def test_probes_see_both_towers(four, tiny_clip):
    backbone = load_backbone(tiny_clip(), "image")
    stream = load_stream(four)
    backbone.open(stream.labels, paired=True)
    examples = backbone.prepare(stream.tasks[0].train)
    batch = backbone.collate([*examples, *examples])  # four images, two texts
    batch.pop("labels")
    probes = Probes()
    probes.add(backbone, [batch], 3)
    assert probes.drift(backbone) < 1e-6
    for tower in (backbone.model.vision_model, backbone.model.text_model):
        weight = tower.encoder.layers[0].mlp.fc1.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(2)
            assert probes.drift(backbone) > 1e-3
            weight.copy_(before)


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(pictures, tiny_clip, tmp_path, same_bits_when_stopped):
    stream, model = pictures(), tiny_clip()

    def learn(name):
        heads = ["contrastive", "ncm"]
        Learner(model, "pegp_lora_fresh", tmp_path / name, heads=heads, training=TRAINING).learn(stream)

    same_bits_when_stopped(learn)
