"""`torchrun … perpetune run` on two processes: what one process learns at the same effective batch, to rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from perpetune import ConfigError, Learner, Result, RunError, load_stream
from perpetune.core import processes
from perpetune.learning.harness import Figure, Harness
from perpetune.learning.state import LearnerState
from perpetune.runs.directory import read_journal
from perpetune.streams import Stream
from tests.conftest import REPOSITORY
from tests.core.together import together
from tests.learning.ranks import counted, sharded_steps

RECIPES = ("lora", "olora", "nlora", "pegp_lora_fresh", "sotu", "routed", "frozen_ridge", "child_tuning_d")
BATCH = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
SAME = 2e-5  # of fp32
# where some gradients are 0 but for rounding (keys' biases), of which Adam makes whole steps
SGD = ("sotu", "pegp_lora_fresh")
TASKS = ["films", "news"]


@pytest.fixture(scope="module")
def model(tiny_bert) -> Path:
    return tiny_bert()


@pytest.fixture(scope="module")
def word_stream(many_words) -> Path:
    return many_words


@pytest.fixture(scope="module")
def alone(model, word_stream, tmp_path_factory) -> Path:
    """Runs of one process, one for each recipe, and `grows`, which has learned the first task."""
    folder, read = tmp_path_factory.mktemp("alone"), {}
    for recipe in RECIPES:
        training = {**BATCH, **({"optim": "sgd"} if recipe in SGD else {})}
        with counted() as found:
            Learner(model, recipe, folder / recipe, training=training).learn(load_stream(word_stream, tasks=TASKS))
        read[recipe] = sum(found)
    (folder / "read.json").write_text(json.dumps(read), encoding="utf-8")
    Learner(model, "olora", folder / "grows", training=BATCH).learn(load_stream(word_stream, tasks=TASKS[:1]))
    return folder


@pytest.fixture(scope="module")
def ran(alone, model, word_stream, tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """The same on two processes, which are started once, and what each said: for each recipe, for the run that was
    begun on one process, for another batch, and for a command that does not train."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(alone / "grows", folder / "grows")

    def run(recipe: str, out: str, batch: int) -> list[str]:
        given = ["--model", str(model), "--stream", str(word_stream), "--tasks", ",".join(TASKS), "--recipe", recipe]
        given += ["--set", "per_device_eval_batch_size=8", *(["--set", "optim=sgd"] if recipe in SGD else [])]
        return ["run", *given, "--out", str(folder / out), "--batch-size", str(batch), "--epochs", "1"]

    commands = [run(recipe, recipe, 4) for recipe in RECIPES]
    commands += [run("olora", "grows", 8), run("olora", "grows", 4), ["report", str(folder / "lora")]]
    saves = [*run("lora", "killed", 4), "--set", "save_steps=2"]
    commands += [["dies", "news", "5", *saves], saves]
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.learning.ranks", str(folder / "found"), str(folder / "commands.json")]
    done = subprocess.run([*start, *worker], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, [json.loads((folder / f"found.{rank}").read_text(encoding="utf-8")) for rank in range(2)]


def difference(one: Path, two: Path) -> float:
    """The largest difference of a tensor of any commit, relative to its largest entry."""
    files = sorted(p.relative_to(one) for p in (one / "commits").rglob("*.safetensors"))
    assert files == sorted(p.relative_to(two) for p in (two / "commits").rglob("*.safetensors")) != []
    worst = 0.0
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for key, value in a.items():
            scale = value.double().abs().max().clamp_min(1e-3) if value.numel() else 1
            change = (value.double() - b[key].double()).abs().max() / scale if value.numel() else 0
            worst = max(worst, float(change))
    return worst


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_learn_what_one_does(recipe, alone, ran):
    folder, told = ran
    number = RECIPES.index(recipe)
    assert [rank[number]["code"] for rank in told] == [0, 0]
    assert difference(alone / recipe, folder / recipe) <= SAME
    one, two = Result(alone / recipe), Result(folder / recipe)
    assert [r.final_accuracy for r in one.records()] == [r.final_accuracy for r in two.records()]
    assert [(g["name"], g["holds"]) for g in one.guarantees] == [(g["name"], g["holds"]) for g in two.guarantees]


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_is_divided(recipe, alone, ran):
    """Each example is read by one of the processes, in the batches of one process."""
    folder, told = ran
    shares = [rank[RECIPES.index(recipe)]["read"] for rank in told]
    assert sum(shares) == json.loads((alone / "read.json").read_text(encoding="utf-8"))[recipe]
    assert min(shares) > 0.25 * sum(shares)


def test_what_is_not_trained_is_predicted_to_the_bit(alone, ran):
    assert difference(alone / "frozen_ridge", ran[0] / "frozen_ridge") == 0


def test_two_processes_go_on_within_a_task(ran):
    folder, told = ran
    assert [rank[-1]["code"] for rank in told] == [0, 0]
    tasks = [event for event in read_journal(folder / "killed") if event["event"] == "task"]
    assert [task.get("resumed_at") for task in tasks] == [None, 4]
    assert difference(folder / "lora", folder / "killed") == 0 and not (folder / "killed" / "unfinished").exists()


def test_the_first_process_alone_speaks_and_writes(ran):
    folder, (first, second) = ran
    assert all(not each["out"] and not each["err"] for each in second)
    assert "final accuracy" in first[0]["out"] and "learned in" in first[0]["err"]
    events = [event["event"] for event in read_journal(folder / "lora")]
    assert events == ["start", "task", "task"]
    steps = [event["steps"] for event in read_journal(folder / "lora") if event["event"] == "task"]
    assert steps == [6, 6]  # of 48 examples, 8 at a time


def test_run_yaml_says_how_many_processes_trained(alone, ran):
    one, two = (yaml.safe_load((path / "lora" / "run.yaml").read_text()) for path in (alone, ran[0]))
    assert "processes" not in one and two["processes"] == 2
    assert two["training"]["per_device_train_batch_size"] == 4


def test_a_run_of_one_process_goes_on_on_two(alone, ran):
    folder, told = ran
    refused, resumed = told[0][len(RECIPES)], told[0][len(RECIPES) + 1]
    assert refused["code"] == 2 and "give per_device_train_batch_size 4" in refused["err"]
    assert resumed["code"] == 0 and len(Result(folder / "grows").tasks) == 2
    assert difference(alone / "olora", folder / "grows") <= SAME


def test_a_run_of_two_processes_opens_on_one(alone, ran, word_stream):
    inputs = load_stream(word_stream).tasks[0].test["text"][:4]
    one, two = Learner.open(alone / "lora"), Learner.open(ran[0] / "lora")
    assert two.setup.training["per_device_train_batch_size"] == 8
    assert one.predict(inputs) == two.predict(inputs)
    assert len(two.learn(load_stream(word_stream, tasks=[*TASKS, "mood"])).tasks) == 3  # and goes on there


def test_commands_for_one_process_are_refused_on_two(ran):
    _, told = ran
    first, second = (rank[len(RECIPES) + 2] for rank in told)
    assert first["code"] == second["code"] == 2
    assert "start this command alone" in first["err"] and len(first["err"].splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "engine"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP, and runs train under DDP: take it out .*FSDP2: pt.attach"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed, and runs train under DDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "tensor or context parallelism, and runs train under DDP"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile the model .*: take it out"),
    ],
)
def test_other_engines_of_accelerate_are_refused(name, value, engine, model, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=engine) as refused:
        Learner(model, "lora")
    assert len(str(refused.value).splitlines()) == 1


def test_no_run_of_one_process_alone_is_shared(model, monkeypatch):
    monkeypatch.setattr("perpetune.learning.opening.processes.together", lambda: 2)
    with pytest.raises(ConfigError, match="give `run`, a directory that all of them reach"):
        Learner(model, "lora")


@pytest.mark.parametrize("setting", ["fsdp", "deepspeed", "parallelism_config", "torch_compile"])
def test_other_engines_of_the_trainer_are_refused(setting, model):
    with pytest.raises(ConfigError, match=f"`{setting}` has no effect here: "):
        Learner(model, "lora", training={setting: True})


def test_accelerate_shards_nothing_on_cpus(ran):
    """Why FSDP is refused rather than passed on: on two gloo processes it would be DDP, without a word."""
    assert [rank[-1]["engine"] for rank in ran[1]] == ["MULTI_CPU", "MULTI_CPU"]


def test_the_steps_of_the_learner_on_shards(ran, model, word_stream):
    """What the loop does for a task, on a model that `fully_shard` has sharded: the same files, to rounding."""
    folder, told = ran
    sharded = load_file(folder / "found.sharded.safetensors")
    alone = sharded_steps(str(model), str(word_stream), shards=False)
    assert sharded.keys() == alone["tensors"].keys() and any("lora_A" in key for key in sharded)
    for key, value in alone["tensors"].items():
        assert (value - sharded[key]).abs().max() <= SAME * value.abs().max().clamp_min(1e-3), key
    assert told[0][-1]["measured"] == told[1][-1]["measured"] == pytest.approx(alone["measured"], rel=1e-3)


def test_what_a_language_model_answers_is_divided_too(tiny_lm, word_stream, monkeypatch):
    """Each of two processes answers every other batch; together they say what one says, to the bit."""
    stream = load_stream(word_stream, tasks=TASKS[:1], pose="instruction")
    setup = Learner(tiny_lm("llama"), "lora", training=BATCH, device="cpu").setup
    backbone = setup.load_backbone("language")
    setup.fit_heads(backbone)
    LearnerState(setup, backbone, stream.labels, stream.inputs)  # opens it for the heads
    examples = backbone.prepare(stream.tasks[0].test)
    whole, said = backbone.outputs(examples, 8), backbone.answers(examples, 8)
    sums, parts = [], []
    monkeypatch.setattr(processes, "together", lambda: 2)
    monkeypatch.setattr(processes, "sum_", lambda rows: sums.append(rows[0].clone()))
    monkeypatch.setattr(processes, "from_all", lambda found: parts.append(found) or [found])
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with processes.divided():
            backbone.outputs(examples, 8)
            backbone.answers(examples, 8)
    assert torch.equal(sums[0] + sums[1], whole.view(torch.int32)) and all(bool(part.any()) for part in sums)
    assert parts[0] and parts[1] and not parts[0].keys() & parts[1].keys()
    assert [text for _, texts in sorted({**parts[0], **parts[1]}.items()) for text in texts] == said


def test_a_batch_that_cannot_be_divided_is_refused(ran, monkeypatch):
    monkeypatch.setattr("perpetune.learning.opening.launched", lambda: 3)
    with pytest.raises(RunError, match="3 processes cannot divide"):
        Learner.described(ran[0] / "lora")


@pytest.mark.processes
def test_processes_with_other_data_are_refused_before_anything_is_written(model, word_stream, tmp_path):
    """As where one reads a folder that is still being filled."""
    stream = load_stream(word_stream, tasks=TASKS)
    first, second = stream.tasks
    less = replace(stream, tasks=(first, replace(second, train=second.train.select(range(len(second.train) - 1)))))

    def learns(what: Stream) -> Any:
        return lambda: str(Learner(model, "lora", tmp_path / "run", training=BATCH, device="cpu").learn(what))

    said = together(tmp_path, learns(stream), learns(less))
    assert said[0] == said[1] and said[0].startswith("ConfigError: process 1 was started with another data than the")
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize("fails", [False, True])
def test_the_first_evaluates_on_the_harness_for_all(fails, tmp_path, monkeypatch):
    def evaluates(self: Harness, *_: Any) -> list[Figure]:
        assert processes.first()
        if fails:
            raise ValueError("no such data")
        return [Figure("arc_easy, acc", 0.5, None, 8)]

    monkeypatch.setattr(Harness, "_figures", evaluates)
    backbone: Any = None
    figures = lambda: Harness(("arc_easy",), None, {}).figures(backbone, 8)  # noqa: E731
    found = together(tmp_path, figures, figures)
    assert found == [["ConfigError: lm_eval: no such data", [["arc_easy, acc", 0.5, None, 8]]][not fails]] * 2


def test_a_loss_that_is_no_mean_over_examples_is_refused(model, tiny_lm, word_stream, tmp_path, monkeypatch):
    monkeypatch.setattr("perpetune.learning.opening.launched", lambda: 2)
    stream = load_stream(word_stream, tasks=TASKS)
    with pytest.raises(
        ConfigError, match="`class_weights` makes a loss that is no mean over examples, and 2 processes"
    ):
        Learner(model, "lora", tmp_path / "run", training={**BATCH, "class_weights": "balanced"}).learn(stream)
    prompts = load_stream(word_stream, tasks=TASKS, pose="instruction")
    with pytest.raises(ConfigError, match="`trainer: perpetune` on a language model"):
        Learner(tiny_lm("llama"), "lora", tmp_path / "run", training=BATCH, trainer="perpetune").learn(prompts)
