"""Taking tasks out of a finished run, and seeing what they changed: to the bit, and without perpetune."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import perpetune as pt
from perpetune.consolidation.delta_merge import stored_delta
from perpetune.deltas.combine import merge
from perpetune.learning.export import choose, ties
from perpetune.operations.diff import difference
from perpetune.runs.directory import Run
from tests.calling import call

TASKS = ["films", "mood", "news", "games"]
LEFT = "mood"  # in the middle: two tasks come after it
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 1e-3}


def digests(state) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in state.items()
        if "pooler" not in name and t.dim()
    }


@pytest.fixture(scope="module")
def source(word_stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "four"
    shutil.copytree(word_stream, folder)
    (folder / "games").mkdir()
    for split in ("train", "test"):
        text = (folder / "news" / f"{split}.jsonl").read_text()
        (folder / "games" / f"{split}.jsonl").write_text(text.replace("sport", "chess").replace("business", "poker"))
    return folder


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


def learn(model, source, tasks, path, tuner, consolidation):
    recipe = pt.Recipe(tuner, [], consolidation, [pt.LinearHead()], training=TRAINING)
    learner = pt.Learner(model, recipe, path)
    learner.learn(pt.load_stream(source, tasks=tasks, scenario="class", test_limit=4))
    return learner


@pytest.fixture(scope="module")
def summed(model, source, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "sum"
    return learn(model, source, TASKS, path, pt.AllWeights(), pt.SparseSum(0.5, scale="1/T"))


LORA = peft.LoraConfig(r=2, target_modules=["query", "value"])


@pytest.fixture(scope="module")
def added(model, source, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "merge"
    return learn(model, source, TASKS[:3], path, LORA, pt.Merge())


def written(folder):
    return load_file(folder / "model.safetensors")


def test_without_a_task_are_the_bits_of_a_run_that_never_learned_it(summed, model, source, tmp_path):
    """What is drawn for a task follows from its name, not from its position."""
    order = [t for t in TASKS if t != LEFT]
    never = learn(model, source, order, tmp_path / "never", pt.AllWeights(), pt.SparseSum(0.5, scale="1/T"))
    before = digests(summed.backbone.model.state_dict())
    found = digests(written(summed.export(tmp_path / "model", without=[LEFT])))
    assert found == digests(never.backbone.model.state_dict())
    assert found == digests(written(summed.export(tmp_path / "only", only=order)))
    assert before == digests(summed.backbone.model.state_dict()) != found  # the learner stays as it is


def test_scales_multiply_the_deltas_and_t_counts_the_chosen(summed, model, tmp_path):
    """theta_0 + sum_t f_t (1/2) m_t * d_t for two chosen tasks; bf16 is rounded from the fp32 sum."""
    commits = {c.manifest["task"]: c for c in Run.read(summed.path).commits[1:]}
    base, _ = summed.fresh()
    deltas = [stored_delta(commits[t]) for t in ("films", "games")]
    expected = dict(merge(base.model.state_dict(), deltas, [0.5, -0.15], fingerprint=base.fingerprint))
    choice = {"only": ["games", "films"], "scales": {"games": -0.3}}
    assert digests(written(summed.export(tmp_path / "f", **choice))) == digests(expected)
    half = written(summed.export(tmp_path / "b", **choice, dtype="bfloat16"))
    assert digests(half) == digests({n: t.bfloat16() for n, t in expected.items()})


def test_the_folder_loads_where_perpetune_cannot_be_imported(summed, elsewhere, tmp_path):
    folders = {dtype: summed.export(tmp_path / dtype, without=[LEFT], dtype=dtype) for dtype in ("float32", "bfloat16")}
    code = (
        "import hashlib, json, sys\nsys.modules['perpetune'] = None\nimport torch\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        f"{inspect.getsource(digests)}\n"
        "try:\n    import perpetune\n    sys.exit('perpetune is there')\nexcept ImportError:\n    pass\n"
        "found = {}\nfor folder in sys.argv[1:]:\n    AutoTokenizer.from_pretrained(folder)\n"
        "    found[folder] = digests(AutoModel.from_pretrained(folder).state_dict())\nprint(json.dumps(found))"
    )
    found = json.loads(elsewhere(code, *folders.values()).splitlines()[-1])
    for folder in folders.values():
        assert found[str(folder)] == digests(written(folder)) and found[str(folder)]


def test_merged_adapters_can_be_chosen_too(added, tmp_path):
    """W_0 + sum_t f_t s B_t A_t; all of them are the model."""
    all_ = written(added.export(tmp_path / "all", only=TASKS[:3]))
    assert digests(all_) == digests(written(added.export(tmp_path / "now")))
    found = written(added.export(tmp_path / "some", without=["mood"], scales={"news": 0.5}))
    base, _ = added.fresh()
    name = "encoder.layer.1.attention.self.value.weight"
    expected = base.model.state_dict()[name].clone()
    for commit, factor in zip(Run.read(added.path).commits[1:], (1, 0, 0.5), strict=True):
        A, B = (
            commit.tensors("adapter_model.safetensors")[f"base_model.model.{name[:-6]}lora_{k}.weight"] for k in "AB"
        )
        expected += factor * (LORA.lora_alpha / LORA.r) * B @ A
    torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_an_adapter_that_no_weight_can_hold(model, source, tmp_path, monkeypatch, capsys):
    from perpetune.tuners import load_adapter
    from perpetune.tuners.adapter import AdapterConfig

    learner = learn(model, source, TASKS[:2], tmp_path / "r", AdapterConfig(bottleneck=2), pt.Continue())
    code, _, err = call(monkeypatch, capsys, "export", tmp_path / "r", "--out", tmp_path / "model")
    folder = tmp_path / "r" / "commits" / "0002-mood"
    assert code == 2 and err.count("\n") == 1 and f"load_adapter(model, '{folder}')" in err
    load_adapter(learner.fresh()[0].model, folder)
    with pytest.raises(pt.ConfigError, match=r"Continue keeps no change of each task.*`sotu`"):
        learner.export(tmp_path / "model", without=["mood"])
    found = difference(tmp_path / "r", "0", "films")
    moved = {c.name for c in found.changes if c.changed}
    assert moved and all("perpetune_adapter" in name for name in moved)
    newest = difference(tmp_path / "r")
    assert (newest.before, newest.after) == ("films", "mood") and newest.total.changed


def test_choices_are_checked():
    learned = ["films", "news"]
    assert choose(learned, scales={"news": 2}) == {"films": 1.0, "news": 2.0}
    assert list(choose(learned, only=["news", "films"])) == learned  # in the order of learning
    for settings, message in (
        ({"without": ["flims"]}, "no task `flims`: did you mean `films`"),
        ({"only": ["films"], "without": ["news"]}, "give one of them"),
        ({"without": learned}, "no task is left"),
        ({"without": ["news"], "scales": {"news": 2}}, "is left out and has a scale"),
        ({"scales": {"news": 0}}, "other than 0"),
        ({"scales": {"news": float("nan")}}, "other than 0"),
    ):
        with pytest.raises(pt.ConfigError, match=message):
            choose(learned, **settings)


@pytest.mark.parametrize(
    ("rules", "consolidation", "head", "shared", "said"),
    [
        ([], pt.SparseSum(), pt.LinearHead(), False, None),
        ([], pt.SparseSum(), pt.PrototypeHead(), False, None),
        ([], pt.SparseSum(sequential=True), pt.LinearHead(), False, "on top of those before it"),
        ([], pt.Merge(), pt.LinearHead(), False, "on top of those before it"),
        ([pt.FixedMask()], pt.SparseSum(), pt.LinearHead(), False, r"rules \(FixedMask\) carry over"),
        ([], pt.SparseSum(), pt.LinearHead("seen"), False, "saw the classes"),
        ([], pt.SparseSum(), pt.PrototypeHead(), True, "share classes"),  # trained through a linear head
    ],
)
def test_what_ties_tasks_together_is_said(rules, consolidation, head, shared, said):
    targets = {"a": np.array([0, 1]), "b": np.array([1, 2] if shared else [2, 3])}
    result = SimpleNamespace(readings=[("linear", "class")], predictions=lambda *_: ([], targets))
    found = ties(pt.Recipe(pt.AllWeights(), rules, consolidation, head), result)
    assert found is None if said is None else re.search(said, found)


def test_the_difference_is_that_of_the_weights(summed, model):
    """||W_b - W_a|| / ||W_a||, entries that differ, and the masks of the newest task with those before it."""
    found = difference(summed.path)
    assert (found.before, found.after) == ("news", "games")
    a, b = (summed.fresh() for _ in range(2))
    commits = Run.read(summed.path).commits[1:]
    a[1].restore(commits[:3]), b[1].restore(commits)
    a, b = (x[0].model.state_dict() for x in (a, b))
    assert {c.name for c in found.changes} == a.keys() == b.keys()
    for c in found.changes:
        norm = torch.linalg.vector_norm(b[c.name].double() - a[c.name].double())
        assert c.norm == pytest.approx(float(norm)) and c.changed == int((a[c.name] != b[c.name]).sum())
    shares = [c.relative for c in found.changes if c.relative is not None]
    assert shares == sorted(shares, reverse=True) and found.changes[0].relative > 0
    assert [(m.task, m.other) for m in found.meetings] == [("games", t) for t in TASKS[:3]]
    assert all(abs(m.share - 0.5) < 0.02 and abs(m.chance - 0.5) < 0.02 for m in found.meetings)
    same = difference(summed.path, "2", LEFT)  # one point under two names
    assert same.total.changed == 0 and same.meetings == ()
    assert difference(summed.path, "untouched", "games").changes != found.changes


def test_the_commands(summed, added, tmp_path, monkeypatch, capsys):
    def perpetune(*arguments):
        return call(monkeypatch, capsys, *arguments)

    options = ["--without", LEFT, "--scale", "games=0.5", "--dtype", "bfloat16"]
    code, out, err = perpetune("export", summed.path, "--out", tmp_path / "m", *options)
    assert code == 0, err
    assert "films, news, 0.5 x games" in out and "from the base alone" in out
    assert written(tmp_path / "m")["embeddings.word_embeddings.weight"].dtype == torch.bfloat16
    code, out, _ = perpetune("export", added.path, "--out", tmp_path / "a", "--only", "films, news")
    assert code == 0 and "on top of those before it" in out and "not forgetting it with proof" in out
    code, out, _ = perpetune("diff", summed.path)
    assert code == 0 and "from `news` to `games`" in out and "--all" in out and "by chance" in out
    assert "encoder.layer.0.attention.self.query.weight" in perpetune("diff", summed.path, "--all")[1]
    found = json.loads(perpetune("diff", added.path, "0", "news", "--json")[1])
    assert found["after"] == "news" and found["masks"] == [] and found["total"]["relative"] > 0
    for arguments, message in (
        (["export", summed.path, "--out", tmp_path / "x", "--without", "moood"], "did you mean `mood`"),
        (["export", summed.path, "--out", tmp_path / "x", "--scale", "mood"], "task=number"),
        (["export", summed.path, "--out", tmp_path / "x", "--dtype", "int8"], "float32 or bfloat16"),
        (["export", tmp_path, "--out", tmp_path / "x"], "is no run"),
        (["diff", summed.path, "9"], "no point `9`"),
        (["diff", tmp_path], "is no run"),
    ):
        code, _, err = perpetune(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1, err
    for command, word in (("export", "on top of earlier ones"), ("diff", "Frobenius")):
        code, out, _ = perpetune(command, "--help")
        assert code == 0 and word in " ".join(out.split())


def test_the_difference_shows_lengths_and_angles_of_rows(summed):
    from perpetune.metrics.energy import relative_energy_change, row_norm_change

    found = difference(summed.path, "untouched", geometry=True)
    old, new = summed.fresh()[0].model.state_dict(), summed.backbone.model.state_dict()
    matrices = [c for c in found.changes if c.energy is not None]
    assert {c.name for c in matrices} == {c.name for c in found.changes if c.changed and old[c.name].ndim == 2}
    for c in matrices:
        assert c.energy == relative_energy_change(new[c.name].double(), old[c.name].double())
        assert c.row_norms == row_norm_change(new[c.name], old[c.name])
    assert found.total.energy == max(abs(c.energy) for c in matrices) > 0
    assert difference(summed.path, "untouched").total.energy is None


def test_an_export_is_whole_or_not_there(model, source, tmp_path, monkeypatch):
    learner = pt.Learner(model, "lora", tmp_path / "r", training=TRAINING)
    learner.learn(pt.load_stream(source, tasks=["films"], scenario="class", test_limit=4))
    with pytest.raises(pt.RunError, match="is a run directory: give another folder"):
        learner.export(tmp_path / "r")
    save = type(learner.backbone).save_processors

    def full(self, folder):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr(type(learner.backbone), "save_processors", full)
    with pytest.raises(pt.RunError, match="the disk is full: could not write .*/e; every finished task is safe"):
        learner.export(tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]
    monkeypatch.setattr(type(learner.backbone), "save_processors", save)
    first = learner.export(tmp_path / "e")
    assert {"config.json", "model.safetensors"} <= {p.name for p in first.iterdir()}
    (first / "notes.txt").write_text("mine")
    assert learner.export(tmp_path / "e") == first and (first / "notes.txt").is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
