"""Language models: the collator token by token, options scored as whole sequences would be, answers generated."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from perpetune import ConfigError, Learner, ModelError, load_stream
from perpetune.heads import make_head
from perpetune.models.loading import load_backbone, load_language_model
from perpetune.streams.passage import mark
from perpetune.tuners import DeepPromptConfig, as_tuner

KINDS = ("llama", "qwen2", "gpt2", "t5")
DBPEDIA = (
    "Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, Building, "
    "Natural Place, Village, Animal, Plant, Album, Film, Written Work"
).split(", ")
LABELS = ("good", "very bad", "bad")
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}


def loaded(folder, labels=LABELS, reads=("options",), **options):
    model = load_language_model(folder, **options)
    model.open(labels, reads)
    return model.eval()


def rows(prompts, labels=None, column="prompt"):
    import datasets

    labels = labels or [0] * len(prompts)
    return datasets.Dataset.from_dict({column: prompts, "label": labels, "id": [str(i) for i in range(len(prompts))]})


def pieces(model, ids):
    return model.processor.convert_ids_to_tokens([int(i) for i in ids])


def prompt_of(model, text, column="prompt"):
    return pieces(model, model.prepare(rows([text], column=column))[0]["input_ids"])


def naive(model, examples, classes):
    """log p of whole sequences, one option after the other."""
    found = []
    for c in classes:
        some = [{**e, "answer": model.tokens.answer(model.labels[c], e["blank"])} for e in examples]
        batch = model.collate(some)
        batch.pop("labels")
        with torch.no_grad():
            found.append(model(**batch)[:, 0])
    return torch.stack(found, 1)


PROMPTS = ["bad movie", "the great team Answer:", "a film\n", "good " * 9 + "Answer:", "market"]


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=8, test_limit=4)


# ---- the collator ----


def test_a_decoder_carries_loss_on_the_answer_and_its_end_alone(tiny_lm):
    model = loaded(tiny_lm("llama"))
    batch = model.collate(model.prepare(rows(["good movie Answer:", "bad\n"], [0, 1])))
    assert [pieces(model, row) for row in batch["input_ids"]] == [
        ["<pad>", "<s>", "▁good", "▁movie", "▁Answer", ":", "▁good", "</s>"],
        ["<s>", "▁bad", "\n", "ve", "r", "y", "▁bad", "</s>"],  # no blank behind a line that has ended
    ]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8]
    assert [pieces(model, [i for i in row if i >= 0]) for row in batch["answers"]] == [
        ["▁good", "</s>"],
        ["ve", "r", "y", "▁bad", "</s>"],
    ]
    assert (batch["answers"] == -100).tolist() == [[True, True, True, False, False], [False] * 5]
    assert torch.equal(batch["input_ids"][:, -5:][batch["answers"] >= 0], batch["answers"][batch["answers"] >= 0])
    assert batch["labels"].tolist() == [0, 1]


def test_an_encoder_decoder_carries_loss_on_the_answer_and_its_end_alone(tiny_lm):
    model = loaded(tiny_lm("t5"))
    batch = model.collate(model.prepare(rows(["good movie Answer:", "bad\n"], [0, 1])))
    assert [pieces(model, row) for row in batch["input_ids"]] == [
        ["▁good", "▁movie", "▁Answer", ":", "</s>"],
        ["▁bad", "\n", "</s>", "<pad>", "<pad>"],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert [pieces(model, row) for row in batch["decoder_input_ids"]] == [
        ["<pad>", "▁good", *["<pad>"] * 4],  # T5's answers start with its padding token
        ["<pad>", "▁", "ve", "r", "y", "▁bad"],
    ]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    assert [pieces(model, [i for i in row if i >= 0]) for row in batch["answers"]] == [
        ["▁good", "</s>"],
        ["▁", "ve", "r", "y", "▁bad", "</s>"],
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", ["<s>", "▁film", ":", "▁good", "▁the", "▁team", "▁Answer", ":"]),
        ("t5", ["▁film", ":", "▁good", "▁the", "▁team", "▁Answer", ":", "</s>"]),
    ],
)
def test_a_long_prompt_loses_the_middle_of_its_passage_alone(tiny_lm, kind, expected):
    model = loaded(tiny_lm(kind), max_length=8)
    text = f"film: {mark('good ' + 'bad movie ' * 20 + 'the')} team Answer:"
    assert prompt_of(model, text) == expected
    example = model.prepare(rows([text], [1]))[0]
    assert example["answer"] == model.tokens.answer("very bad")  # and the answer nothing


def test_what_stands_outside_of_the_passage_is_never_cut(tiny_lm):
    model = loaded(tiny_lm("llama"), max_length=5)
    assert prompt_of(model, "good movie bad movie team market") == ["<s>", "▁good", "▁movie", "▁team", "▁market"]
    with pytest.raises(ModelError, match="7 tokens outside of its passage, and there is room for 5"):
        prompt_of(model, f"good movie bad{mark(' movie')} team market game")


def test_the_answers_of_a_decoder_have_room_beside_the_prompt(tiny_lm):
    model = loaded(tiny_lm("llama"), labels=["good", ("bad " * 200).strip()])
    assert model.room == 256 - 201
    assert len(prompt_of(model, "movie " * 300)) == 55
    assert loaded(tiny_lm("llama"), reads=("options", "generate")).room == 256 - 50
    with pytest.raises(ModelError, match="its answers take all of them"):
        loaded(tiny_lm("llama"), labels=["bad " * 300])


def test_special_tokens_are_not_doubled(tiny_lm):
    assert prompt_of(loaded(tiny_lm("llama")), "<s> good movie") == ["<s>", "▁good", "▁movie"]
    model = loaded(tiny_lm("llama"))
    model.processor.backend_tokenizer.post_processor = loaded(tiny_lm("t5")).processor.backend_tokenizer.post_processor
    assert prompt_of(model, "good movie") == ["▁good", "▁movie"]  # a decoder goes on: no end before the answer


def test_conversations_are_written_by_the_chat_template(tiny_lm):
    model = loaded(tiny_lm("llama"), max_length=14)
    talk = json.dumps([{"role": "system", "content": "good"}, {"role": "user", "content": "movie " * 30}])
    with pytest.raises(ModelError, match="no chat template"):
        prompt_of(model, talk, "messages")
    model.processor.chat_template = (
        "<s>{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: "
        "{% endif %}"
    )
    written = prompt_of(model, talk, "messages")
    assert len(written) == 14 and written.count("<s>") == 1
    text = model.processor.convert_tokens_to_string(written[1:])
    assert text.split("\n")[0].endswith("s: good") and text.endswith("\na: ") and "movie" in text
    example = model.prepare(rows([talk], [1], "messages"))[0]
    assert pieces(model, example["answer"]) == ["ve", "r", "y", "▁bad", "</s>"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(tiny_lm, template, *marks, **settings):
    """A LLaMA whose tokenizer has this chat template and these special tokens, which stand for words of its own."""
    from transformers import GenerationConfig

    source = tiny_lm("llama")
    folder = shutil.copytree(source, tempfile.mkdtemp(dir=source.parent), dirs_exist_ok=True)
    folder, tokenizer = Path(folder), AutoTokenizer.from_pretrained(folder)
    names = dict(zip(("good", "bad", "movie"), marks, strict=False))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    known = json.loads(text)
    for word, special in names.items():
        token = known["model"]["vocab"].pop("\u2581" + word)
        known["model"]["vocab"][special] = token
        known["model"]["merges"] = [m for m in known["model"]["merges"] if "".join(m) != "\u2581" + word]
        known["added_tokens"].append({**known["added_tokens"][0], "id": token, "content": special})
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    GenerationConfig(**settings).save_pretrained(folder)
    return folder


def test_an_answer_ends_with_what_the_template_writes_after_the_assistants_turn(tiny_lm):
    model = loaded(chat(tiny_lm, CHATML, "<|im_start|>", "<|im_end|>"), labels=["team", "game"], reads=["generate"])
    talk = [{"role": "user", "content": "market"}]
    example = model.prepare(rows([json.dumps(talk)], [1], "messages"))[0]
    trained = [*example["input_ids"], *example["answer"]]
    whole = model.processor.apply_chat_template([*talk, {"role": "assistant", "content": "game"}], tokenize=False)
    written = model.processor(whole, add_special_tokens=False)["input_ids"]
    assert pieces(model, trained)[-5:] == ["\n", "g", "am", "e", "<|im_end|>"]
    assert written[: len(trained)] == trained  # the template goes on with a line break
    plain = model.prepare(rows(["market"], [1]))[0]  # no template wrote it
    assert pieces(model, plain["answer"]) == ["▁game", "</s>"]
    assert model.label_embeddings(["game"]).tolist() == [[2.0]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML.replace("<|im_end|>", "</s>"), "</s>"),
        (CHATML.replace("<|im_end|>", ""), "</s>"),  # writes but a line break
        ("{{ raise_exception('no') }}", "</s>"),
        (CHATML.replace("<|im_end|>\n", " <|im_end|></s>\n"), "<|im_end|>"),
    ],
)
def test_the_end_of_a_turn_is_a_special_token_or_that_of_a_sequence(tiny_lm, template, expected):
    model = loaded(chat(tiny_lm, template, "<|im_start|>", "<|im_end|>"))
    assert pieces(model, [model.tokens.turn_end]) == [expected]


def test_generation_stops_at_each_end_that_the_model_knows(tiny_lm, monkeypatch):
    marks = ("<|im_start|>", "<|im_end|>", "<|call|>")
    model = loaded(chat(tiny_lm, CHATML, *marks, eos_token_id=[1, 5]), labels=["team"], reads=["generate"])
    turn, eos = model.tokens.turn_end, model.tokens.end
    assert set(model.ends) == {turn, eos, 1, 5} and turn != eos
    examples = model.prepare(rows(["market", "the team"]))
    says = model.processor("team", add_special_tokens=False)["input_ids"]
    script = torch.tensor([*says, 0, *says])

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        step = min(forward.steps, len(script) - 1)
        forward.steps += 1
        logits = torch.nn.functional.one_hot(script[step].expand(len(input_ids), 1), self.config.vocab_size) * 9.0
        return CausalLMOutputWithPast(logits=logits)

    from transformers.modeling_outputs import CausalLMOutputWithPast

    monkeypatch.setattr(type(model.model), "forward", forward)
    for end in model.ends:
        forward.steps = 0
        script[len(says)] = end
        assert model.answers(examples, 2) == ["team", "team"]
        assert forward.steps == len(says) + 1  # and no step more


# ---- the likelihood ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_librarys_own(tiny_lm, kind):
    """transformers' loss of the same sequences, made by hand and padded on the right, with -100 on the prompt."""
    model = loaded(tiny_lm(kind))
    examples = model.prepare(rows(PROMPTS, [0, 1, 2, 1, 0]))
    batch = model.collate(examples)
    batch.pop("labels")
    log_p, tokens = model(**batch).sum(0)
    pad = torch.nn.utils.rnn.pad_sequence
    if kind == "t5":
        ids = [torch.tensor(e["input_ids"]) for e in examples]
        labels = [torch.tensor(e["answer"]) for e in examples]
    else:
        ids = [torch.tensor([*e["input_ids"], *e["answer"]]) for e in examples]
        labels = [torch.tensor([*[-100] * len(e["input_ids"]), *e["answer"]]) for e in examples]
    mask = pad([torch.ones_like(i) for i in ids], batch_first=True)
    reference = model.model(
        input_ids=pad(ids, batch_first=True),
        attention_mask=mask,
        labels=pad(labels, batch_first=True, padding_value=-100),
    )
    assert float((-log_p / tokens).detach()) == pytest.approx(float(reference.loss), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompted", [False, True])
def test_options_have_the_likelihood_of_whole_sequences(tiny_lm, kind, prompted):
    model = loaded(tiny_lm(kind), labels=DBPEDIA)
    if prompted and kind in ("llama", "qwen2"):  # tokens at every attention, which no cache holds
        model.model = as_tuner(DeepPromptConfig(num_virtual_tokens=3)).attach(model.model)
        model.eval()
    examples = model.prepare(rows(PROMPTS))
    expected = naive(model, examples, range(14))
    found = model.outputs(examples, batch_size=2, classes=range(14))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.argsort(1), expected.argsort(1))
    some = model.outputs(examples, batch_size=5, classes=[3, 11])
    assert torch.allclose(some[:, [3, 11]], expected[:, [3, 11]], rtol=1e-5, atol=1e-4)
    assert (some == -torch.inf).sum() == 12 * 5  # what is not asked for is not read
    assert model.holds(some, [3]) and not model.holds(some, [3, 4])


def test_an_encoder_and_a_decoder_of_two_makes(tiny_bert, tmp_path):
    from transformers import AutoTokenizer, EncoderDecoderModel

    folder = tiny_bert()
    both = EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    both.config.decoder_start_token_id, both.config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    both.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = loaded(tmp_path, labels=DBPEDIA)
    assert model.max_length == 64 and model.tokens.end == tokenizer.sep_token_id
    examples = model.prepare(rows(PROMPTS))
    found = model.outputs(examples, batch_size=2, classes=range(14))
    assert torch.allclose(found, naive(model, examples, range(14)), rtol=1e-5, atol=1e-4)


def test_options_of_a_model_that_keeps_no_state(tiny_lm, monkeypatch):
    from perpetune.models.answer_scoring import PromptsRead

    model = loaded(tiny_lm("llama"), labels=DBPEDIA)
    examples = model.prepare(rows(PROMPTS))
    monkeypatch.setattr(PromptsRead, "continues", False)
    found = model.outputs(examples, batch_size=5, classes=range(14))
    assert torch.allclose(found, naive(model, examples, range(14)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_fourteen_options_are_scored_with_a_third_of_the_naive_work(tiny_lm, kind):
    model = loaded(tiny_lm(kind, [*"the a of in was built by near".split(), *DBPEDIA], width=64), labels=DBPEDIA)
    text = "the Company was built near a Village by a Athlete of the Plant in Film " * 4
    prompts = [f"Options: {', '.join(DBPEDIA)}\n{text[i:]}\nAnswer:" for i in range(16)]
    examples = model.prepare(rows(prompts))

    with FlopCounterMode(display=False) as ours:
        found = model.outputs(examples, batch_size=16, classes=range(14))
    with FlopCounterMode(display=False) as naively:
        expected = naive(model, examples, range(14))
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert naively.get_total_flops() > 3 * ours.get_total_flops() > 0


# ---- answers ----


@pytest.mark.parametrize("kind", KINDS)
def test_generated_answers_are_the_most_likely_tokens(tiny_lm, kind):
    """Greedy, one token after the other, each prompt alone and without padding or cache."""
    model = loaded(tiny_lm(kind), reads=("generate",))
    examples = model.prepare(rows(PROMPTS[:3]))
    for example, answer in zip(examples, model.answers(examples, 3), strict=True):
        told: list[int] = []
        while len(told) < 50 and (not told or told[-1] != model.tokens.end):
            ids = torch.tensor([example["input_ids"]])
            if kind == "t5":
                logits = model.model(input_ids=ids, decoder_input_ids=torch.tensor([[model.start, *told]])).logits
            else:
                logits = model.model(input_ids=torch.tensor([[*example["input_ids"], *told]])).logits
            told.append(int(logits[0, -1].argmax()))
        assert answer == model.processor.decode(told, skip_special_tokens=True)


def test_answers_are_as_long_as_was_said(tiny_lm):
    """Longer ones go on from the shorter, and leave less room for a prompt."""
    model = loaded(tiny_lm("llama"), reads=("generate",))
    examples, room = model.prepare(rows(PROMPTS[:3])), model.limit
    answers = model.answers(examples, 3)
    model.open(LABELS, ["generate"], longest=60)
    assert model.limit == room - 10
    longer = model.answers(examples, 3)
    assert longer != answers and all(b.startswith(a) for a, b in zip(answers, longer, strict=True))
    with pytest.raises(ConfigError, match="longest"):
        make_head("language_generated", longest=0)


def test_settings_of_the_models_own_do_not_change_an_answer(tiny_lm):
    model = loaded(tiny_lm("llama"), reads=("generate",))
    examples = model.prepare(rows(PROMPTS))
    expected = model.answers(examples, 5)
    own = model.model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.num_beams = 5.0, True, 2.0, 3
    assert model.answers(examples, 5) == expected and model.model.generation_config is own


def test_a_generated_answer_names_the_class_that_it_equals(tiny_lm, monkeypatch):
    model = loaded(tiny_lm("llama"), labels=["Very bad!", "good", "?"], reads=("options", "generate"))
    monkeypatch.setattr(model, "_answers", lambda examples: [" very  BAD", "good.", "goods", ""])
    found = model.outputs(model.prepare(rows(["a"] * 4)), 4, classes=[0, 1, 2])
    assert found.shape == (4, 4) and found[:, -1].tolist() == [0, 1, -1, -1]


# ---- learning ----


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_language_model_learns_to_answer(tiny_lm, stream, kind, tmp_path):
    """Both readings of the run agree that what was trained on is known, and the folder opens again."""
    training = {**TRAINING, "num_train_epochs": 30, "learning_rate": 1e-2}
    heads = ["language", "language_generated"]
    learner = Learner(tiny_lm(kind), "sequential", tmp_path / "r", heads=heads, training=training)
    seen = load_stream(stream.source["source"], tasks=["films"], pose="instruction", train_limit=8, test_limit=4)
    result = learner.learn(seen)
    event = next(e for e in result.journal if e["event"] == "task")
    assert event["last_loss"] < 0.2 < 1 < event["first_loss"]
    known = seen.tasks[0].train
    expected = seen.label_texts(known["label"])
    for head in heads:
        assert learner.predict(known["prompt"], head=head) == expected
    assert learner.backbone.answers(learner.backbone.prepare(known), 8) == expected
    again = Learner.open(tmp_path / "r")
    for head in heads:
        assert again.predict(known["prompt"], head=head) == expected


def test_an_exported_model_is_a_plain_language_model(tiny_lm, stream, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    for kind, auto in (("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)):
        learner = Learner(tiny_lm(kind), "lora", tmp_path / kind, training={**TRAINING, "learning_rate": 1e-2})
        learner.learn(stream)
        folder = learner.export(tmp_path / f"{kind}-model")
        AutoTokenizer.from_pretrained(folder)
        exported = auto.from_pretrained(folder).eval()
        batch = learner.backbone.collate(learner.backbone.prepare(stream.tasks[0].test))
        answers = {k: batch.pop(k) for k in ("labels", "answers")}["answers"]
        with torch.no_grad():
            expected = learner.backbone.eval()(answers=answers, **batch)
            learner.backbone.model = exported
            assert torch.allclose(learner.backbone(answers=answers, **batch), expected, atol=1e-4)


def test_free_answers_are_generated(tiny_lm, tmp_path):
    for split in ("train", "test"):
        lines = [{"prompt": f"{split} {i}", "response": f"{split} answer {i}"} for i in range(160)]
        (tmp_path / "s/t").mkdir(parents=True, exist_ok=True)
        (tmp_path / "s/t" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    free = load_stream(tmp_path / "s", train_limit=8, test_limit=4)
    assert len(free.labels) == 320
    with pytest.raises(ConfigError, match="320 different answers, .* heads: .language_generated."):
        Learner(tiny_lm("llama"), "lora", tmp_path / "a", heads=["language"], training=TRAINING).learn(free)
    learner = Learner(tiny_lm("llama"), "lora", tmp_path / "b", heads=["language_generated"], training=TRAINING)
    result = learner.learn(free)
    assert result.matrix("language_generated", "class").values[-1, 0] == 0
    assert learner.predict(["test 3"]) == learner.generate(["test 3"], max_new_tokens=50)  # none of the answers
    assert set(result.commits[-1].tensors("predictions.safetensors")["language_generated/class/t"].tolist()) == {-1}


def test_the_command_line_poses_texts(tiny_lm, word_stream, tmp_path):
    from typer.testing import CliRunner

    from perpetune.cli.app import app

    options = ["--train-limit", "4", "--test-limit", "2", "--epochs", "1", "--out", str(tmp_path / "r")]
    asked = [
        "--model",
        str(tiny_lm("llama")),
        "--stream",
        str(word_stream),
        "--tasks",
        "films",
        "--pose",
        "instruction",
    ]
    found = CliRunner().invoke(app, ["run", *asked, *options, "--heads", "language,language_generated"])
    assert found.exit_code == 0, found.output
    assert "head language_generated" in found.output
    assert Learner.open(tmp_path / "r").backbone.modality == "language"


# ---- refused ----


def test_what_is_no_language_model_or_no_prompt_is_refused(tiny_lm, tiny_bert, word_stream, stream, tmp_path):
    with pytest.raises(ModelError, match="no trained language model: give one with a language modelling head"):
        load_language_model(tiny_bert())
    with pytest.raises(ModelError, match="cannot load"):
        load_language_model(tmp_path)
    with pytest.raises(ModelError, match="pose texts as instructions"):
        loaded(tiny_lm("llama")).prepare(rows(["a"], column="text"))
    with pytest.raises(ConfigError, match="head `ridge` reads pooled features"):
        Learner(tiny_lm("llama"), "lora", tmp_path / "a", heads=["language", "ridge"]).learn(stream)
    with pytest.raises(ConfigError, match="head `ncm` reads pooled features"):
        Learner(tiny_lm("llama"), "frozen_ncm", tmp_path / "b").learn(stream)
    with pytest.raises(ConfigError, match="head `language` reads the answers of a language model"):
        Learner(tiny_bert(), "lora", tmp_path / "c", heads=["language"]).learn(load_stream(word_stream))
    with pytest.raises(ConfigError, match="leave pooling out"):
        Learner(tiny_lm("llama"), "lora", tmp_path / "e", pooling="mean").learn(stream)
    with pytest.raises(ModelError):
        load_backbone(tiny_lm("llama"), "image")


def test_what_is_asked_of_a_language_model_is_checked(tiny_lm, stream, tmp_path):
    learner = Learner(tiny_lm("llama"), "lora", tmp_path / "r", training=TRAINING)
    learner.learn(stream)
    for inputs in (["  "], ["a", ""]):
        with pytest.raises(ConfigError, match="is an empty prompt"):
            learner.predict(inputs)
    with pytest.raises(ConfigError, match="input 0 is a list, and no prompt"):
        learner.predict([[{"role": "user", "content": "a"}]])


def test_what_is_asked_in_messages_is_checked(tiny_lm, tmp_path):
    talk = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]
    for split in ("train", "test"):
        (tmp_path / "s/t").mkdir(parents=True, exist_ok=True)
        (tmp_path / "s/t" / f"{split}.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 4))
    folder = shutil.copytree(tiny_lm("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    learner = Learner(folder, "lora", tmp_path / "r", training=TRAINING)
    learner.learn(load_stream(tmp_path / "s"))
    assert learner.predict([talk[:1]]) == ["bad"]
    for inputs in (["good"], talk[:1], [[{"role": "user"}]], [[]], [[1]]):
        with pytest.raises(ConfigError, match="input 0 is a .*, and no messages: ask as in predict"):
            learner.predict(inputs)


def test_an_empty_text_keeps_its_beginning(tiny_lm):
    assert prompt_of(loaded(tiny_lm("llama")), "") == ["<s>"]


def test_a_model_as_it_is_and_no_model_are_controls(tiny_lm, stream, tmp_path):
    zero = Learner(tiny_lm("llama"), "frozen_label_text", tmp_path / "z").learn(stream)
    matrix = zero.matrix("language", "task")
    assert (matrix.values[-1] == matrix.baseline).all()
    words = Learner(None, "tfidf_ridge", tmp_path / "w").learn(stream)
    assert words.matrix("ridge", "task").values[-1].mean() >= 0.5
