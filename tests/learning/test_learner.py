"""The loop over tasks: every recipe, resumed to the bit, refused where it must be."""

from __future__ import annotations

import functools
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from perpetune import ConfigError, Learner, RunError, StreamError, TrainingError, drift, load_stream
from perpetune.learning.session import task_seed
from perpetune.operations.gate import judge
from perpetune.recipes import RECIPES
from perpetune.runs.directory import Run

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 16}
RESUMED = (
    "routed",
    "sotu",
    "pegp_lora_fresh",
    "osf",
    "olora_nlora",
    "olora_released",
    "sequential",
    "replay",
    "sequential_lora",
    "tfidf_ridge",
    "frozen_ncm",
)
SHARED = {*RESUMED, "lora", "olora", "joint"} - {"sotu"}  # whose own head is another one
FEWER = {
    "tfidf_ridge": {"words": 64},
    **dict.fromkeys(("frozen_best", "frozen_ridge", "ranpac", "default", "anacp"), {"features": 64}),
}


def small(recipe: str) -> dict | str:
    return {"name": recipe, **FEWER[recipe]} if recipe in FEWER else recipe


def heads_of(recipe: str) -> list | None:
    """More heads than its own, for recipes that are stopped and resumed."""
    if recipe not in RESUMED or recipe in ("tfidf_ridge", "frozen_ncm"):
        return None
    return ["linear_seen" if recipe == "replay" else "linear", {"type": "ridge", "features": 64}, "ncm"]


@pytest.fixture(scope="module")
def word_stream(many_words):
    return many_words


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news", "mood"])


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture(scope="module")
def learned(stream, model, tmp_path_factory):
    """`learned(recipe)`: the learner of the three tasks, trained once; its directory is copied by what changes it."""

    @functools.cache
    def learner_of(recipe: str) -> Learner:
        path = tmp_path_factory.mktemp("learned") / recipe
        learner = Learner(model, small(recipe), path, heads=heads_of(recipe), training=TRAINING)
        learner.learn(stream)
        return learner

    return learner_of


def commits(path: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(path)): p.read_bytes() for p in sorted((path / "commits").rglob("*")) if p.is_file()}
    return {**found, "run.yaml": (path / "run.yaml").read_bytes()}


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in ("pixels_ridge", "frozen_label_text")])
def test_every_recipe_learns_predicts_and_opens_again(recipe, stream, model, learned, tmp_path):
    stream = stream if recipe in SHARED else stream.select(["films", "news"])
    learner = learned(recipe) if recipe in SHARED else Learner(model, small(recipe), tmp_path / "r", training=TRAINING)
    result = learner.learn(stream)
    records = result.records()
    assert {r.scenario for r in records} == {"class", "task"}
    for record in records:
        assert 0 <= record.final_accuracy <= 1
    assert all(g["holds"] is not False for g in result.guarantees), result.guarantees
    inputs = stream.tasks[0].test["text"][:8]
    given = {"task": stream.tasks[0].name} if recipe == "color_oracle" else {}
    again = Learner.open(learner.path)
    assert again.predict(inputs, **given) == learner.predict(inputs, **given)
    assert result.config["recipe"]["name"] == recipe


def test_a_learned_task_is_better_than_chance(stream, model, tmp_path):
    training = {"num_train_epochs": 10, "per_device_train_batch_size": 8}
    result = Learner(model, "lora", tmp_path / "r", training=training).learn(stream)
    assert result.matrix("linear", "task").values.diagonal().min() > 0.7


@pytest.mark.parametrize("recipe", RESUMED)
def test_the_state_is_the_base_plus_the_commits(recipe, stream, model, learned, tmp_path, monkeypatch):
    """Stopped after each task and started again: the same files, to the bit."""
    whole, parts, heads = learned(recipe).path, tmp_path / "parts", heads_of(recipe)
    original = Run.commit
    for _ in range(len(stream) + (recipe == RESUMED[0])):  # the first also when there is nothing left to do

        def stop_after(self, *args, **kwargs):
            original(self, *args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "commit", stop_after)
            with pytest.raises(KeyboardInterrupt):
                torch.manual_seed(random.randrange(10**6))  # what was drawn before must not matter
                Learner(model, small(recipe), parts, heads=heads, training=TRAINING).learn(stream)
    Learner(model, small(recipe), parts, heads=heads, training=TRAINING).learn(stream)
    assert commits(whole) == commits(parts)


def _learn(model, stream, path):
    torch.set_num_threads(1)
    heads = ["linear", {"type": "ridge", "features": 64}]
    Learner(model, "olora", path, heads=heads, training=TRAINING).learn(stream)


def test_killed_at_ten_random_moments(stream, model, tmp_path):
    """SIGKILL, ten times, at random moments; started again each time. All files but the journal, which holds clock
    times, are those of an undisturbed run."""
    context = multiprocessing.get_context("fork")
    started = time.perf_counter()
    _learn(model, stream, tmp_path / "whole")
    duration = time.perf_counter() - started
    generator, killed = random.Random(0), 0
    while killed < 10:
        child = context.Process(target=_learn, args=(model, stream, tmp_path / "killed"))
        child.start()
        child.join(generator.uniform(0.02, 0.5) * duration)
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            killed += 1
        elif child.exitcode == 0:  # finished before the tenth kill: undo the last task, and go on
            last = sorted((tmp_path / "killed" / "commits").iterdir())[-1]
            for file in last.iterdir():
                file.unlink()
            last.rmdir()
        else:
            pytest.fail(f"the run failed with exit code {child.exitcode}")
    _learn(model, stream, tmp_path / "killed")
    assert commits(tmp_path / "whole") == commits(tmp_path / "killed")


def test_merge_and_stack_compute_the_same_function(stream, model, tmp_path):
    """Lora sheet, check 7: evaluation outputs of the concatenated and the merged form agree to 1e-5 relative."""
    recipe = {"tuner": {"type": "LoraConfig", "r": 4, "target_modules": ["query", "value"]}, "head": {"type": "linear"}}
    learners = {}
    for name in ("Merge", "Stack"):
        learners[name] = Learner(model, {**recipe, "consolidation": name}, tmp_path / name, training=TRAINING)
        learners[name].learn(load_stream(stream.source["source"], tasks=["films"]))
    stacked, merged = learners["Stack"].backbone, learners["Merge"].backbone
    examples = merged.prepare(stream.tasks[1].test)
    a, b = stacked.features(examples, 8), merged.features(examples, 8)
    assert (a - b).norm() / b.norm() < 1e-5


def test_a_stacked_run_opens_with_all_its_branches(stream, model, tmp_path):
    learner = Learner(model, "olora_released", tmp_path / "r", training={**TRAINING, "learning_rate": 1e-2})
    learner.learn(stream)
    examples = learner.backbone.prepare(stream.tasks[0].test)
    again = Learner.open(tmp_path / "r")
    assert torch.equal(again.backbone.features(examples, 8), learner.backbone.features(examples, 8))
    ranks = {p.shape[0] for n, p in again.backbone.model.named_parameters() if "lora_A.past" in n}
    assert ranks == {16}  # two past tasks of rank 8


def test_adapters_load_in_plain_peft(stream, model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel

    learner = Learner(model, "lora", tmp_path / "r", training=TRAINING)
    learner.learn(load_stream(stream.source["source"], tasks=["films"]))
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(model), next((tmp_path / "r/commits").glob("0001*")))
    batch = learner.backbone.collate(learner.backbone.prepare(stream.tasks[0].test)[:4])
    batch.pop("labels")
    plain.eval(), learner.backbone.eval()
    with torch.no_grad():
        expected = learner.backbone.model(**batch).last_hidden_state
        assert torch.allclose(plain(**batch).last_hidden_state, expected, atol=1e-5)


def test_export_is_a_plain_transformers_model(stream, learned, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    for recipe in ("lora", "sequential_lora", "olora_released"):
        learner = learned(recipe)
        folder = learner.export(tmp_path / f"{recipe}-model")
        AutoTokenizer.from_pretrained(folder)
        exported = AutoModel.from_pretrained(folder).eval()
        batch = learner.backbone.collate(learner.backbone.prepare(stream.tasks[0].test)[:4])
        batch.pop("labels")
        learner.backbone.eval()
        with torch.no_grad():
            expected = learner.backbone.model(**batch).last_hidden_state
            assert torch.allclose(exported(**batch).last_hidden_state, expected, atol=1e-5)


def test_a_stream_may_grow(stream, model, learned, tmp_path):
    source = stream.source["source"]
    Learner(model, "olora", tmp_path / "r", training=TRAINING).learn(load_stream(source, tasks=["films", "news"]))
    Learner(model, "olora", tmp_path / "r", training=TRAINING).learn(stream)
    grown, whole = commits(tmp_path / "r"), commits(learned("olora").path)
    name = "commits/0003-mood/adapter_model.safetensors"
    assert grown[name] == whole[name]


def test_learned_tasks_must_stay_what_they_were(stream, model, tmp_path):
    source = stream.source["source"]
    Learner(model, "frozen_ncm", tmp_path / "r").learn(load_stream(source, tasks=["films", "news"]))
    with pytest.raises(RunError, match="has learned films, news in this order"):
        Learner(model, "frozen_ncm", tmp_path / "r").learn(load_stream(source, tasks=["news", "films"]))
    with pytest.raises(RunError, match="data of task `films`"):
        limited = load_stream(source, tasks=["films", "news"], train_limit=4)
        Learner(model, "frozen_ncm", tmp_path / "r").learn(limited)


def test_a_loss_that_is_not_finite_stops_before_the_commit(stream, model, tmp_path):
    learner = Learner(model, "sequential", tmp_path / "r", training={**TRAINING, "learning_rate": 1e30})
    with pytest.raises(TrainingError, match="task `films`: the loss was not finite at step"):
        learner.learn(stream)
    assert [p.name for p in (tmp_path / "r/commits").iterdir()] == ["0000-untouched"]
    again = Learner(model, "sequential", tmp_path / "r", training={**TRAINING, "learning_rate": 1e-3})
    again.learn(stream)  # no task was learned with the old setting, so another one may take its place
    Learner(model, "sequential", tmp_path / "new", training={**TRAINING, "learning_rate": 1e-3}).learn(stream)
    for one, other in zip(again.learn(stream).commits, Run.read(tmp_path / "new").commits, strict=True):
        assert one.manifest["files"] == other.manifest["files"]
    with pytest.raises(RunError, match="training.learning_rate was 0.001"):
        Learner(model, "sequential", tmp_path / "r", training={**TRAINING, "learning_rate": 1e-4}).learn(stream)


def test_weights_that_are_not_finite_are_not_committed(stream, model, tmp_path):
    """After a single step no loss was computed with what it left."""
    training = {**TRAINING, "max_steps": 1, "learning_rate": 1e39}
    with pytest.raises(TrainingError, match="task `films`: training left weights that are not finite"):
        Learner(model, "lora", tmp_path / "r", training=training).learn(stream)
    assert [p.name for p in (tmp_path / "r/commits").iterdir()] == ["0000-untouched"]


def test_a_stream_may_be_called_another_name(stream, model, learned, tmp_path):
    shutil.copytree(learned("frozen_ncm").path, tmp_path / "r")
    source = shutil.copytree(stream.source["source"], tmp_path / "moved")
    moved = load_stream(source, **{k: v for k, v in stream.source.items() if k == "tasks"})
    assert moved.name != stream.name
    again = Learner(model, "frozen_ncm", tmp_path / "r", training=TRAINING).learn(moved)
    assert len(again.commits) == len(stream) + 1


WRONG_INPUTS = [
    ("where is my parcel?", "list of one"),
    ({"text": "a"}, "list of one"),
    ([None], "input 0 is a NoneType, and no text"),
    (["good", 3], "input 1 is a int, and no text"),
    ([("a", "b")], "each input holds text"),
    ([[{"role": "user", "content": "a"}]], "input 0 is a list, and no text"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG_INPUTS)
def test_what_is_asked_is_checked(inputs, message, learned):
    learner = learned("frozen_ncm")
    with pytest.raises(ConfigError, match=message):
        learner.predict(inputs)
    with pytest.raises(ConfigError, match="classes=.. leaves nothing to choose"):
        learner.predict(["good"], classes=[])
    assert learner.predict([]) == []


def test_another_base_model_is_refused(stream, learned, tiny_bert):
    with pytest.raises(RunError, match="another base model"):
        Learner(tiny_bert(seed=1), "frozen_ncm", learned("frozen_ncm").path, training=TRAINING).learn(stream)


def test_a_truncated_adapter_is_named(learned, tmp_path):
    shutil.copytree(learned("lora").path, tmp_path / "r")
    path = tmp_path / "r/commits/0002-news/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"0002-news/adapter_model\.safetensors is damaged"):
        Learner.open(tmp_path / "r")


def test_frozen_features_are_computed_once(stream, model, tmp_path):
    learner = Learner(model, "frozen_ridge", tmp_path / "r")
    result = learner.learn(stream)
    assert all(v == 0 for v, _ in learner.state.evaluator._features.values())
    assert [g["value"] for g in result.guarantees if g["source"] == "Frozen"] == [0.0] * 3
    with torch.no_grad():
        next(learner.backbone.model.parameters()).add_(1e-3)
    assert not learner.recipe.consolidation.guarantee()[0].holds


def test_joint_has_only_the_last_row(stream, learned):
    record = learned("joint").learn(stream).records()[0]
    assert record.forgetting is None and record.plasticity is None and record.final_accuracy is not None
    assert record.matrix[0] == [None] * 3


def test_zero_shot_baseline_of_a_head_that_knows_all_names(stream, model, tmp_path):
    result = Learner(model, "frozen_label_text", tmp_path / "r").learn(stream)
    matrix = result.matrix("label_text", "task")
    assert (matrix.baseline == matrix.values[-1]).all()
    # nothing is learned, so nothing is transferred, in whichever reading
    assert {r.forward_transfer for r in result.records()} == {0.0}


def test_errors_teach(stream, model, tmp_path):
    with pytest.raises(ConfigError, match="no recipe is called `olra`: did you mean `olora`"):
        Learner(model, "olra")
    with pytest.raises(ConfigError, match="no head is called"):
        Learner(model, "lora", heads=["rigde"])
    with pytest.raises(ConfigError, match="TrainingArguments has no `learnig_rate`: did you mean `learning_rate`"):
        Learner(model, "lora", training={"learnig_rate": 1})
    with pytest.raises(ConfigError, match="needs a model"):
        Learner(None, "lora").learn(stream)
    with pytest.raises(ConfigError, match="nothing is learned yet"):
        Learner(model, "lora").predict(["x"])


def test_seeds_of_tasks_differ():
    assert len({task_seed(s, f"week-{i}") for s in range(20) for i in range(50)}) == 1000


def test_images_in_a_domain_stream(tiny_vit, tmp_path):
    stream = load_stream("digits-drift", train_limit=40, test_limit=20)
    learner = Learner(tiny_vit(), "olora", tmp_path / "r", heads=["linear", "ncm"], training=TRAINING)
    result = learner.learn(stream)
    assert [r.scenario for r in result.records()] == ["domain", "domain"]
    assert result.matrix("linear", "domain").values[0, 1] >= 0  # the next task is read before it is learned
    assert learner.predict(stream.tasks[0].test["image"][:3])


def test_geometry_of_the_updates_is_that_of_the_dense_matrices(stream, model, learned, tmp_path):
    from perpetune.metrics.geometry import average_collision_rate

    recipe = {
        "tuner": {"type": "LoraConfig", "r": 2, "lora_alpha": 8, "target_modules": ["layer.0.attention.self.query"]}
    }
    recipe |= {"consolidation": "Merge"}
    result = Learner(model, recipe, tmp_path / "r", training=TRAINING).learn(stream)
    found = result.geometry(1e-3)
    dense = []
    for commit in result.commits[1:]:
        A, B = (t for _, t in sorted(commit.tensors("adapter_model.safetensors").items()))
        dense.append(4 * B @ A)
    assert found["average_collision_rate"] == pytest.approx(average_collision_rate(dense, 1e-3), abs=1e-3)
    norms = [torch.linalg.matrix_norm(d.double(), "nuc") for d in dense]
    assert found["nuclear_norm"] == pytest.approx(float(sum(norms) / len(norms)), rel=1e-5)
    with pytest.raises(ConfigError, match="no LoRA update of every task"):
        learned("frozen_ncm").learn(stream).geometry(1e-3)


def test_gradient_accumulation_changes_nothing_but_rounding(stream, model, tmp_path):
    """Lora sheet, check 6: batch 8 at once, or 4 times 2, penalties included."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        settings = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 0,
        }
        learner = Learner(
            model, {"name": "nlora", "strength": 1e-3}, tmp_path / str(size), training=TRAINING | settings
        )
        result = learner.learn(load_stream(stream.source["source"], tasks=["films"]))
        found.append((result.per_task[0]["steps"], result.commits[1].tensors("adapter_model.safetensors")))
    (steps, a), (other_steps, b) = found
    assert steps == other_steps
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-5), name


def test_a_learner_can_learn_again(stream, model, learned, tmp_path):
    """The same object on a stream that has grown: as if a new process had resumed."""
    learner = Learner(model, "olora", tmp_path / "r", training=TRAINING)
    learner.learn(load_stream(stream.source["source"], tasks=["films", "news"]))
    learner.learn(stream)
    name = "commits/0003-mood/adapter_model.safetensors"
    assert commits(tmp_path / "r")[name] == commits(learned("olora").path)[name]


def test_what_cannot_be_done_is_refused_before_anything_is_trained(stream, model, tmp_path):
    import peft

    from perpetune import Merge, ModelError, Recipe

    with pytest.raises(ConfigError, match="`linear` is trained only where it stands first"):
        Learner(model, "lora", heads=["ridge", "linear"])
    with pytest.raises(ConfigError, match="makes neither: use Continue"):
        ia3 = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
        Learner(model, Recipe(ia3, consolidation=Merge()), tmp_path / "a").learn(stream)
    with pytest.raises(ConfigError, match="heads that gather statistics"):
        Learner(None, "tfidf_ridge", heads=["linear"])
    with pytest.raises(ConfigError, match="must be a whole number above 0"):
        Learner(model, "lora", training={"per_device_train_batch_size": 0})
    for never in (-1, 2.5, None):
        with pytest.raises(ConfigError, match="evaluate_every is a number of tasks, or 0"):
            Learner(model, "lora", evaluate_every=never)
    with pytest.raises(ConfigError, match="`label_smoothing_factor` has no effect here"):
        Learner(model, "lora", training={"label_smoothing_factor": 0.1})
    with pytest.raises(ModelError, match="peft cannot put LoraConfig"):
        Learner(model, {"tuner": {"type": "LoraConfig", "r": 0, "target_modules": ["query"]}}, tmp_path / "b").learn(
            stream
        )
    assert Learner(model, "lora", training={"learning_rate": "1e-3"}).training["learning_rate"] == 1e-3


def test_a_refused_stream_changes_nothing(stream, model, tmp_path):
    source = stream.source["source"]
    Learner(model, "frozen_ncm", tmp_path / "r").learn(load_stream(source, tasks=["films", "news"]))
    before = (tmp_path / "r" / "run.yaml").read_bytes()
    with pytest.raises(RunError):
        Learner(model, "frozen_ncm", tmp_path / "r").learn(load_stream(source, tasks=["news", "films"]))
    assert (tmp_path / "r" / "run.yaml").read_bytes() == before


def test_joint_training_cannot_grow(stream, model, tmp_path):
    few = load_stream(stream.source["source"], tasks=["films", "news"])
    Learner(model, "joint", tmp_path / "r", training=TRAINING).learn(few)
    with pytest.raises(RunError, match="all tasks of its stream at once"):
        Learner(model, "joint", tmp_path / "r", training=TRAINING).learn(stream)


def test_kept_pictures_are_in_the_commit(tiny_vit, tmp_path):
    import io

    from PIL import Image

    for task, shade in (("dark", 0), ("light", 128)):
        for split in ("train", "test"):
            for label in ("a", "b"):
                folder = tmp_path / "s" / task / split / f"{task}-{label}"
                folder.mkdir(parents=True)
                for i in range(4):
                    Image.new("L", (8, 8), shade + 8 * i + (64 if label == "a" else 0)).save(folder / f"{i}.png")
    stream = load_stream(tmp_path / "s")
    learner = Learner(tiny_vit(), {"name": "replay", "per_class": 2}, tmp_path / "r", training=TRAINING)
    result = learner.learn(stream)
    rows = result.commits[1].rows("memory.parquet").data.table["image"].to_pylist()
    assert len(rows) == 4 and all(Image.open(io.BytesIO(row["bytes"])).size == (8, 8) for row in rows)


def test_a_result_outlives_a_learner_without_a_directory(stream, model):
    assert "final accuracy" in Learner(model, "frozen_ncm").learn(stream).summary()


@pytest.mark.real
def test_a_real_encoder_on_real_tasks(streams_dir, minilm, tmp_path):
    stream = load_stream(streams_dir / "cl-benchmark", tasks=["agnews", "sst2"], train_limit=32, test_limit=20)
    result = Learner(
        minilm, "olora", tmp_path / "r", heads=["linear", "ridge"], max_length=24, training={"num_train_epochs": 1}
    ).learn(stream)
    assert result.config["model"]["pooling"] == "mean"
    assert result.matrix("ridge", "class").values[-1].mean() > 0.4  # six classes
    zero_shot = Learner(minilm, "frozen_label_text", tmp_path / "z", max_length=24).learn(stream)
    assert zero_shot.matrix("label_text", "task").baseline[0] > 0.4  # four topics, by their names alone


@pytest.mark.parametrize("every, rows", [(1, [1, 2, 3]), (2, [1, 2, 3]), (0, [1, 1, 3])])
def test_how_often_all_tasks_are_evaluated(every, rows, stream, model, learned, tmp_path):
    """In between, the task just learned alone; what is learned, and read at the end, does not depend on it."""
    whole = learned("lora").learn(stream)
    options = {"training": TRAINING, "evaluate_every": every}
    learner = Learner(model, "lora", tmp_path / "r", **options)
    learner.learn(stream.select(["films"]))  # the end of a stream that then grows
    result = Learner(model, "lora", tmp_path / "r", **options).learn(stream)
    a, b = result.matrix("linear", "class").values, whole.matrix("linear", "class").values
    assert [int((~np.isnan(row[: i + 1])).sum()) for i, row in enumerate(a)] == rows
    assert np.array_equal(a[~np.isnan(a)], b[~np.isnan(a)])
    record = next(r for r in result.records() if r.scenario == "class")
    assert record.plasticity is not None and record.backward_transfer is not None
    assert (record.average_incremental_accuracy is None) == (every == 0)
    assert result.summary() and len(result.commits) == 4
    if every == 0:
        with pytest.raises(ConfigError, match="not evaluated"):
            judge(result, max_forgetting=0.5, min_gain=0.0)


def test_seldom_evaluation_gives_the_same_bits_when_stopped(stream, model, tmp_path, monkeypatch):
    options = {"training": TRAINING, "evaluate_every": 2}
    Learner(model, "routed", tmp_path / "whole", **options).learn(stream)
    stopped = Learner(model, "routed", tmp_path / "stopped", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "commit", _stops_before(Run.commit, "mood"))
        with pytest.raises(KeyboardInterrupt):
            stopped.learn(stream)
    Learner(model, "routed", tmp_path / "stopped", **options).learn(stream)
    assert commits(tmp_path / "whole") == commits(tmp_path / "stopped")


def _stops_before(commit, name):
    def interrupted(self, task, files, facts):
        if task == name:
            raise KeyboardInterrupt
        return commit(self, task, files, facts)

    return interrupted


def test_a_task_may_have_training_settings_of_its_own(stream, model, tmp_path):
    source = shutil.copytree(stream.source["source"], tmp_path / "s")
    (source / "news" / "task.json").write_text('{"training": {"num_train_epochs": 3, "learning_rate": "5e-3"}}')
    own = load_stream(source, tasks=["films", "news"], training={"films": {"max_steps": 2}})
    options = {"training": TRAINING}
    result = Learner(model, "lora", tmp_path / "r", **options).learn(own)
    assert [e["steps"] for e in result.journal if e["event"] == "task"] == [2, 9]  # 48 rows in batches of 16
    joint = Learner(model, "joint", tmp_path / "j", **options).learn(own)
    assert [e["steps"] for e in joint.journal if e["event"] == "task"] == [11]

    # as if they were the run's: films alone, then news with other settings in a run of both
    plain = load_stream(source, tasks=["films"], training={"news": {}})
    alone = Learner(model, "lora", tmp_path / "a", training={**TRAINING, "max_steps": 2}).learn(plain)
    name = "adapter_model.safetensors"
    assert result.commits[1].manifest["files"][name] == alone.commits[1].manifest["files"][name]
    Learner(model, "lora", tmp_path / "r", **options).learn(own)  # nothing left to do
    changed = load_stream(source, tasks=["films", "news"], training={"films": {"max_steps": 3}})
    with pytest.raises(RunError, match="task `films` was learned with training settings .*max_steps.* 2"):
        Learner(model, "lora", tmp_path / "r", **options).learn(changed)
    wrong = load_stream(source, tasks=["films", "news"], training={"films": {"epochs": 2}})
    with pytest.raises(ConfigError, match="training of task `films`: .* has no `epochs`"):
        Learner(model, "lora", tmp_path / "new", **options).learn(wrong)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="which examples are of task `films`"):
        drift(own, 2, (8, 16))


def test_training_settings_of_no_task_are_named(word_stream, tmp_path):
    with pytest.raises(StreamError, match="training: no task `film`: did you mean `films`"):
        load_stream(word_stream, training={"film": {"max_steps": 1}})
    source = shutil.copytree(word_stream, tmp_path / "s")
    (source / "news" / "task.json").write_text('{"training": 5}')
    with pytest.raises(StreamError, match="`training` in .* must hold settings"):
        load_stream(source)
