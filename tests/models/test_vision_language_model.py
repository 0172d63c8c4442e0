"""Language models that read images: where the image stands, what it makes likely, what is refused."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from perpetune import ConfigError, Learner, ModelError, RuleError, load_stream
from perpetune.core.progress import Progress
from perpetune.learning.evaluator import Evaluator
from perpetune.models.loading import load_language_model
from perpetune.models.vision_language_model import PicturedBackbone
from perpetune.rules.linear_sites import linear_sites, see_inputs
from perpetune.rules.probes import Probes
from perpetune.streams.passage import mark

KINDS = ("llava", "llava_next", "qwen2_vl")
LABELS = ("good", "very bad movie", "bad")
SIZES = [(20, 10), (30, 5), (9, 40), (16, 16)]
PROMPTS = ["good movie?", "a great <image> team\n", "the film: " + "bad game " * 30 + "<image>", "<image> market"]


def noise(number):
    width, height = SIZES[number % len(SIZES)]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rows(prompts, labels=None):
    n = len(prompts)
    return datasets.Dataset.from_dict(
        {
            "image": [noise(i) for i in range(n)],
            "prompt": prompts,
            "label": labels or [0] * n,
            "id": [str(i) for i in range(n)],
        }
    )


def tiny_qwen(tiny_lm):
    """A random Qwen2-VL. Its processor refuses to be made without the package torchvision, which reads the videos."""
    import transformers as t

    names = ["<image>", "<video>", "<vision>", "</vision>"]
    roles = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
    special = dict(zip(roles, names, strict=True))
    tokenizer = t.AutoTokenizer.from_pretrained(tiny_lm("qwen2"), extra_special_tokens=special)
    ids = tokenizer.convert_tokens_to_ids(names)
    places = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = t.AutoConfig.from_pretrained(tiny_lm("qwen2")).to_dict()
    text |= {"vocab_size": len(tokenizer), "rope_parameters": rope, "model_type": "qwen2_vl_text"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, **dict(zip(places, ids, strict=True)))
    processor = t.Qwen2VLProcessor.__new__(t.Qwen2VLProcessor)
    processor.tokenizer, processor.chat_template = tokenizer, None
    processor.image_processor = t.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 512}
    )
    processor.image_token, processor.video_token = names[:2]
    processor.image_token_id, processor.video_token_id = ids[:2]
    torch.manual_seed(0)
    model = t.Qwen2VLForConditionalGeneration(config)
    return PicturedBackbone(model, processor, max_length=256, name="qwen")


@pytest.fixture(scope="module")
def loaded(tiny_llava, tiny_lm):
    """`loaded(kind, reads=, max_length=)`: a model that is open for `LABELS`."""

    def make(kind, labels=LABELS, reads=("options",), **options):
        qwen = kind == "qwen2_vl"
        model = tiny_qwen(tiny_lm) if qwen else load_language_model(tiny_llava(kind), **options)
        model.open(labels, reads)
        return model.eval()

    return make


def pieces(model, ids):
    return model.processor.tokenizer.convert_ids_to_tokens([int(i) for i in ids])


# ---- tokens ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_stands_where_the_processor_puts_it(loaded, kind):
    """At its place; first, and on a line of its own, where the prompt says no place."""
    model = loaded(kind)
    for example, row in zip(model.prepare(rows(PROMPTS)), rows(PROMPTS), strict=True):
        text = row["prompt"] if "<image>" in row["prompt"] else f"<image>\n{row['prompt']}"
        expected = model.processor(images=[row["image"]], text=[text], return_tensors="pt")
        assert example["input_ids"] == expected["input_ids"][0].tolist()
        assert example["picture"] and all(torch.equal(t, expected[k]) for k, t in example["picture"].items())


def test_loss_is_on_the_answer_alone_and_padding_on_the_left(loaded):
    model = loaded("llava")
    examples = model.prepare(rows(["a <image> team", "great team <image>"], [0, 2]))
    batch = model.collate(examples)
    assert [pieces(model, row) for row in batch["input_ids"]] == [
        ["<s>", "▁a", "▁", *["<image>"] * 4, "▁team", "▁good", "</s>"],
        ["<s>", "▁great", "▁team", "▁", *["<image>"] * 4, "▁bad", "</s>"],
    ]
    batch = model.collate(model.prepare(rows(["a <image> team", "<image>"], [0, 2])))
    assert pieces(model, batch["input_ids"][1]) == [*["<pad>"] * 3, "<s>", *["<image>"] * 4, "▁bad", "</s>"]
    assert batch["attention_mask"].tolist() == [[1] * 10, [0, 0, 0, *[1] * 7]]
    assert [pieces(model, row) for row in batch["answers"]] == [["▁good", "</s>"], ["▁bad", "</s>"]]
    assert torch.equal(batch["pixel_values"], torch.cat([e["picture"]["pixel_values"] for e in examples]))
    assert batch["pixel_values"][0].ne(batch["pixel_values"][1]).any()


def test_a_long_prompt_loses_words_and_never_the_image(loaded):
    model = loaded("llava", max_length=8)
    (example,) = model.prepare(rows(["film: <image> " + "good " * 9 + "bad " * 9 + "movie?"]))
    assert pieces(model, example["input_ids"]).count("<image>") == 4
    assert len(example["input_ids"]) == 8 + 3  # its tokens do not count, but for one
    (example,) = model.prepare(rows(["game " + mark("<image> " + "good " * 20) + "team"]))
    found = pieces(model, example["input_ids"])
    assert found[:2] == ["<s>", "▁game"] and found[-1] == "▁team" and found.count("<image>") == 4
    assert len(found) == 8 + 3


def test_an_image_takes_its_room_from_the_models(loaded, monkeypatch):
    model = loaded("llava")
    (example,) = model.prepare(rows(["film " * 300]))
    assert len(example["input_ids"]) == model.limit == 256 - len(model.tokens.answer(LABELS[1]))
    monkeypatch.setattr(model, "limit", 3)
    with pytest.raises(ModelError, match="an image takes 4 tokens, and .* reads 3 of a prompt"):
        model.prepare(rows(["film"]))


# ---- the likelihood ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_librarys_own(loaded, kind):
    """Each example alone, without padding: what the model makes of the processor's own tokens, and -100."""
    model = loaded(kind)
    examples = model.prepare(rows(PROMPTS, [0, 1, 2, 1]))
    batch = model.collate(examples)
    batch.pop("labels")
    found = model(**batch)
    for (log_p, count), e in zip(found.tolist(), examples, strict=True):
        ids = torch.tensor([[*e["input_ids"], *e["answer"]]])
        labels = torch.tensor([[*[-100] * len(e["input_ids"]), *e["answer"]]])
        kinds = {"mm_token_type_ids": (ids == model.tokens.picture).int()} if kind == "qwen2_vl" else {}
        with torch.no_grad():
            reference = model.model(input_ids=ids, labels=labels, **e["picture"], **kinds)
        assert count == len(e["answer"])
        assert -log_p / count == pytest.approx(float(reference.loss), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_options_rank_as_whole_sequences_do_and_the_image_is_read_once(loaded, kind, monkeypatch):
    model = loaded(kind)
    examples = model.prepare(rows(PROMPTS))
    with torch.no_grad():
        naive = torch.stack([model._alone(examples, c) for c in range(3)], 1)
    seen = []
    tower = model.model.get_encoder("image")
    handle = tower.register_forward_hook(lambda *_: seen.append(1))
    found = model.outputs(examples, batch_size=3, classes=range(3))
    handle.remove()
    assert torch.allclose(found, naive, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.argsort(1), naive.argsort(1))
    assert len(seen) == 2  # batches


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_makes_another_answer_likely(loaded, kind):
    model = loaded(kind)
    first, *_, last = model.prepare(rows(["film <image>"] * 5))  # pictures of the same size
    pair = [first, {**first, "picture": last["picture"]}]
    found = model.outputs(pair, 2, classes=range(3))
    assert (found[0] - found[1]).abs().max() > 0.05
    alone = model.outputs(pair[1:], 1, classes=range(3))
    assert torch.allclose(found[1], alone[0], rtol=1e-5, atol=1e-4)  # each example reads its own


@pytest.mark.parametrize("kind", KINDS)
def test_generated_answers_are_the_most_likely_tokens(loaded, kind):
    """Greedy, one token after the other, each prompt alone and without padding or cache."""
    model = loaded(kind, reads=("generate",))
    # words follow every image: behind one, transformers 5.23 counts Qwen2-VL's positions on otherwise than in training
    examples = model.prepare(rows([*PROMPTS[:2], "<image> market"]))
    for example, answer in zip(examples, model.answers(examples, 3), strict=True):
        told: list[int] = []
        while len(told) < 12 and told[-1:] not in ([model.tokens.end], [model.tokens.picture]):
            ids = torch.tensor([[*example["input_ids"], *told]])
            kinds = {"mm_token_type_ids": (ids == model.tokens.picture).int()} if kind == "qwen2_vl" else {}
            with torch.no_grad():
                told.append(int(model.model(input_ids=ids, **example["picture"], **kinds).logits[0, -1].argmax()))
        assert answer.startswith(model.processor.decode(told, skip_special_tokens=True))


def test_prompts_without_images_are_read_too(loaded):
    model = loaded("llava")
    plain = rows(["good movie", "a"], [0, 1]).remove_columns("image")
    examples = model.prepare(plain)
    assert "pixel_values" not in model.collate(examples)
    assert pieces(model, examples[0]["input_ids"]) == ["<s>", "▁good", "▁movie"]
    assert model.outputs(examples, 2, classes=range(3)).isfinite().all()
    with pytest.raises(ModelError, match=r"1 places for images \(`<image>`\) and 0 images"):
        model.prepare(rows(["<image> a"]).remove_columns("image"))


# ---- what projection remembers ----


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_padding_is_left_out_of_what_is_protected_and_no_image_is(loaded, kind):
    """What layers read of a padded batch is what they read of each example alone, in tower, projector and decoder."""
    model = loaded(kind)
    model.requires_grad_(True)
    examples = model.prepare(rows(["film <image>"] * 2 + ["the good game: bad team <image>"], [0, 2, 1]))
    parts = ("q_proj", "down_proj", "qkv", "fc2", "linear_1", "linear_2", "proj")
    sites = [s for s in linear_sites(model)[0] if s.name.split(".")[-1] in parts]

    def second_moments(*batches):
        seen: dict[str, torch.Tensor] = {}

        def see(site, X, mask):
            X = X.flatten(0, -2) if mask is None else X.reshape(*mask.shape, -1)[mask.bool()]
            seen[site.name] = seen.get(site.name, 0) + X.double().T @ X.double()

        given = [{k: v for k, v in model.collate(group).items() if k != "labels"} for group in batches]
        see_inputs(model, sites, given, see)
        return seen

    together, alone = second_moments(examples), second_moments(*([e] for e in examples))
    towers = {name.split(".layers.")[0].split(".blocks.")[0].split(".")[2] for name in together}
    assert towers >= ({"vision_tower", "multi_modal_projector"} if kind == "llava" else {"visual"})
    for name in together:
        assert torch.allclose(together[name], alone[name], rtol=1e-3, atol=1e-3), name


def test_patches_are_not_taken_for_the_tokens_of_a_padded_batch(loaded):
    """Qwen2-VL's tower reads all patches in one row; with 24 of them, a mask of 2 x 12 tokens would fit by chance."""
    model = loaded("qwen2_vl")
    model.requires_grad_(True)
    examples = model.prepare(rows(["film"] * 4))
    pair = [examples[0], examples[2]]  # 8 and 20 patches
    patches = sum(len(e["picture"]["pixel_values"]) for e in pair)
    batch = model.collate(pair)
    batch.pop("labels")
    batch["attention_mask"] = batch["attention_mask"].new_ones(2, patches // 2)
    length = batch["input_ids"].shape[1]
    longer = patches // 2 - length
    assert longer >= 0
    fill = {"input_ids": model.tokens.pad, "mm_token_type_ids": 0}
    for name, value in fill.items():
        batch[name] = torch.nn.functional.pad(batch[name], (longer, 0), value=value)
    batch["attention_mask"][:, :longer] = 0
    sites = [s for s in linear_sites(model)[0] if s.name.endswith(("qkv", "down_proj"))]
    masks = {}
    see_inputs(model, sites, [batch], lambda site, X, mask: masks.setdefault(site.name, (X.shape[:-1], mask)))
    for name, (shape, mask) in masks.items():
        assert (mask is None) == (".visual." in name), name
        assert shape == ((patches,) if ".visual." in name else (2, patches // 2))


def test_probes_of_patches_are_refused(loaded):
    model = loaded("qwen2_vl")
    batch = model.collate(model.prepare(rows(PROMPTS[:2])))
    batch.pop("labels")
    with pytest.raises(RuleError, match="no probes can be taken of `pixel_values`"):
        Probes().add(model, [batch], 1)
    llava = loaded("llava")
    batch = llava.collate(llava.prepare(rows(PROMPTS)))
    batch.pop("labels")
    probes = Probes()
    probes.add(llava, [batch], 1)
    assert probes.drift(llava) == 0 and len(probes.tasks[0][0]["pixel_values"]) == 1


# ---- learning ----

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230), "dark": (5, 5, 5), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """One question, and the answer is in the picture."""
    folder = tmp_path_factory.mktemp("colours")
    draw = np.random.default_rng(0)
    for task, names in (("bright", ("red", "blue")), ("grey", ("dark", "white"))):
        (folder / task).mkdir()
        for split, count in (("train", 6), ("test", 4)):
            lines = []
            for i in range(count):
                name = names[i % 2]
                pixels = np.clip(draw.normal(COLOURS[name], 8, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / task / f"{split}{i}.png")
                lines.append({"image": f"{split}{i}.png", "question": "which colour?", "answer": name})
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_stream(folder, columns={"question": "prompt", "answer": "response"})


def test_a_model_learns_to_answer_from_the_image_and_is_exported(tiny_llava, colours, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    training = {
        "num_train_epochs": 25,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 8,
    }
    heads = ["language", "language_generated"]
    first = colours.select(["bright"])
    learner = Learner(tiny_llava(), "lora", tmp_path / "r", heads=heads, training=training)
    result = learner.learn(first)
    asked = [(row["image"], row["prompt"]) for row in first.tasks[0].test]
    expected = colours.label_texts(first.tasks[0].test["label"][:])
    for head in heads:
        assert result.matrix(head, "class").values[-1, 0] == 1
        assert learner.predict(asked, head=head) == expected
    again = Learner.open(tmp_path / "r")
    assert [again.predict(asked, head=head) for head in heads] == [expected, expected]

    folder = learner.export(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    exported = AutoModelForImageTextToText.from_pretrained(folder).eval()
    picture, prompt = asked[0]
    inputs = processor(images=[picture.convert("RGB")], text=[f"<image>\n{prompt}"], return_tensors="pt")
    answer = exported.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == expected[0]


def test_controls(tiny_llava, colours, tmp_path):
    zero = Learner(tiny_llava(), "frozen_label_text", tmp_path / "z").learn(colours)
    matrix = zero.matrix("language", "task")
    assert (matrix.values[-1] == matrix.baseline).all()
    words = Learner(None, "tfidf_ridge", tmp_path / "w").learn(colours)  # which sees no image
    assert (words.matrix("ridge", "task").values[-1] == 0.5).all()


def test_pictures_of_test_data_are_not_kept(tiny_llava, colours):
    model = load_language_model(tiny_llava())
    model.open(colours.labels, ["options"])
    evaluator = Evaluator(model, 8, Progress())
    evaluator.features(colours.tasks[0], "test", range(2))
    assert not evaluator._examples


# ---- refused ----


def test_what_reads_no_image_or_cannot_place_it_is_refused(tiny_lm, tiny_llava, loaded, colours, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="reads no images: use a model that does"):
        Learner(tiny_lm("llama"), "lora", tmp_path / "a").learn(colours)
    with pytest.raises(ConfigError, match="head `ridge` reads pooled features"):
        Learner(tiny_llava(), "lora", tmp_path / "b", heads=["ridge"]).learn(colours)
    model = loaded("llava")
    with pytest.raises(ModelError, match=r"2 places for images \(`<image>`\) and 1 images"):
        model.prepare(rows(["<image> a <image>"]))
    with pytest.raises(ModelError, match=r"give \(image, prompt\) for each image"):
        model.prepare(rows(["a"]).remove_columns("prompt"))
    with pytest.raises(ModelError, match="the answer `an <image>` holds `<image>`"):
        model.open(["good", "an <image>"], ["options"])
    with pytest.raises(ModelError, match=r"writes images as token 3 \(`<s>`\), the model reads them at token"):
        monkeypatch.setattr(model.processor, "image_token", "<s>")
        PicturedBackbone(model.model, model.processor, max_length=64, name="x")
    monkeypatch.undo()
    monkeypatch.setattr(type(model.processor), "__call__", lambda *a, **k: {"input_ids": [], "token_type_ids": []})
    with pytest.raises(ModelError, match="gives `token_type_ids`, which is not known here"):
        model.prepare(rows(["a"]))
    monkeypatch.undo()
    model.processor = model.processor.tokenizer
    with pytest.raises(ModelError, match="has no token that stands for an image"):
        model.prepare(rows(["a"]))
