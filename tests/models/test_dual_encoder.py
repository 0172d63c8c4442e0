"""Dual encoders: what both towers give, which texts are in question, captions, and what is refused."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import perpetune.models.dual_encoder
from perpetune import Learner, Recipe, drift, load_stream
from perpetune.core.errors import ConfigError, ModelError, StreamError
from perpetune.heads import ContrastiveHead, LinearHead, RidgeHead
from perpetune.learning.task_free import parts, told_segments
from perpetune.models.loading import load_backbone, load_dual
from perpetune.operations.compare import with_controls
from perpetune.recipes import make_recipe
from perpetune.rules.linear_sites import linear_sites, see_inputs

TEXTS = ("good movie", "a bad game", "team", "the market")
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 4}


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


def rows(labels):
    ids = [str(i) for i in range(len(labels))]
    return datasets.Dataset.from_dict({"image": pictures(len(labels)), "label": labels, "id": ids})


def opened(folder, paired=True, texts=TEXTS):
    backbone = load_backbone(folder, "image").eval()
    backbone.open(texts, paired=paired)
    return backbone


def inputs(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def predictions(run):
    return [load_file(commit / "predictions.safetensors") for commit in sorted((run / "commits").iterdir())]


# ---- what it gives ----


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_batch_gives_the_log_likelihood_of_the_models_own_logits(kind, tiny_clip):
    """p = softmax over the texts in question of s f . g, as `transformers` computes these logits."""
    folder = tiny_clip(kind)
    backbone, labels = opened(folder), [2, 0, 2, 3]
    batch = backbone.collate(backbone.prepare(rows(labels)))
    f_g_p = backbone(**inputs(batch))
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [TEXTS[c] for c in (0, 2, 3)]  # those of the rows
    padding = {"padding": "max_length"} if kind == "siglip" else {"padding": True}
    ids = tokenizer(texts, return_tensors="pt", **padding).input_ids
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=pictures(4), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, pixel_values=pixels)
    own = torch.tensor([1, 0, 1, 2])
    log_p = expected.logits_per_image.log_softmax(1).gather(1, own[:, None])[:, 0]
    assert torch.allclose(f_g_p[:, -1], log_p, atol=1e-5)
    s, D = model.logit_scale.exp(), backbone.width
    assert torch.allclose(f_g_p[:, :D], s * expected.image_embeds, atol=1e-5)
    assert torch.allclose(f_g_p[:, D:-1], s * expected.text_embeds[own], atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_the_models_own_logits(kind, tiny_clip):
    backbone = opened(tiny_clip(kind))
    examples = backbone.prepare(rows([0, 1, 2, 3, 0]))
    batch = inputs(backbone.collate(examples))
    batch.pop("own")
    with torch.no_grad():
        logits = backbone.model(**batch).logits_per_image
    head = ContrastiveHead()
    head.open(backbone.width, TEXTS, seed=0)
    head.embed(range(4), backbone.label_embeddings(TEXTS, batch_size=3))
    scores = head.scores(backbone.features(examples, batch_size=2))
    bias = getattr(backbone.model, "logit_bias", torch.zeros(1))  # the same for all classes
    assert torch.allclose(scores + bias, logits, atol=1e-4)
    assert torch.allclose(backbone.features(examples, 2).norm(dim=1), torch.ones(5))


def test_its_gradient_reaches_both_towers(tiny_clip):
    backbone = opened(tiny_clip())
    head = ContrastiveHead()
    head.open(backbone.width, TEXTS, seed=0)
    head.begin_task([0, 1])
    batch = backbone.collate(backbone.prepare(rows([0, 1])))
    head.loss(backbone(**inputs(batch)), batch["labels"]).backward()
    for tower in (backbone.model.vision_model, backbone.model.text_model):
        assert all(layer.self_attn.q_proj.weight.grad.norm() > 0 for layer in tower.encoder.layers)


def test_the_texts_in_question_are_all_classes_of_the_rows_or_those_of_the_batch_where_they_are_many(
    tiny_clip, monkeypatch
):
    backbone = opened(tiny_clip())
    asked = backbone.collate(backbone.prepare(rows([3, 1, 3, 0]))[:2])
    assert asked["own"].tolist() == [0, 1] and len(asked["input_ids"]) == 3  # "the market", "a bad game"; "good movie"
    assert torch.equal(asked["input_ids"], backbone._tokens([TEXTS[c] for c in (3, 1, 0)])["input_ids"])
    monkeypatch.setattr(perpetune.models.dual_encoder, "FEW", 2)
    asked = backbone.collate(backbone.prepare(rows([3, 1, 3, 0]))[:3])
    assert asked["own"].tolist() == [0, 1, 0] and len(asked["input_ids"]) == 2


def test_the_first_images_of_a_batch_are_a_batch(tiny_clip):
    """Rules keep the first inputs of a batch to see later what became of them."""
    backbone = opened(tiny_clip())
    batch = inputs(backbone.collate(backbone.prepare(rows([3, 3, 1, 0]))))
    whole, D = backbone(**batch), backbone.width
    for n in (1, 2, 3):
        part = backbone(**backbone.first_examples(batch, n))
        assert torch.allclose(part[:, : 2 * D], whole[:n, : 2 * D], atol=1e-5) and torch.isfinite(part).all()


def test_siglip_reads_texts_of_one_length_without_a_mask(tiny_clip):
    assert opened(tiny_clip("siglip"))._tokens(["a"])["input_ids"].shape == (1, 24)
    tokens = opened(tiny_clip())._tokens(["a", "a bad game"])
    assert tokens.keys() == {"input_ids", "attention_mask"} and tokens["input_ids"].shape[1] < 24
    long = load_backbone(tiny_clip(), "image", max_length=6)._tokens(["a bad game of the team"])
    assert long["input_ids"].shape == (1, 6) and long["input_ids"][0, -1] == 3  # the end, at which CLIP reads


def test_towers_that_call_their_layers_by_different_names_are_both_tuned():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ChineseCLIPConfig(
        text_config=tower, vision_config={**tower, "image_size": 8, "patch_size": 4}
    )
    with torch.device("meta"):
        model = make_recipe("lora").tuner.attach(transformers.AutoModel.from_config(config))
    sites = [site.name for site in linear_sites(model)[0]]
    assert len(sites) == 16 and sum("vision_model" in name for name in sites) == 8


def test_padding_is_left_out_of_what_is_protected_and_patches_are_never_taken_for_it(tiny_clip):
    """Five texts of five tokens at most beside five images of five patches: shapes do not tell them apart."""
    texts = ("movie", "good", "a good movie", "bad game", "team")
    backbone = opened(tiny_clip(), texts=texts)
    backbone.requires_grad_(True)
    batch = inputs(backbone.collate(backbone.prepare(rows([0, 1, 2, 3, 4]))))
    assert batch["input_ids"].shape == (5, 5) and not batch["attention_mask"].all()
    found = {}
    see_inputs(backbone, linear_sites(backbone)[0], [batch], lambda site, X, mask: found.update({site.name: (X, mask)}))
    assert len(found) == 26  # 2 towers x 2 layers x (q, k, v, out, fc1, fc2), and the two projections
    for name, (X, mask) in found.items():
        inside = "text_model" in name
        assert X.shape[:-1] == ((5,) if "_projection" in name else (5, 5))
        assert torch.equal(mask, batch["attention_mask"]) if inside else mask is None


# ---- heads and streams ----


@pytest.fixture
def classes(tmp_path):
    for task, labels in {"a": ["good movie", "bad game"], "b": ["team", "market"]}.items():
        for number, label in enumerate(labels):
            for split in ("train", "test"):
                folder = tmp_path / "classes" / task / split / label
                folder.mkdir(parents=True)
                for i, picture in enumerate(pictures(2, seed=number)):
                    picture.save(folder / f"{i}.png")
    return tmp_path / "classes"


def write_captions(folder, task, **splits):
    """`split=[(number of the picture, caption), ...]`"""
    (folder / task).mkdir(parents=True)
    for split, records in splits.items():
        for number in {n for n, _ in records}:
            pictures(1, seed=number)[0].save(folder / task / f"{number}.png")
        lines = [json.dumps({"image": f"{number}.png", "caption": text}) for number, text in records]
        (folder / task / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def captions(tmp_path):
    folder = tmp_path / "captions"
    write_captions(
        folder, "a", train=[(0, "a good movie"), (0, "movie"), (1, " a bad game ")], test=[(2, "movie"), (3, "a team")]
    )
    write_captions(folder, "b", train=[(4, "the market"), (5, "bank")], test=[(6, "world"), (7, "business")])
    return folder


def test_captions_are_label_texts_and_those_of_the_test_data_are_in_question(captions, tiny_clip, tmp_path):
    stream = load_stream(captions)
    assert stream.inputs == ("image",) and stream.modality == "image" and stream.scenario == "class"
    a, b = stream
    assert stream.label_texts(a.candidates) == ["a team", "movie"] and len(a.classes) == 4
    Learner(tiny_clip(), "lora", tmp_path / "r", training=TRAINING).learn(stream)
    last = predictions(tmp_path / "r")[-1]
    both = {*a.candidates, *b.candidates}
    for task in stream:
        assert last[f"target/{task.name}"].tolist() == task.test["label"][:]
        assert set(last[f"contrastive/task/{task.name}"].tolist()) <= set(task.candidates)
        assert set(last[f"contrastive/class/{task.name}"].tolist()) <= both
    learner = Learner.open(tmp_path / "r")
    assert learner.predict(pictures(2), classes=["bank", "world"])[0] in ("bank", "world")


def test_captions_of_the_test_data_are_in_question_where_nobody_says_where_tasks_end(captions):
    fed = drift(load_stream(captions), 2, (1, 3))
    for part in parts(fed, told_segments(fed)):
        assert part.captions and set(part.test["label"][:]) <= set(part.candidates)


def test_captions_beside_image_folders_and_under_another_name(tmp_path):
    for task in "ab":
        for split in ("train", "test"):
            folder = tmp_path / "s" / task / split
            folder.mkdir(parents=True)
            for i, picture in enumerate(pictures(2, seed=len(split))):
                picture.save(folder / f"{i}.png")
            lines = [json.dumps({"file_name": f"{i}.png", "text": f"{split} {i}"}) for i in range(2)]
            (folder / "metadata.jsonl").write_text("\n".join(lines))
    stream = load_stream(tmp_path / "s", columns={"text": "caption"})
    assert stream.label_texts(stream.tasks[0].candidates) == ["test 0", "test 1"]
    assert stream.label_texts(stream.tasks[0].classes) == ["test 0", "test 1", "train 0", "train 1"]
    numbered = stream.numbered(stream.labels[::-1])
    assert numbered.label_texts(numbered.tasks[1].candidates) == ["test 1", "test 0"]


def test_records_of_captions_that_cannot_be_asked_for_are_refused(tmp_path):
    write_captions(tmp_path / "s", "a", train=[(0, "x"), (1, "y")], test=[(2, "x"), (2, "z"), (3, "y"), (3, "y")])
    with pytest.raises(StreamError, match="test split of task `a` has 1 further captions of images that have one"):
        load_stream(tmp_path / "s")
    write_captions(tmp_path / "t", "a", train=[(0, "x"), (1, " ")], test=[(2, "x")])
    with pytest.raises(StreamError, match="1 of 2 captions of the train split of task `a` are empty"):
        load_stream(tmp_path / "t")


def test_a_validation_share_of_captions_is_one_of_images(tmp_path):
    """An image is in training with all its captions, or in validation with one."""
    several = [(n, f"{n} {text}") for n in range(8) for text in "xyz"]
    write_captions(tmp_path / "v", "a", train=several, test=[(9, "x")])
    task = load_stream(tmp_path / "v", validation_share=0.25).tasks[0]
    assert len(task.train) == 18 and len(task.validation) == 2 == len(set(task.validation["id"]))
    assert not set(task.train["id"]) & set(task.validation["id"])


def test_captions_are_read_by_heads_that_read_texts(captions, tiny_clip, tiny_vit, tmp_path):
    stream = load_stream(captions)
    for model, recipe, head in ((tiny_vit(), "lora", "linear"), (tiny_clip(), "frozen_ncm", "ncm"),
                                (tiny_clip(), "frozen_ridge", "ridge"), (None, "pixels_ridge", "ridge")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"head `{head}` knows the classes .* use the head contrastive"):
            Learner(model, recipe, tmp_path / recipe).learn(stream)
    with pytest.raises(ConfigError, match="head `ncm` knows the classes"):
        Learner(tiny_clip(), "lora", tmp_path / "two", heads=["contrastive", "ncm"]).learn(stream)
    Learner(tiny_clip(), "frozen_label_text", tmp_path / "zero", training=TRAINING).learn(stream)
    expected = ["lora", "sequential", "joint", "frozen_label_text"]
    assert with_controls(["lora"], "image", ["contrastive"], captions=True) == expected


def test_the_texts_are_read_by_the_model_as_it_is_now(classes, tiny_clip, tmp_path):
    """Both in the run and in one that is opened again; `label_text` keeps to the texts of the untouched model."""
    training = {**TRAINING, "num_train_epochs": 8, "learning_rate": 1e-2}
    heads = [{"type": "contrastive", "template": "a photo of a {}."}, "label_text", "ncm", "ridge"]
    learner = Learner(tiny_clip(), "sequential_lora", tmp_path / "r", heads=heads, training=training)
    stream = load_stream(classes)
    result = learner.learn(stream)
    assert {r.head for r in result.records()} == {"contrastive", "label_text", "ncm", "ridge"}
    again = Learner.open(tmp_path / "r")
    for one in (learner, again):
        one.predict(stream.tasks[0].test["image"][:])
        head, fixed = one.heads[:2]
        assert one.backbone.texts[0] == f"a photo of a {stream.labels[0]}."
        now = one.backbone.label_embeddings(one.backbone.texts)
        assert torch.allclose(head.embeddings, now, atol=1e-5)
        untouched = load_backbone(learner.setup.model, "image").label_embeddings(stream.labels)
        cosine = torch.nn.functional.cosine_similarity(fixed.embeddings, untouched)
        assert (
            torch.allclose(cosine, torch.ones(4)) and (now / now.norm(dim=1)[:, None] - fixed.embeddings).norm() > 0.1
        )
    moved = [g["value"] for g in result.guarantees if "earlier tasks' label texts" in g["name"]]
    assert len(moved) == 1 and moved[0] > 0.01


@pytest.mark.parametrize("heads", [["linear", "ridge"], ["label_text"], ["ncm"]])
def test_other_heads_read_the_image_embeddings(heads, classes, tiny_clip, tmp_path):
    learner = Learner(tiny_clip(), "sequential_lora", tmp_path / "r", heads=heads, training=TRAINING)
    result = learner.learn(load_stream(classes))
    assert {r.head for r in result.records()} == set(heads)
    changed = {n for n, p in learner.backbone.model.named_parameters() if "lora_B" in n and p.any()}
    assert changed and all("vision_model" in name for name in changed)  # their loss knows no texts


def test_the_contrastive_head_takes_the_place_of_a_lone_linear_one(classes, tiny_clip, tmp_path):
    def read(recipe, heads=None):
        learner = Learner(tiny_clip(), recipe, tmp_path / "none", heads=heads)
        learner.setup.fit_heads(learner.setup.load_backbone("image"))
        return [head.name for head in learner.heads]

    assert read("lora") == read("replay") == ["contrastive"]
    assert read("lora", ["linear"]) == read("color") == ["linear"]
    tuner = make_recipe("lora").tuner
    assert read(Recipe(tuner, head=[LinearHead(), RidgeHead()])) == ["linear", "ridge"]
    assert read("frozen_ncm") == ["ncm"] and read("frozen_label_text") == ["label_text"]


def test_zero_shot_is_the_untouched_model(classes, tiny_clip, tmp_path):
    result = Learner(tiny_clip(), "frozen_label_text", tmp_path / "r").learn(load_stream(classes))
    before, *_, last = predictions(tmp_path / "r")
    for task in ("a", "b"):
        assert torch.equal(before[f"label_text/task/{task}"], last[f"label_text/task/{task}"])
    assert all(g["holds"] is not False for g in result.guarantees)
    assert "frozen_label_text" in with_controls(["lora"], "image", ["contrastive"])
    assert "frozen_label_text" not in with_controls(["lora"], "image", ["linear"])


def test_an_export_loads_with_its_tokenizer_and_image_processor(classes, tiny_clip, tmp_path):
    learner = Learner(tiny_clip(), "lora", tmp_path / "r", training=TRAINING)
    stream = load_stream(classes)
    learner.learn(stream)
    exported = load_backbone(learner.export(tmp_path / "model"), "image")
    examples = exported.prepare(stream.tasks[0].test)
    assert torch.allclose(exported.features(examples, 4), learner.backbone.features(examples, 4), atol=1e-5)
    texts = list(stream.labels)
    assert torch.allclose(exported.label_embeddings(texts), learner.backbone.label_embeddings(texts), atol=1e-4)


# ---- what is refused ----


def test_what_a_dual_encoder_does_not_do_is_refused(tiny_clip, tmp_path):
    folder = tiny_clip()
    with pytest.raises(ModelError, match="reads images and texts into one space"):
        load_backbone(folder, "text")
    with pytest.raises(ModelError, match="its towers pool for themselves"):
        load_backbone(folder, "image", pooling="cls")
    shutil.copytree(folder, tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    with pytest.raises(ModelError, match="dual encoder without a tokenizer"):
        load_backbone(tmp_path / "m", "image")
    with torch.device("meta"):
        model = transformers.Siglip2Model(transformers.Siglip2Config())
    with pytest.raises(ModelError, match="patches of any number"):
        load_dual(model, None, "m", None, pooling=None, trust_remote_code=False)


def test_a_contrastive_head_needs_a_dual_encoder_in_one_state(classes, tiny_clip, tiny_vit, tmp_path):
    stream = load_stream(classes)
    for model, recipe in ((tiny_vit(), "lora"), (None, "pixels_ridge")):
        with pytest.raises(ConfigError, match="is no dual encoder"):
            Learner(model, recipe, tmp_path / "r", heads=["contrastive"]).learn(stream)
    with pytest.raises(ConfigError, match="PerTask keeps a state of the model for every task"):
        Learner(tiny_clip(), "color", tmp_path / "r", heads=["contrastive"]).learn(stream)
