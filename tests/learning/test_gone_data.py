"""Data of learned tasks may be deleted: the run goes on, with the same bits, and says what it cannot judge any more."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import replace

import pytest

from perpetune import Learner, Result, RunError, StreamError, load_stream
from perpetune.operations.gate import judge
from perpetune.report.collect import report_data
from perpetune.runs.directory import Run
from tests.calling import call
from tests.learning.test_one_class import Heard

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 12}
TASKS = ["films", "news", "mood"]
HEADS = ("head_added.safetensors", "head_sums.safetensors")
STORED = ("adapter_model.safetensors", *HEADS, "rules.safetensors", "memory.parquet")


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert(width=16, layers=1)


@pytest.fixture
def data(word_stream, tmp_path):
    return shutil.copytree(word_stream, tmp_path / "data")


def learn(model, path, stream, recipe="olora", **options):
    return Learner(model, recipe, path, training=TRAINING, **options).learn(stream)


@pytest.fixture(scope="module")
def learned(model, word_stream, tmp_path_factory):
    """`learned(recipe, count)`: the directory of a run of the first tasks, which is not to be changed."""

    @functools.cache
    def run(recipe, count):
        path = tmp_path_factory.mktemp("learned") / recipe
        learn(model, path, of(word_stream, TASKS[:count]), recipe)
        return path

    return run


def of(data, tasks, learned=()):
    return load_stream(data, tasks=tasks, scenario="class", learned=learned)


def remove(data, what):
    """Of the first task: its training data, its test data, or its folder."""
    if what == "folder":
        shutil.rmtree(data / "films")
    else:
        (data / "films" / f"{what}.jsonl").unlink()


def made_before(path):
    """The run as older versions left it: without what is written down of single splits and tasks."""
    parent = None
    for commit in sorted((path / "commits").iterdir()):
        manifest = json.loads((commit / "commit.json").read_text(encoding="utf-8"))
        for name in ("splits", "task_classes", "not_evaluated", "sha256"):
            manifest.pop(name, None)
        text = json.dumps({**manifest, "parent": parent}, indent=1, sort_keys=True)
        (commit / "commit.json").write_text(text, encoding="utf-8")
        parent = hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("recipe", ["olora", "replay", "color"])
@pytest.mark.parametrize("what", ["train", "folder"])
@pytest.mark.parametrize("old", [False, True])
def test_the_run_goes_on_with_the_same_bits(recipe, what, old, data, model, learned, tmp_path):
    if old and recipe != "olora":
        pytest.skip("the same for all recipes")
    shutil.copytree(learned(recipe, 2), tmp_path / "r")
    if old:
        made_before(tmp_path / "r")
    remove(data, what)
    stream = of(data, TASKS if what == "train" else TASKS[1:], TASKS[:2] if what == "train" else ())
    result = learn(model, tmp_path / "r", stream, recipe)
    assert result.tasks == tuple(TASKS)
    newest, expected = result.commits[-1], Run.read(learned(recipe, 3)).commits[-1]
    for file in STORED:
        assert newest.has(file) == expected.has(file)
        if newest.has(file):
            assert (newest.path / file).read_bytes() == (expected.path / file).read_bytes()
    found, whole = (x.tensors("predictions.safetensors") for x in (newest, expected))
    gone = {key for key in whole if key.endswith("/films")} if what == "folder" else set()
    assert found.keys() == whole.keys() - gone
    assert all((found[key] == whole[key]).all() for key in found)


@pytest.mark.parametrize("what", ["test", "folder"])
def test_what_cannot_be_measured_is_undefined_and_the_gate_says_so(
    what, data, model, learned, tmp_path, monkeypatch, capsys
):
    shutil.copytree(learned("olora", 2), tmp_path / "r")
    remove(data, what)
    heard = Heard()
    result = learn(model, tmp_path / "r", of(data, None, TASKS[:2]), progress=heard)
    assert any("without the test data of `films`, which is gone" in text for text in heard.said)
    matrix = result.matrix("linear", "class").values
    assert [x == x for x in matrix[-1]] == [False, True, True] and matrix[1, 0] == matrix[1, 0]
    (record,) = (r for r in result.records() if r.scenario == "class")
    assert record.final_accuracy is None and record.final_accuracy_macro is None
    assert {c["label"] for c in record.per_class} == {"sport", "business", "happy", "sad"}
    assert "not evaluated any more, since the test data is gone: films" in result.summary()
    verdict = judge(result, max_forgetting=1, min_gain=-1)
    assert verdict.passed and [t.name for t in verdict.tasks] == ["news"]
    assert verdict.unjudged == (f"`films` (last {100 * matrix[1, 0]:.1f}, after `news`)",)
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "r", "--max-forgetting", 1, "--min-gain", -1)
    assert code == 0 and "not judged, since their test data is gone: `films` (last" in " ".join(out.split())
    assert report_data([result], result.records(), "run").flips is not None


def test_from_the_command_line(data, model, tmp_path, monkeypatch, capsys):
    """Case 06 of the issue: the training data of the first week is deleted, and a third week comes."""
    later = shutil.move(data / "mood", tmp_path / "mood")
    arguments = ("run", "--model", model, "--stream", data, "--recipe", "lora", "--out", tmp_path / "r", "--epochs", 1)
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    remove(data, "train")
    shutil.move(later, data / "mood")
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0 and "Traceback" not in err
    assert Result(tmp_path / "r").tasks[-1] == "mood"
    shutil.rmtree(data / "news")
    shutil.rmtree(data / "films")
    assert call(monkeypatch, capsys, *arguments)[0] == 0  # nothing new, nothing lost
    assert call(monkeypatch, capsys, *arguments, "--plan")[0] == 0
    assert call(monkeypatch, capsys, "revert", tmp_path / "r", "news")[0] == 0
    assert Result(tmp_path / "r").tasks == ("films", "mood")


def test_the_scenario_stays_what_it_was(data, model, tmp_path):
    for week in ("w1", "w2", "w3"):
        shutil.copytree(data / "news", data / week)
    domain = load_stream(data, tasks=["w1", "w2"])
    assert domain.scenario == "domain"
    learn(model, tmp_path / "r", domain)
    alone = load_stream(data, tasks=["w3"])
    assert alone.scenario == "class"  # of a single task
    assert learn(model, tmp_path / "r", alone).config["stream"]["scenario"] == "domain"


def test_what_is_left_must_be_what_was_learned(data, model, learned, tmp_path):
    shutil.copytree(learned("olora", 2), tmp_path / "r")
    remove(data, "train")
    lines = (data / "films" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "films" / "test.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
    with pytest.raises(RunError, match="the data of task `films` is not what"):
        learn(model, tmp_path / "r", of(data, TASKS, TASKS[:2]))
    made_before(tmp_path / "r")
    with pytest.raises(RunError, match="the data of task `films` is not what"):
        learn(model, tmp_path / "r", of(data, TASKS, TASKS[:2]))
    remove(data, "folder")
    with pytest.raises(RunError, match="has learned films, news in this order; the stream now starts with mood, news"):
        learn(model, tmp_path / "r", of(data, ["mood", "news"]))


def test_another_stream_is_not_taken_for_one_whose_data_is_gone(data, model, tmp_path):
    learn(model, tmp_path / "r", of(data, TASKS[:2]))
    other = shutil.copytree(data, tmp_path / "other")
    with pytest.raises(RunError, match="has learned films, news in this order; the stream now starts with mood"):
        learn(model, tmp_path / "r", of(other, ["mood"]))
    assert learn(model, tmp_path / "r", of(data, ["mood"])).tasks == tuple(TASKS)


def test_what_needs_the_data_says_so(data, model, tmp_path):
    learn(model, tmp_path / "r", of(data, TASKS[:2]), heads=["ncm_refresh"])
    learn(model, tmp_path / "j", of(data, TASKS[:2]), "joint")
    remove(data, "train")
    grown = of(data, TASKS, TASKS[:2])
    with pytest.raises(RunError, match="`ncm_refresh` gathers the training data of all tasks.*`films` is gone.*`ncm`"):
        learn(model, tmp_path / "r", grown, heads=["ncm_refresh"])
    with pytest.raises(RunError, match="the training data of all tasks is needed to learn them at once again"):
        learn(model, tmp_path / "j", grown, "joint")
    assert [len(Run.read(tmp_path / name).commits) for name in "rj"] == [3, 2]  # nothing was written


def test_a_task_that_is_not_learned_needs_its_data(data, model, tmp_path):
    stream = of(data, TASKS)
    lacking = replace(
        stream, tasks=(*stream.tasks[:2], replace(stream.tasks[2], train=stream.tasks[2].train.select([])))
    )
    with pytest.raises(StreamError, match="task `mood` has no train split, and .* has not learned it"):
        learn(model, tmp_path / "r", lacking)


def test_a_learned_task_under_another_name_is_named(data, model, tmp_path):
    learn(model, tmp_path / "run", of(data, TASKS[:2]))
    (data / "films").rename(data / "pictures")
    heard = Heard()
    again = load_stream(data, tasks=["news", "pictures"], scenario="class", learned=TASKS[:2])
    learn(model, tmp_path / "run", again, progress=heard)
    assert any(
        "`pictures` has the training rows of `films`" in text and "call it `films`" in text for text in heard.said
    )
