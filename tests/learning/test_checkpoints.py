"""Checkpoints inside a task: a run that was killed goes on to the bits of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from perpetune import ConfigError, Learner, RunError, TrainingError, load_stream
from perpetune.core.progress import Progress
from perpetune.learning import trainer as training
from perpetune.learning.packing import packed, unpacked
from perpetune.runs.directory import UNFINISHED, read_journal

BASE = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_steps": 2}
TASKS = ["films", "news"]
# a recipe of each family, and the step at which it is killed: of 6, 3 in an epoch
RECIPES = {
    "olora": 5, "pegp_lora_fresh": 3, "child_tuning_f": 4, "child_tuning_d": 3, "sotu": 5, "routed": 4, "goft": 2,
    "osf": 5, "joint": 7,
}  # fmt: skip
DROPOUT = {"type": "LoraConfig", "r": 4, "target_modules": "all-linear", "lora_dropout": 0.3}


class Killed(BaseException):
    """Not an error that anybody handles."""


class Dies(TrainerCallback):
    """Ends training before a step."""

    def __init__(self, step: int, how) -> None:
        self.step, self.how = step, how

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.how()


def kill() -> None:
    raise Killed


@pytest.fixture
def dying(monkeypatch):
    """`dying(learn, task, step)`: call it, and end the training of a task there."""
    train = training.train_task

    def at(learn, task: str, step: int, how=kill) -> None:
        def to_its_end(*args, **kwargs):
            if kwargs["task"] == task:
                kwargs["callbacks"] = [*kwargs["callbacks"], Dies(step, how)]
            return train(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("perpetune.learning.session.train_task", to_its_end)
            with pytest.raises(Killed):
                learn()

    return at


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def files(run: Path) -> dict[str, bytes]:
    """All that a run holds, without the clock times of its journal."""
    found = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    return {name: held for name, held in found.items() if name not in ("journal.jsonl", ".lock")}


def left(run: Path) -> list[Path]:
    return sorted((run / UNFINISHED).glob("*/*"))


@pytest.fixture(scope="module")
def model(tiny_bert) -> Path:
    return tiny_bert()


@pytest.fixture
def stream(word_stream):
    return load_stream(word_stream, tasks=TASKS)


@pytest.fixture
def interrupted(model, stream, tmp_path, dying) -> Path:
    """A run of `lora` whose second task was killed after step 5, with a checkpoint at 4."""
    dying(lambda: Learner(model, "lora", tmp_path / "run", training=BASE).learn(stream), "news", 5)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(model, word_stream, tmp_path_factory) -> Path:
    """The same run, undisturbed and without checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    Learner(model, "lora", folder, training=BASE).learn(load_stream(word_stream, tasks=TASKS))
    return folder


def check(learn, folder: Path, dying, task: str, step: int) -> None:
    """`learn(run)`, killed at a step of its last task and started again, leaves what it leaves undisturbed."""
    learn(folder / "whole")
    if not (folder / "killed").exists():
        shutil.copytree(folder / "whole", folder / "killed")
        shutil.rmtree(max((folder / "killed" / "commits").iterdir()))
    dying(lambda: learn(folder / "killed"), task, step)
    (kept,) = left(folder / "killed")
    learn(folder / "killed")
    assert files(folder / "whole") == files(folder / "killed")
    resumed = [event.get("resumed_at") for event in read_journal(folder / "killed") if event["event"] == "task"]
    assert f"checkpoint-{resumed[-1]}" == kept.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_task_goes_on_to_the_same_bits(recipe, model, stream, tmp_path, dying):
    task = "joint" if recipe == "joint" else "news"
    check(lambda run: Learner(model, recipe, run, training=BASE).learn(stream), tmp_path, dying, task, RECIPES[recipe])


def test_all_that_is_drawn_is_drawn_again(model, stream, tmp_path, dying):
    """Dropout, noise on embeddings, an order of rows that is drawn in every epoch, accumulated batches, a schedule:
    killed in an epoch, between two, and in one that began with a checkpoint."""
    settings = {**BASE, "num_train_epochs": 3, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 2, "neftune_noise_alpha": 5}
    settings |= {"train_sampling_strategy": "group_by_length", "lr_scheduler_type": "cosine", "save_steps": 1}
    recipe = {"tuner": DROPOUT, "heads": ["linear"], "consolidation": "Merge"}

    def learn(run: Path) -> None:
        Learner(model, recipe, run, training=settings).learn(stream)

    for step in (2, 6):  # of 9, 3 in an epoch
        dying(lambda: learn(tmp_path / "killed"), "news", step)
    check(learn, tmp_path, dying, "news", 8)


@pytest.mark.parametrize("by", ["trl", "perpetune"])
def test_a_language_model_goes_on_too(by, tiny_lm, word_stream, tmp_path, dying):
    stream, model = load_stream(word_stream, tasks=TASKS, pose="instruction"), tiny_lm("llama")
    settings = {**BASE, "save_steps": 2, **({"packing": True, "per_device_train_batch_size": 2} if by == "trl" else {})}

    def learn(run: Path) -> None:
        Learner(model, "olora", run, training=settings, trainer=by).learn(stream)

    check(learn, tmp_path, dying, "news", 3)


def test_a_process_that_is_killed_leaves_a_whole_checkpoint(whole, model, stream, tmp_path, dying):
    def learn() -> None:
        Learner(model, "lora", tmp_path / "run", training=BASE).learn(stream)

    child = os.fork()
    if child == 0:
        try:
            dying(learn, "news", 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in left(tmp_path / "run")] == ["checkpoint-4"]
    learn()
    assert files(whole) == files(tmp_path / "run")


def test_files_are_safe_ones_and_small(interrupted):
    (folder,) = left(interrupted)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    base = sum(p.stat().st_size for p in (interrupted / "commits").rglob("adapter*.safetensors"))
    assert (folder / "tensors.safetensors").stat().st_size < 6 * max(base, 20_000)  # and no model


def test_a_damaged_checkpoint_is_not_used(interrupted, whole, model, stream):
    (folder,) = left(interrupted)
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    told = Told()
    Learner(model, "lora", interrupted, training=BASE, progress=told).learn(stream)
    assert [line for line in told.lines if line.endswith("has changed since it was written: it is not used")]
    assert files(whole) == files(interrupted)


def test_older_ones_go_unless_they_are_kept(model, stream, tmp_path, dying):
    settings = {**BASE, "save_steps": 1, "save_total_limit": 2}
    dying(lambda: Learner(model, "lora", tmp_path / "run", training=settings).learn(stream), "news", 5)
    assert [path.name for path in left(tmp_path / "run")] == ["checkpoint-4", "checkpoint-5"]


def test_how_often_it_is_saved_may_change(interrupted, whole, model, stream):
    settings = {**BASE, "save_steps": None, "save_strategy": "epoch"}
    Learner(model, "lora", interrupted, training=settings).learn(stream)
    assert files(whole) == files(interrupted)


def test_a_checkpoint_of_other_settings_is_not_used(interrupted, model, stream):
    other = replace(stream, tasks=(stream.tasks[0], replace(stream.tasks[1], training={"learning_rate": 1e-4})))
    told = Told()
    Learner(model, "lora", interrupted, training=BASE, progress=told).learn(other)
    assert [line for line in told.lines if "made with other settings, data or processes, and is not used" in line]
    assert not left(interrupted)


def test_nothing_is_lost_by_a_mistake_in_the_first_task(model, stream, tmp_path, dying):
    dying(lambda: Learner(model, "lora", tmp_path / "run", training=BASE).learn(stream), "films", 5)
    with pytest.raises(RunError, match=r"training\.learning_rate was"):
        Learner(model, "lora", tmp_path / "run", training={**BASE, "learning_rate": 0.5}).learn(stream)
    assert left(tmp_path / "run")


def test_what_a_crash_left_of_a_committed_task_goes(interrupted, model, stream, word_stream, tmp_path):
    shutil.copytree(interrupted / UNFINISHED, tmp_path / "copy")
    Learner(model, "lora", interrupted, training=BASE).learn(stream)
    shutil.copytree(tmp_path / "copy", interrupted / UNFINISHED)
    told = Told()
    Learner(model, "lora", interrupted, training=BASE, progress=told).learn(load_stream(word_stream))
    assert not [line for line in told.lines if "not used" in line] and not left(interrupted)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_strategy": "best"}, "save_strategy must be no, steps or epoch, not 'best'"),
        ({"save_steps": 0}, "`save_steps` must be a number above 0, not 0"),
        ({"save_steps": True}, "`save_steps` must be a number above 0"),
        ({"save_total_limit": 0}, "`save_total_limit` must be a number above 0"),
        ({"save_only_model": True}, "holds all that it takes to go on to the same bits"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, expected, model):
    with pytest.raises(ConfigError, match=expected):
        Learner(model, "lora", training=settings)


def test_states_are_packed_to_the_bit():
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3), "qmap": torch.ones(3).byte()}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "params": [0]}],
        "numpy": ("MT19937", np.arange(3, dtype=np.uint32), 4, 0.0),
        "clash": {"a.b": {"c": torch.tensor(1)}, "a": {"b.c": torch.tensor(2)}},
        "scale": float("inf"),
    }
    tensors: dict[str, torch.Tensor] = {}
    held = json.loads(json.dumps(packed(state, "x", tensors)))
    again = unpacked(held, tensors.__getitem__)
    assert again["state"][0]["qmap"].dtype == torch.uint8 and torch.equal(again["clash"]["a"]["b.c"], torch.tensor(2))
    assert again["param_groups"] == state["param_groups"] and again["scale"] == state["scale"]
    assert again["numpy"][1].dtype == np.uint32 and again["numpy"][1].tolist() == [0, 1, 2]
    assert all(torch.equal(again["state"][0][k], v) for k, v in state["state"][0].items())
    with pytest.raises(TrainingError, match="leave save_steps out"):
        packed({"a": object()}, "optimizer", {})
