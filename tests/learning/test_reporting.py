"""Losses while a task is trained, and what trackers are told after it."""

from __future__ import annotations

import json
import sys
import types

import pytest
from transformers.integrations import integration_utils

import perpetune as pt
from perpetune.core.progress import Progress, RichProgress
from perpetune.learning.loss_log import curve, logging_steps
from perpetune.learning.reporting import figures
from perpetune.report.collect import report_data
from perpetune.report.page import render

pytestmark = pytest.mark.usefixtures("quick_collection")

FAST = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news"], train_limit=12, test_limit=6)


def test_a_curve_has_the_means_between_its_points():
    assert curve([4.0, 2.0, 3.0, 1.0], 4) == ((1, 4.0), (2, 2.0), (3, 3.0), (4, 1.0))
    assert curve([4.0, 2.0, 3.0, 1.0], 2) == ((1, 3.0), (2, 2.0))  # two passes a step
    assert curve([], 0) == ()
    long = curve([float(i) for i in range(600)], 600)
    assert len(long) == 60 and long[0] == (10, 4.5) and long[-1] == (600, 594.5)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (30, 3), (100, 10), (10_000, 50)])
def test_a_short_task_tells_ten_losses_and_a_long_one_every_fifty_steps(steps, every):
    assert logging_steps(steps) == every


class Shown(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_losses_are_shown_written_and_journalled(model, stream, tmp_path):
    shown = Shown()
    result = pt.Learner(model, "lora", tmp_path / "r", training={**FAST, "logging_steps": 2}, progress=shown).learn(
        stream
    )
    lines = [json.loads(line) for line in (tmp_path / "r" / "losses.jsonl").read_text().splitlines()]
    assert [(x["task"], x["step"]) for x in lines] == [(t, s) for t in ("films", "news") for s in (2, 4, 6)]
    assert shown.notes == [f"loss {x['loss']:.4g} at step {x['step']} of 6" for x in lines]
    events = {e["task"]: e for e in result.journal if e["event"] == "task"}
    points = events["news"]["losses"]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    told = [x["loss"] for x in lines if x["task"] == "news"]
    assert told == pytest.approx([(points[i][1] + points[i + 1][1]) / 2 for i in (0, 2, 4)], abs=1e-3)
    page = render(report_data([result], result.records(), "run"))
    assert "Training loss" in page and "loss of films, step 1 to 6" in page


def test_a_display_shows_the_loss_beside_its_bar(capsys):
    progress = RichProgress()
    progress.note("nothing to stand beside")
    with progress, progress.bar("films · train", 3):
        progress.note("loss 0.5 at step 1 of 3")
    said = capsys.readouterr().err
    assert "films · train: loss 0.5 at step 1 of 3" in said and "nothing" not in said


def test_tensorboard_reads_the_figures_of_every_task(model, stream, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = {**FAST, "report_to": "tensorboard"}
    result = pt.Learner(model, "nlora", tmp_path / "r", training=training).learn(stream)
    found: dict[str, dict[int, float]] = {}
    for file in (tmp_path / "r" / "logs" / "tasks").rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    matrix = result.matrix("linear", "class")
    for j, task in enumerate(stream):
        for i in range(j, 2):
            assert found[f"eval/accuracy/linear/class/{task.name}"][i + 1] == pytest.approx(matrix.values[i, j])
    assert found["eval/linear/class/forgetting"][2] == pytest.approx(result.records()[0].forgetting)
    measured = [name for name in found if name.startswith("eval/measured/")]
    assert measured and all(set(found[name]) <= {1, 2} for name in measured)
    losses = list((tmp_path / "r" / "logs" / "news").rglob("events.*"))
    assert EventAccumulator(str(losses[0])).Reload().Scalars("train/loss")


def test_trackio_holds_all_tasks_and_starts_as_one_run(model, stream, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # looked up when it is imported
    sqlite_storage = pytest.importorskip("trackio.sqlite_storage", reason="pip install trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    training = {**FAST, "report_to": "trackio", "project": "weekly", "logging_steps": 3}
    for tasks in (["films"], ["films", "news"]):
        result = pt.Learner(model, "nlora", tmp_path / "r", training=training).learn(stream.select(tasks))
    store = sqlite_storage.SQLiteStorage
    assert store.get_runs("weekly") == [str(tmp_path / "r")]
    logs = store.get_logs("weekly", str(tmp_path / "r"))
    assert [entry["step"] for entry in logs] == list(range(len(logs)))
    assert [entry["train/global_step"] for entry in logs if "train/loss" in entry] == [3, 6, 3, 6]
    first, last = (entry for entry in logs if "eval/linear/class/final_accuracy" in entry)
    assert (first["train/global_step"], last["train/global_step"]) == (1, 2)
    matrix = result.matrix("linear", "class").values
    for i, entry in enumerate((first, last)):
        for j, task in enumerate(("films", "news")[: i + 1]):
            assert entry[f"eval/accuracy/linear/class/{task}"] == pytest.approx(matrix[i, j])
    assert last["eval/linear/class/forgetting"] == pytest.approx(result.records()[0].forgetting)
    assert "eval/linear/class/forgetting" not in first
    promised = {g["name"]: g["value"] for g in result.guarantees if g["task"] == "news"}
    told = {k.rpartition("/")[2]: v for k, v in last.items() if k.startswith("eval/measured/") and "promised" not in k}
    assert promised and told == pytest.approx({name.replace(" ", "_"): value for name, value in promised.items()})


def test_weights_and_biases_offline_holds_all_tasks(model, stream, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        training = {**FAST, "report_to": "wandb", "logging_steps": 3}
        result = pt.Learner(model, "nlora", tmp_path / "r", training=training).learn(stream)
        assert wandb.run.name == str(tmp_path / "r")
        told = dict(wandb.run.summary)
    finally:
        wandb.finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    matrix = result.matrix("linear", "class").values
    for j, task in enumerate(("films", "news")):
        assert told[f"eval/accuracy/linear/class/{task}"] == pytest.approx(matrix[1, j])
        assert f"eval/accuracy/linear/class/{task}".encode() in file.read_bytes()
    assert told["eval/linear/class/forgetting"] == pytest.approx(result.records()[0].forgetting)
    assert "train/loss" in told


class Tracker(types.ModuleType):
    """Stands for wandb or trackio: what transformers' callbacks call of them, and nothing else."""

    def __init__(self, name):
        super().__init__(name)
        self.logged, self.run, self.config = [], None, types.SimpleNamespace(update=lambda *a, **k: None)
        self.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
        self.__version__ = "0.31.0"

    def init(self, **settings):
        self.run = types.SimpleNamespace(_label=lambda **k: None, summary={}, id="1", name="n")

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, *a, **k):
        pass

    def finish(self):
        pass


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_told_the_same(model, stream, name, tmp_path, monkeypatch):
    """With transformers' own callbacks; the packages themselves are stood in for, where they are not installed."""
    module = Tracker(name)
    module.config = type("Config", (dict,), {"update": lambda self, *a, **k: None})()
    for part in ("", ".sdk", ".sdk.lib", ".sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name + part, module if not part else types.ModuleType(name + part))
    sys.modules[f"{name}.sdk.lib.config_util"].ConfigError = ValueError
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [name])
    training = {**FAST, "report_to": name, "logging_steps": 3}
    result = pt.Learner(model, "lora", tmp_path / "r", training=training).learn(stream)
    told = [x for x in module.logged if "eval/linear/class/final_accuracy" in x]
    assert [x["train/global_step"] for x in told] == [1, 2]
    assert told[-1]["eval/accuracy/linear/class/films"] == pytest.approx(result.matrix("linear", "class").values[1, 0])
    assert any("train/loss" in x for x in module.logged)


def test_figures_are_numbers(model, stream, tmp_path):
    result = pt.Learner(model, "nlora", tmp_path / "r", training=FAST).learn(stream.select(["films"]))
    found = figures(result)
    assert found["eval_linear/class/final_accuracy"] == result.records()[0].final_accuracy
    assert "eval_linear/class/forgetting" not in found  # undefined after one task
    assert all(isinstance(v, float) and " " not in k for k, v in found.items())
