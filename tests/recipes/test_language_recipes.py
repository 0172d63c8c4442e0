"""Recipes on a decoder and on an encoder with a decoder: they run, resume, and keep what they promise."""

from __future__ import annotations

import functools
import json

import datasets
import pytest
import torch

from perpetune import Learner, load_stream
from perpetune.models.loading import load_language_model
from perpetune.recipes import RECIPES
from perpetune.rules.linear_sites import linear_sites, see_inputs

# of recipes that differ in a setting alone, or in the penalty on factors, one: that is the same in any model
ALIKE = ["nlora", "olora_nlora", "gpm_released", *(f"pegp_{kind}_released" for kind in ("adapter", "prompt", "prefix"))]
LORA = [name for name in RECIPES if "lora" in name and not name.startswith("pegp") and name not in ALIKE]
PROJECTION = [name for name in RECIPES if name.startswith(("pegp", "gpm")) and name not in ALIKE]
ROTATIONS = ["oft", "goft", "qgoft"]
OTHERS = ["sequential", "sotu", "task_arithmetic", "child_tuning_f", "child_tuning_d", "sam", "replay", *ROTATIONS]
# architectures differ in the layers that are tuned, and are tried with recipes that differ in what they tune or see
ON_T5 = ["lora", "inflora", "sotu", "goft", "gpm", "pegp_lora_fresh", "pegp_adapter", "pegp_prompt", "pegp_prefix"]
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}


@pytest.fixture(scope="module")
def source(word_stream):
    @functools.cache
    def load(*tasks):
        return load_stream(word_stream, tasks=tasks, pose="instruction", train_limit=4, test_limit=2)

    return load


CASES = [*((recipe, "llama") for recipe in (*LORA, *PROJECTION, *OTHERS)), *((recipe, "t5") for recipe in ON_T5)]
CASES = [case for case in CASES if case[0] != "pegp_bias"] + [("pegp_bias", "qwen2"), ("olora", "qwen2")]


@pytest.mark.parametrize(("recipe", "kind"), CASES)
def test_every_recipe_learns_resumes_and_opens_again(recipe, kind, source, tiny_lm, tmp_path):
    """LLaMA and T5 have no biases to train; Qwen2 has."""
    model = tiny_lm(kind, layers=1)
    Learner(model, recipe, tmp_path / "r", training=TRAINING).learn(source("films"))
    learner = Learner(model, recipe, tmp_path / "r", training=TRAINING)
    stream = source("films", "news")
    result = learner.learn(stream)  # of which the first task is learned already
    assert [e["task"] for e in result.journal if e["event"] == "task"] == ["films", "news"]
    assert all(g["holds"] is not False for g in result.guarantees), result.guarantees
    assert {r.head for r in result.records()} == {"language"}
    asked = stream.tasks[0].test["prompt"][:]
    again = Learner.open(tmp_path / "r")
    examples = learner.backbone.prepare(stream.tasks[1].test)
    classes = range(len(stream.labels))
    expected = learner.backbone.outputs(examples, 4, classes=classes)
    assert torch.equal(again.backbone.outputs(examples, 4, classes=classes), expected)
    assert again.predict(asked) == learner.predict(asked)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(
    kind, source, tiny_lm, tmp_path, same_bits_when_stopped
):
    stream, model = source("films", "news", "mood"), tiny_lm(kind, layers=1)

    def learn(name):
        heads = ["language", {"type": "language_generated", "longest": 4}]
        Learner(model, "pegp_lora_fresh", tmp_path / name, heads=heads, training=TRAINING).learn(stream)

    same_bits_when_stopped(learn)


def test_training_batches_by_length(source, tiny_lm, tmp_path):
    """Prompts of about one length together, by the Trainer's own sampler, which looks for `input_ids`."""
    training = {**TRAINING, "train_sampling_strategy": "group_by_length"}
    result = Learner(tiny_lm("llama"), "lora", tmp_path / "r", training=training).learn(source("films"))
    assert result.tasks == ("films",)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "t5"])
def test_old_answers_stay_as_likely_under_projection(kind, tiny_lm, tmp_path):
    """All that old prompts and their responses made the layers read is protected: the likelihoods do not move, while
    the new responses grow likely."""
    asked = {
        "a": [("good movie", "great film"), ("bad game", "team")],
        "b": [("the market", "business"), ("a", "sport")],
    }
    for task, pairs in asked.items():
        (tmp_path / "s" / task).mkdir(parents=True)
        lines = "".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs)
        for split in ("train", "test"):
            (tmp_path / "s" / task / f"{split}.jsonl").write_text(lines)
    stream = load_stream(tmp_path / "s")
    recipe = {"name": "pegp_lora_fresh", "energy": 1.0}
    training = {**TRAINING, "num_train_epochs": 25, "learning_rate": 1e-2}
    learner = Learner(tiny_lm(kind, width=64), recipe, tmp_path / "r", training=training)
    found = {}
    for tasks in (1, 2):
        learner.learn(load_stream(tmp_path / "s", tasks=["a", "b"][:tasks]))
        model = learner.backbone.eval()
        model.open(stream.labels, ["options"])
        for task in stream:
            batch = model.collate(model.prepare(task.train))
            batch.pop("labels")
            with torch.no_grad():
                found[task.name, tasks] = model(**batch)[:, 0]
    moved = (found["a", 2] - found["a", 1]).norm() / found["a", 1].norm()
    assert moved < 1e-5
    assert (found["b", 2] > found["b", 1] + 1).all(), found
    room = [g["value"] for g in learner.learn(stream).guarantees if g["name"] == "input directions in use"]
    assert room[-1] < 0.9


def test_padding_of_either_side_is_left_out_of_what_is_protected(tiny_lm):
    """What layers read of a padded batch is what they read of each example alone; cross-attention reads the encoder."""
    for kind in ("llama", "t5"):
        model = load_language_model(tiny_lm(kind))
        model.open(["good", "very bad movie"], ["options"])
        data = {
            "prompt": ["a great team of the", "the great movie: good game, bad team"],
            "label": [0, 1],
            "id": ["a", "b"],
        }
        examples = model.prepare(datasets.Dataset.from_dict(data))
        sites = [s for s in linear_sites(model)[0] if s.name.split(".")[-1] in ("q", "k", "q_proj", "down_proj", "wo")]

        def second_moments(batches, model=model, sites=sites):
            seen: dict[str, torch.Tensor] = {}

            def see(site, X, mask):
                assert mask is not None, site.name
                rows = X[mask.bool()].double()
                seen[site.name] = seen.get(site.name, 0) + rows.T @ rows

            see_inputs(model, sites, batches, see)
            return seen

        def batches(*groups, model=model):
            return [{k: v for k, v in model.collate(group).items() if k != "labels"} for group in groups]

        together, alone = second_moments(batches(examples)), second_moments(batches(examples[:1], examples[1:]))
        assert len(together) == len(sites) > 3
        for name in together:
            assert torch.allclose(together[name], alone[name], rtol=1e-4, atol=1e-4), name
