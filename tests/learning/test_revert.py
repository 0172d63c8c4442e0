"""A task is taken out: weights and heads as if it had never been, to the bit, and the run goes on."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import perpetune as pt
from perpetune.consolidation.delta_merge import stored_delta
from perpetune.consolidation.per_task import PerTask
from perpetune.deltas.combine import merge
from perpetune.learning.export import stale
from perpetune.operations.diff import difference
from perpetune.operations.gate import judge
from perpetune.runs import directory
from perpetune.runs.commit import active
from perpetune.runs.directory import Run
from perpetune.streams import load_again
from tests.calling import call
from tests.learning.test_export import digests
from tests.learning.test_learner import commits

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
LORA = peft.LoraConfig(r=2, target_modules=["query", "value"])
WEEKS = [f"week-{i:02d}" for i in range(10)]
LIMITS = {"max_forgetting": 0.02, "min_gain": 0.01}


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture(scope="module")
def weeks(tmp_path_factory):
    """Ten tasks of two classes, whose labels sort otherwise than they appear."""
    folder = tmp_path_factory.mktemp("streams") / "weeks"
    for i, name in enumerate(WEEKS):
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 8), ("test", 4)):
            rows = [
                {"text": f"{word} {word} {split} {j}", "label": f"{9 - i}-{word}"}
                for word in (f"x{i}", f"y{9 - i}")
                for j in range(count)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def stream_of(folder, tasks):
    return pt.load_stream(folder, tasks=tasks, scenario="class")


def learner_of(model, path, consolidation=None, tuner=None, rules=(), heads=("linear", "ncm_refresh")):
    recipe = pt.Recipe(tuner or pt.AllWeights(), rules, consolidation or pt.SparseSum(0.5), training=TRAINING)
    return pt.Learner(model, recipe, path, heads=list(heads))


@pytest.fixture(scope="module")
def ten(model, weeks, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "ten"
    learner_of(model, path, heads=("linear", "ncm")).learn(stream_of(weeks, WEEKS))
    return path


@pytest.fixture(scope="module")
def four(model, weeks, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "four"
    learner_of(model, path, pt.SparseSum(0.25, "disjoint")).learn(stream_of(weeks, WEEKS[:4]))
    return path


def copied(path, tmp_path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "run"))


def test_of_ten_tasks_one_is_taken_out_and_the_model_loads_where_perpetune_cannot_be_imported(
    ten, model, elsewhere, tmp_path
):
    path, out = copied(ten, tmp_path), WEEKS[3]
    learner = pt.Learner.described(path)
    learner.revert(load_again(directory.read_config(path)["stream"], [w for w in WEEKS if w != out]), out)
    base, _ = learner.fresh()
    kept = [c for c in Run.read(path).commits[1:11] if c.manifest["task"] != out]
    expected = dict(merge(base.model.state_dict(), list(map(stored_delta, kept)), fingerprint=base.fingerprint))
    assert len(kept) == 9
    folder = pt.Learner.open(path).export(tmp_path / "model")
    code = (
        "import hashlib, json, sys\nsys.modules['perpetune'] = None\nimport torch\nfrom transformers import AutoModel\n"
        f"{inspect.getsource(digests)}\n"
        "try:\n    import perpetune\n    sys.exit('perpetune is there')\nexcept ImportError:\n    pass\n"
        "print(json.dumps(digests(AutoModel.from_pretrained(sys.argv[1]).state_dict())))"
    )
    found = json.loads(elsewhere(code, folder).splitlines()[-1])
    assert found == digests(expected) == digests(load_file(folder / "model.safetensors"))
    assert found != digests(load_file(pt.Learner.open(ten).export(tmp_path / "all") / "model.safetensors"))


def heads_of(path):
    """The states of all heads of a run, as opening it puts them together."""
    state = pt.Learner.open(path).state
    return {f"{name}.{key}": t for name, head in state.named_heads() for key, t in head.state().items()}


@pytest.mark.parametrize("out", [0, 3])
def test_heads_have_the_bits_of_a_run_that_never_learned_the_task(out, four, model, weeks, tmp_path):
    path, left = copied(four, tmp_path), [w for w in WEEKS[:4] if w != WEEKS[out]]
    learner = pt.Learner.described(path)
    result = learner.revert(stream_of(weeks, WEEKS[:4]), WEEKS[out])
    never = learner_of(model, tmp_path / "never", pt.SparseSum(0.25, "disjoint"))
    never.learn(stream_of(weeks, left))
    newest = result.commits[-1]
    facts = {k: newest.manifest[k] for k in ("task", "reverts", "reverted", "learned", "heads")}
    assert facts == {
        "task": f"revert-{WEEKS[out]}",
        "reverts": WEEKS[out],
        "reverted": [WEEKS[out]],
        "learned": left,
        "heads": ["linear", "ncm_refresh"],
    }
    ours, theirs = heads_of(path), heads_of(never.path)
    assert ours.keys() == theirs.keys()
    slots = out != 3  # the tasks after it have kept the slots of their masks, so the weights are others
    same = [k for k in ours if not (slots and k.startswith("ncm"))]
    assert all(torch.equal(ours[k], theirs[k]) for k in same) and len(same) > 10
    if not slots:
        assert digests(learner.backbone.model.state_dict()) == digests(never.backbone.model.state_dict())
    texts = stream_of(weeks, WEEKS[:4]).tasks[0].test["text"]
    assert set(learner.predict(texts)) <= {
        label for label in result.config["stream"]["labels"] if label[0] != f"{9 - out}"
    }
    assert learner.predict(texts) == pt.Learner.open(path).predict(texts)


def test_the_run_goes_on_with_the_folder_or_without_in_one_go_or_in_two(four, model, weeks, tmp_path):
    """All ways end in the same files; the newest delta is that of a run that learned nothing else."""
    out, new = WEEKS[1], WEEKS[4]
    fewer = Path(shutil.copytree(weeks, tmp_path / "fewer"))
    shutil.rmtree(fewer / out)
    ends = []
    for i, (before, after) in enumerate(((weeks, weeks), (weeks, fewer), (fewer, fewer))):
        path = copied(four, tmp_path / str(i))
        learner = pt.Learner.described(path)
        tasks = [w for w in WEEKS[:4] if (before / w).exists()]
        named = replace(stream_of(before, tasks), name="weeks")
        learner.revert(named, out)
        if i:  # another process
            learner = pt.Learner.described(path)
        grown = replace(stream_of(after, [w for w in WEEKS[:5] if (after / w).exists()]), name="weeks")
        said = []
        learner.progress.say = said.append
        result = learner.learn(grown)
        assert any(f"`{out}` was taken out" in line for line in said) == (after is weeks)
        assert result.tasks == (WEEKS[0], *WEEKS[2:5]) and result.config["stream"]["labels"][2] == "8-x1"
        ends.append({k: v for k, v in commits(path).items() if k != "run.yaml"})
        assert learner.learn(grown).tasks == result.tasks  # there is nothing left to learn
    assert ends[0] == ends[1] == ends[2]
    found = Run.read(path).commits
    assert [c.manifest["task"] for c in found][-2:] == [f"revert-{out}", new]
    slots = [stored_delta(c).mask.slot for c in active(found)]
    assert slots == [0, 2, 3, 1]  # the new task has taken the slot that was freed
    alone = learner_of(model, tmp_path / "alone", pt.SparseSum(0.25, "disjoint"))
    alone.learn(stream_of(weeks, [new]))
    heads = [heads_of(path), heads_of(alone.path)]
    assert torch.equal(heads[0]["linear.tasks.3.weight"], heads[1]["linear.tasks.0.weight"])
    with pytest.raises(pt.ConfigError, match="at most B tasks can be disjoint"):
        learner.learn(stream_of(weeks, WEEKS[:6]))


def test_a_revert_that_is_killed_is_there_or_not_there(four, weeks, tmp_path, monkeypatch):
    path, whole, stream = copied(four, tmp_path / "a"), copied(four, tmp_path / "b"), stream_of(weeks, WEEKS[:4])
    pt.Learner.described(whole).revert(stream, WEEKS[2])
    rename = directory.os.rename

    def killed(*_):
        raise KeyboardInterrupt

    for broken in (killed, lambda *names: (rename(*names), killed())):
        before = commits(path)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(directory.os, "rename", broken)
            pt.Learner.described(path).revert(stream, WEEKS[2])
        assert broken is not killed or commits(path) == before
    assert commits(path) == commits(whole)
    pt.Learner.described(path).learn(stream_of(weeks, WEEKS[:5]))
    pt.Learner.described(whole).learn(stream_of(weeks, WEEKS[:5]))
    assert commits(path) == commits(whole)


@pytest.mark.parametrize("rules", [(), (pt.OrthogonalToPast(0.5),)])
def test_merged_adapters_are_taken_out_and_rules_remember(rules, model, weeks, tmp_path):
    """W_0 + the other products; what is learned next keeps clear of all that was ever learned."""
    learner = learner_of(model, tmp_path / "r", pt.Merge(), LORA, rules)
    learner.learn(stream_of(weeks, WEEKS[:3]))
    names = [w for w in WEEKS[:3] if w != WEEKS[1]]
    expected = load_file(learner.export(tmp_path / "m", only=names) / "model.safetensors")
    learner.revert(stream_of(weeks, WEEKS[:3]), WEEKS[1])
    assert digests(load_file(learner.export(tmp_path / "n") / "model.safetensors")) == digests(expected)
    assert stale(learner.recipe, pt.Result(learner.path), WEEKS[1]) is None
    result = learner.learn(stream_of(weeks, WEEKS[:4]))
    assert result.tasks == (*names, WEEKS[3])
    assert set(result.geometry(1e-3)) and len(result.active) == 3
    if rules:
        state = result.commits[-1].tensors("rules.safetensors")
        assert {t.shape[0] for k, t in state.items() if k.endswith("rows")} == {4 * LORA.r}


def test_an_adapter_of_its_own_is_taken_out_with_what_the_router_knows(model, weeks, tmp_path):
    results = []
    for name, tasks in (("all", WEEKS[:3]), ("never", [WEEKS[0], WEEKS[2]])):
        learner = learner_of(model, tmp_path / name, PerTask(), LORA, heads=["linear"])
        results.append(learner.learn(stream_of(weeks, tasks)))
        if name == "all":
            results[0] = learner.revert(stream_of(weeks, WEEKS[:3]), WEEKS[1])
    heads = [heads_of(r.path) for r in results]
    assert all(torch.equal(heads[0][k], heads[1][k]) for k in heads[1]) and heads[0].keys() == heads[1].keys()
    for scenario in ("class", "task"):
        a, b = (r.matrix("linear", scenario).values[-1].tolist() for r in results)
        assert a == b
    assert pt.Learner.open(tmp_path / "all").predict(["x0", "x2"]) == pt.Learner.open(tmp_path / "never").predict(
        ["x0", "x2"]
    )


def test_heads_over_features_that_never_move_are_exact(model, weeks, tmp_path):
    """Nothing is on the weights, so the heads are all there is to take out."""
    for recipe in ("frozen_ridge", "frozen_ncm", "frozen_label_text"):
        learner = pt.Learner(model, recipe, tmp_path / recipe)
        learner.learn(stream_of(weeks, WEEKS[:3]))
        result = learner.revert(stream_of(weeks, WEEKS[1:3]), WEEKS[0])  # its data is gone already
        never = pt.Learner(model, recipe, tmp_path / f"never-{recipe}").learn(stream_of(weeks, WEEKS[1:3]))
        a, b = (heads_of(r.path) for r in (result, never))
        close = torch.allclose if recipe == "frozen_label_text" else torch.equal  # embedded in other batches
        assert a.keys() == b.keys() and all(close(a[k], b[k]) for k in b)


def test_the_last_task_may_go_too(model, weeks, tmp_path, monkeypatch, capsys):
    learner = learner_of(model, tmp_path / "r", heads=("ncm", "label_text"))
    learner.learn(stream_of(weeks, WEEKS[:1]))
    base = digests(learner.fresh()[0].model.state_dict())
    assert call(monkeypatch, capsys, "revert", tmp_path / "r", WEEKS[0])[0] == 0
    again = pt.Learner.open(tmp_path / "r")
    assert digests(again.backbone.model.state_dict()) == base
    result = pt.Result(tmp_path / "r")
    assert result.tasks == () and result.records() == [] and "taken out: week-00" in result.summary()
    with pytest.raises(pt.ConfigError, match="no task is learned yet"):
        again.predict(["x"])
    with pytest.raises(pt.RunError, match="no task yet"):
        judge(result, **LIMITS)
    assert call(monkeypatch, capsys, "log", tmp_path / "r")[0] == 0
    assert again.learn(stream_of(weeks, WEEKS[:2])).tasks == (WEEKS[1],)


def test_the_matrix_has_the_tasks_that_remain(four, weeks, tmp_path):
    """Rows are the states as they were stored; the last one is the newest."""
    path = copied(four, tmp_path)
    before = pt.Result(path).matrix("linear", "task")
    result = pt.Learner.described(path).revert(stream_of(weeks, WEEKS[:4]), WEEKS[1])
    kept = [0, 2, 3]
    for scenario in ("class", "task"):
        matrix = result.matrix("linear", scenario)
        assert matrix.tasks == tuple(WEEKS[i] for i in kept) and matrix.values.shape == (3, 3)
        stored = result.found(result.commits[-1], f"linear/{scenario}/")
        truth = result.found(result.commits[-1], "target/")
        assert matrix.values[-1].tolist() == [(stored[t] == truth[t]).mean() for t in matrix.tasks]
    earlier = result.matrix("linear", "task").values[:2]
    expected = before.values[[0, 2]][:, kept]
    assert (earlier[~(earlier != earlier)] == expected[~(expected != expected)]).all()
    assert [t["task"] for t in result.per_task] == [WEEKS[i] for i in kept]
    assert {g["task"] for g in result.guarantees} == {*(WEEKS[i] for i in kept), "revert-week-01"}
    assert result.records()[0].trainable_parameters > 0


def test_what_can_be_compared_and_judged(four, weeks, tmp_path, monkeypatch, capsys):
    path = copied(four, tmp_path)
    pt.Learner.described(path).revert(stream_of(weeks, WEEKS[:4]), WEEKS[1])
    found = difference(path)
    assert (found.before, found.after, found.meetings) == (WEEKS[3], "revert-week-01", ()) and found.total.changed
    assert difference(path, "2", "revert-week-01").total.changed
    pt.Learner.described(path).learn(stream_of(weeks, WEEKS[:5]))
    masks = difference(path, "3", "6").meetings
    assert {(m.task, m.other) for m in masks} == {
        (WEEKS[i], WEEKS[j]) for i, j in ((3, 0), (3, 2), (4, 0), (4, 2), (4, 3))
    }
    verdict = judge(pt.Result(path), **LIMITS)
    assert verdict.task == WEEKS[4] and {t.name for t in verdict.tasks} == {WEEKS[0], WEEKS[2], WEEKS[3]}
    assert call(monkeypatch, capsys, "revert", path, WEEKS[4])[0] == 0
    verdict = judge(pt.Result(path), max_forgetting=1, min_gain=1, max_flips=None)
    assert verdict.passed and verdict.gain is None and verdict.task == WEEKS[4]
    assert json.loads(call(monkeypatch, capsys, "gate", path, "--json", "--max-forgetting", "1")[1])["accuracy"] is None
    assert "task taken out: `week-04`" in call(monkeypatch, capsys, "gate", path, "--max-forgetting", "1")[1]
    assert not judge(pt.Result(path), max_forgetting=-1, min_gain=0).passed


def test_the_command(ten, four, model, weeks, tmp_path, monkeypatch, capsys):
    def perpetune(*arguments):
        return call(monkeypatch, capsys, *arguments)

    path = copied(four, tmp_path / "a")
    code, out, err = perpetune("revert", path, WEEKS[1])
    assert code == 0, err
    assert "0005-revert-week-01" in out and "the base and week-00, week-02, week-03; nothing in it was made" in out
    code, out, _ = perpetune("log", path)
    assert code == 0 and "taken out" in out and "revert-week-01" in out
    code, out, _ = perpetune("report", path)
    assert code == 0 and "taken out: week-01" in out
    page = (path / "report" / "index.html").read_text()
    assert "Reverted tasks: <code>week-01</code>" in page
    moved = Path(shutil.copytree(weeks, tmp_path / "moved"))
    shutil.rmtree(moved / WEEKS[2])
    old = copied(ten, tmp_path / "b")
    code, out, err = perpetune("revert", old, WEEKS[2], "--stream", moved, "--model", model)
    assert code == 0 and "not forgetting with proof: ncm gathered later tasks with features that it had" in out, err
    gone = copied(four, tmp_path / "c")
    config = gone / "run.yaml"
    unsealed = config.read_text().partition("\n")[2]  # the first line is the hash of the others
    config.write_text(unsealed.replace(f"source: {weeks}\n", f"source: {tmp_path / 'nowhere'}\n"))
    for arguments, message in (
        ((path, WEEKS[1]), "taken out of this run already: to learn it again, give it another name"),
        ((path, "week-2"), "has learned no task `week-2`: did you mean `week-02`"),
        ((gone, WEEKS[1]), "no folder"),
        ((tmp_path / "x", WEEKS[1]), "is no run"),
        ((path, WEEKS[0], "--stream", moved), "that of `week-02` is gone: restore it"),
    ):
        code, _, err = perpetune("revert", *arguments)
        assert code == 2 and message in err.splitlines()[-1], err
    code, out, _ = perpetune("revert", "--help")
    assert code == 0 and "forgetting with proof" in " ".join(out.split())


def test_what_cannot_be_taken_out(model, weeks, tmp_path):
    stream = stream_of(weeks, WEEKS[:2])
    for recipe, message in (
        ("sequential", "Continue with AllWeights keeps no change of each task.*`sotu`"),
        ("olora_released", "Stack with LoraConfig keeps no change of each task"),
        ("joint", "learned its tasks all at once"),
    ):
        learner = pt.Learner(model, recipe, tmp_path / recipe, training=TRAINING)
        learner.learn(stream)
        before = commits(tmp_path / recipe)
        with pytest.raises(pt.ConfigError, match=message):
            learner.revert(stream, WEEKS[0])
        assert commits(tmp_path / recipe) == before
        assert learner.predict(["x0"]) == pt.Learner.open(tmp_path / recipe).predict(["x0"])
    with pytest.raises(pt.RunError, match="is no run"):
        learner_of(model, tmp_path / "none").revert(stream, WEEKS[0])
    with pytest.raises(pt.ConfigError, match="with branch `kept` does not fit DeltaMerge"):
        learner_of(model, tmp_path / "none", rules=[pt.SubspaceProjection()])


def test_another_stream_is_refused(four, weeks, tmp_path):
    path = copied(four, tmp_path)
    with pytest.raises(pt.RunError, match="has learned week-00, week-02, week-03 in this order; the stream now starts"):
        pt.Learner.described(path).revert(stream_of(weeks, WEEKS[:3]), WEEKS[1])
    few = pt.load_stream(weeks, tasks=WEEKS[:4], scenario="class", train_limit=4)
    with pytest.raises(pt.RunError, match="the data of task `week-00` is not what"):
        pt.Learner.described(path).revert(few, WEEKS[1])
