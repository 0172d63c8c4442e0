"""An exported classifier classifies where perpetune cannot be imported: in the class of its architecture, or by the
files beside it."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from perpetune import Learner, load_stream
from tests.calling import call

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 12, "head_learning_rate": 0.1}
WITHOUT = "import sys\nsys.modules['perpetune'] = None\n"
CLASSIFY = """
import json, torch, transformers
folder, kind, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = getattr(transformers, f"AutoModelFor{kind}Classification").from_pretrained(folder)
if kind == "Sequence":
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
else:
    from PIL import Image
    reader = transformers.AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    inputs = reader(pictures, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
labels = [model.config.id2label[i] for i in range(logits.shape[1])]
print(json.dumps({"name": type(model).__name__, "logits": logits.tolist(), "labels": labels}))
"""
TEXTS = ["movie film the band", "team", "market bank game song a the the", "great"]


@pytest.fixture
def without(elsewhere):
    """The last line that a program prints in a process that cannot import perpetune."""
    return lambda code, *arguments: elsewhere(WITHOUT + code, *arguments).strip().splitlines()[-1]


def logits_of(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)).logits, model


def expected(learner, texts):
    """Scores of the first head for the classes that were learned."""
    state = learner.state
    examples = [{**x, "label": 0, "id": ""} for x in learner.backbone._tokenised(texts)]
    return state.heads[0].scores(learner.backbone.features(examples, 8))[:, sorted(state.known.classes)]


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news"])


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert(width=16, layers=1)


@pytest.fixture(scope="module")
def roberta(model, tmp_path_factory):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learned(model, stream, path, recipe="lora", **options):
    learner = Learner(model, recipe, path, training=TRAINING, **options)
    learner.learn(stream)
    return learner


@pytest.fixture(scope="module")
def pooled(model, stream, tmp_path_factory):
    """`pooled(pooling)`: a learner of the stream, trained once."""
    return functools.cache(lambda pooling: learned(model, stream, tmp_path_factory.mktemp(pooling), pooling=pooling))


@pytest.mark.parametrize(
    ("base", "pooling", "name"),
    [
        ("model", "cls", "BertForSequenceClassification"),
        ("model", "pooler", "BertForSequenceClassification"),
        ("roberta", "cls", "RobertaForSequenceClassification"),
    ],
)
def test_the_class_of_the_architecture_has_the_scores_as_logits(
    base, pooling, name, stream, roberta, pooled, without, tmp_path
):
    learner = pooled(pooling) if base == "model" else learned(roberta, stream, tmp_path / "r", pooling=pooling)
    folder = learner.export(tmp_path / "m")
    logits, found = logits_of(folder)
    scores = expected(learner, TEXTS)
    assert type(found).__name__ == name and list(found.config.id2label.values()) == list(stream.labels)
    assert torch.allclose(logits, scores, rtol=1e-4, atol=1e-4)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["label2id"] == {label: i for i, label in enumerate(stream.labels)}
    assert [found.config.id2label[i] for i in logits.argmax(1).tolist()] == learner.predict(TEXTS)
    if pooling == "cls" and base == "model":
        there = json.loads(without(CLASSIFY, folder, "Sequence", json.dumps(TEXTS)))
        assert there["name"] == name and there["labels"] == list(stream.labels)
        assert torch.allclose(torch.tensor(there["logits"]), scores, rtol=1e-4, atol=1e-4)
    half = json.loads(
        without(CLASSIFY, learner.export(tmp_path / "h", dtype="bfloat16"), "Sequence", json.dumps(TEXTS))
    )
    assert torch.allclose(torch.tensor(half["logits"]), scores, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("head", ["ncm", "label_text", {"type": "ridge", "features": 0, "regularisation": 1.0}])
def test_heads_that_are_linear_on_features(head, model, stream, tmp_path):
    learner = learned(model, stream, tmp_path / "r", heads=[head], pooling="cls")
    logits, found = logits_of(learner.export(tmp_path / "m"))
    assert list(found.config.id2label.values()) == list(stream.labels)
    assert [found.config.id2label[i] for i in logits.argmax(1).tolist()] == learner.predict(TEXTS)


def test_images(tiny_vit, without, tmp_path):
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        for label, shade in (("dark", 30), ("light", 200)):
            folder = tmp_path / "images" / "one" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (shade + torch.randint(0, 40, (8, 8, 3), generator=draw)).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    learner = learned(tiny_vit(width=16, layers=1), load_stream(tmp_path / "images"), tmp_path / "r")
    found = json.loads(without(CLASSIFY, learner.export(tmp_path / "m"), "Image", "[]"))
    pictures = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    backbone = learner.backbone
    examples = [{"pixel_values": x, "label": 0, "id": ""} for x in backbone._pixels(pictures)]
    scores = learner.heads[0].scores(backbone.features(examples, 8))
    assert found["name"] == "ViTForImageClassification" and found["labels"] == ["dark", "light"]
    assert torch.allclose(torch.tensor(found["logits"]), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pooling", "head"), [("mean", None), ("last", "ncm")])
def test_a_head_that_does_not_fit_lies_beside_with_a_readme_that_works(
    pooling, head, model, stream, pooled, without, tmp_path
):
    learner = learned(model, stream, tmp_path / "r", pooling=pooling, heads=[head]) if head else pooled(pooling)
    folder = learner.export(tmp_path / "m")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == ["BertModel"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert '["a text", "another"]' in code and len(code.splitlines()) < 16
    code = code.replace('["a text", "another"]', repr(TEXTS)).replace("print([", "print(scores.tolist(), [")
    out = without(f"import os\nos.chdir({str(folder)!r})\n" + code)
    scores, labels = out[: out.index("]] [") + 2], out[out.index("]] [") + 3 :]
    assert torch.allclose(torch.tensor(json.loads(scores)), expected(learner, TEXTS).float(), rtol=1e-4, atol=1e-4)
    assert eval(labels) == learner.predict(TEXTS)


def test_the_command_says_what_became_of_the_head(model, stream, pooled, tmp_path, monkeypatch, capsys):
    runs = {pooling: pooled(pooling).path for pooling in ("mean", "cls")}
    learned(model, stream, tmp_path / "ridge", heads=["ridge"], pooling="cls")
    out = tmp_path / "m"

    def told(run, *options):
        code, text, _ = call(monkeypatch, capsys, "export", runs.get(run, tmp_path / run), "--out", out, *options)
        assert code == 0
        return text

    assert "its head `linear` lies beside it in classifier.safetensors" in told("mean")
    assert "BertForSequenceClassification does not pool as the run did (mean)" in told("mean")
    assert load_file(out / "classifier.safetensors")["weight"].shape == (4, 16)
    assert "BertForSequenceClassification for film, music" in told("cls")
    assert not (out / "classifier.json").exists()  # of the export before
    assert "its head `ridge` is no linear map of its features, and stays in the run" in told("ridge")
    assert "without its head" in told("cls", "--no-head")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"] == ["BertModel"]
    assert "its head reads the features of all tasks, and stays in the run" in told("cls", "--only", "films")
