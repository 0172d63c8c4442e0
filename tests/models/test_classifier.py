"""A model that was fine-tuned as a classifier: its head is named where it is left out, and a linear head may go on
from its rows."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from perpetune import HeadError, Learner, ModelError, load_stream
from perpetune.core.progress import Progress
from perpetune.heads import LinearHead, OwnClassifierHead
from perpetune.learning.state import LearnerState
from perpetune.models.loading import load_backbone
from tests.models.test_architectures import made, rows

__all__ = ["made"]

TEXTS = ["a", "good movie", "hello world, this is a longer text"]
LABELS = {0: "late", 1: "refund", 2: "praise"}
OWN = {"id2label": LABELS, "num_labels": 3}
STILL = {"learning_rate": 0.0, "head_learning_rate": 0.0, "num_train_epochs": 1}


def whole_logits(folder, texts=TEXTS):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    out = []
    for text in texts:
        encoded = tokenizer([text], return_tensors="pt")
        if model.config.model_type == "llama":
            encoded.pop("token_type_ids", None)
        with torch.no_grad():
            out.append(model(**encoded).logits[0])
    return torch.stack(out)


@pytest.mark.parametrize(
    ("name", "pooling"), [("Bert", "pooler"), ("Albert", "pooler"), ("GPT2", "last"), ("Llama", "last")]
)
def test_the_rows_of_a_classifier_make_its_logits(made, name, pooling):
    folder = made(name, kind="ForSequenceClassification", **OWN)
    backbone = load_backbone(folder, "text", pooling=pooling)
    assert backbone.left_out == tuple(LABELS.values())
    own = backbone.own_head()
    head = OwnClassifierHead()
    head.open(backbone.width, ["praise", "other", "late"], seed=0)
    head.start_from(own.weight, own.bias, own.labels)
    head.begin_task([0, 1, 2])
    scores = head.scores(backbone.features(backbone.prepare(rows(TEXTS)), 2))
    assert torch.allclose(scores[:, [2, 0]].detach(), whole_logits(folder)[:, [0, 2]], atol=1e-4)
    plain = LinearHead()
    plain.open(backbone.width, ["praise", "other", "late"], seed=0)
    assert torch.equal(plain.weight[1], head.weight[1]) and not torch.equal(plain.weight[0], head.weight[0])


def test_the_rows_of_an_image_classifier_make_its_logits(tiny_vit, tmp_path):
    base = tiny_vit()
    config = transformers.AutoConfig.from_pretrained(base, **OWN)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(base).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, "image")
    own = backbone.own_head()
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    examples = backbone.samples()
    with torch.no_grad():
        expected = model(pixel_values=torch.stack([e["pixel_values"] for e in examples])).logits
    assert torch.allclose(backbone.features(examples, 2) @ own.weight.T + own.bias, expected, atol=1e-4)
    # also where several views of a picture are read, of which its logits are none
    recipe = {"name": "frozen_best", "views": 4}
    setup = Learner(tmp_path, recipe, tmp_path / "run", heads=["own_classifier"]).setup
    state = LearnerState(setup, setup.load_backbone("image"), ["praise", "late"])
    assert state.backbone.all_views and torch.equal(state.heads[0].weight[1], own.weight[0])


@pytest.mark.parametrize(("name", "pooling"), [("Bert", "mean"), ("Roberta", "cls"), ("DistilBert", "cls")])
def test_a_head_that_reads_something_else_is_refused(made, name, pooling):
    folder = made(name, kind="ForSequenceClassification", **OWN)
    backbone = load_backbone(folder, "text", pooling=pooling)
    with pytest.raises(ModelError, match=f"not one linear layer on features pooled by `{pooling}`"):
        backbone.own_head()


def test_a_model_without_a_head_has_none(made):
    backbone = load_backbone(made("Bert"), "text")
    assert backbone.left_out == ()
    with pytest.raises(ModelError, match="is no fine-tuned classifier"):
        backbone.own_head()


def test_a_head_of_other_classes_is_refused():
    head = OwnClassifierHead()
    head.open(4, ["good", "bad"], seed=0)
    with pytest.raises(HeadError, match="knows late, refund, and none of the classes of this stream"):
        head.start_from(torch.zeros(2, 4), torch.zeros(2), ["late", "refund"])


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    (folder / "w1").mkdir()
    for split in ("train", "test"):
        found = [{"text": f"{t} {split} {i}", "label": label} for i in range(2) for t, label in zip(
            TEXTS, LABELS.values(), strict=True)]  # fmt: skip
        (folder / "w1" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    return load_stream(folder)


def test_a_run_says_that_the_head_is_left_out_or_goes_on_from_it(made, letters, tmp_path):
    folder = made("Bert", kind="ForSequenceClassification", **OWN)
    said = Said()
    Learner(folder, "lora", tmp_path / "plain", training=STILL, progress=said).learn(letters)
    assert any("classifier of late, refund, praise: this head is left out" in line for line in said.lines)
    said, heads = Said(), ["own_classifier"]
    learner = Learner(
        folder, "lora", tmp_path / "own", heads=heads, training=STILL, pooling="pooler", progress=said
    )  # fmt: skip
    learner.learn(letters)
    assert not any("left out" in line for line in said.lines)
    expected = [LABELS[c] for c in whole_logits(folder).argmax(1).tolist()]
    assert learner.predict(TEXTS) == expected
    assert Learner.open(tmp_path / "own").predict(TEXTS) == expected
