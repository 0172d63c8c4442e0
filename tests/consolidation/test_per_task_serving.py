"""One model, an adapter for every task: what is answered, and what is said of the routes."""

from __future__ import annotations

import random

import datasets
import numpy as np
import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation import PerTask
from perpetune.consolidation.base import stored_adapter
from perpetune.learning.prediction import scores
from perpetune.models.loading import load_backbone
from perpetune.operations.diff import difference
from perpetune.recipes.recipe import Recipe
from perpetune.runs.directory import Run
from perpetune.tuners import (
    KEY_VALUE_FFN,
    QUERY_VALUE,
    AdapterConfig,
    BiasConfig,
    DeepPromptConfig,
    GivensConfig,
    PeftTuner,
    PrefixConfig,
)

RECIPES = ["color", "color_adapted", "routed", "routed_product", "routed_layers", {"name": "default", "features": 64}]
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
TUNERS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=QUERY_VALUE),
    "ia3": lambda: peft.IA3Config(target_modules=KEY_VALUE_FFN, feedforward_modules=KEY_VALUE_FFN),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=QUERY_VALUE),
    "adapter": lambda: AdapterConfig(bottleneck=4),
    "prefix": lambda: PrefixConfig(num_virtual_tokens=3),
    "deep_prompt": lambda: DeepPromptConfig(num_virtual_tokens=3),
    "givens": lambda: GivensConfig(target_modules=QUERY_VALUE),
    "bias": BiasConfig,
}


def learn(model, stream, folder, recipe="color", **training):
    learner = pt.Learner(model, recipe, folder, training={**TRAINING, **training}, max_length=32)
    return learner, learner.learn(stream)


def mixed_texts(stream, shortest=1):
    """Test texts of all tasks, of any length, in an order of their own."""
    draw = random.Random(0)
    texts = [text for task in stream for text in task.test["text"][:4]]
    texts = [" ".join(text.split()[: draw.randint(shortest, 24)]) for text in texts]
    return draw.sample(texts, len(texts))


# ---- a mixed batch ----


def scores_of(learner, texts):
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts), "id": texts})
    labels = learner.recipe.consolidation._labels
    return scores(learner.state, learner.heads[0], learner.backbone.prepare(rows), None, range(len(labels)))


def furthest(one, other):
    """Largest difference of two tables of log-probabilities; the same tasks must have been asked."""
    assert torch.equal(one.isfinite(), other.isfinite())
    return float((one - other)[one.isfinite()].abs().max())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_mixed_batch_is_answered_as_each_input_alone(recipe, stream, model, tmp_path):
    learner, _ = learn(model, stream, tmp_path / "run", recipe)
    texts = mixed_texts(stream)
    assert learner.predict(texts)[:9] == [learner.predict([text])[0] for text in texts[:9]]
    alone = torch.cat([scores_of(learner, [text]) for text in texts])
    assert furthest(scores_of(learner, texts), alone) < 1e-5


@pytest.mark.real
def test_a_mixed_batch_is_answered_as_each_input_alone_by_minilm(minilm, streams_dir, tmp_path):
    tasks = ["agnews", "dbpedia", "sst2"]
    stream = pt.load_stream(streams_dir / "cl-benchmark", tasks=tasks, train_limit=24, test_limit=4)
    learner, _ = learn(minilm, stream, tmp_path / "run", max_steps=2, learning_rate=2e-3)
    texts = mixed_texts(stream, shortest=4)
    together, alone = scores_of(learner, texts), torch.cat([scores_of(learner, [text]) for text in texts])
    routes = [set(row.isfinite().nonzero().flatten().tolist()) for row in together]
    assert len({min(route) for route in routes}) == len(tasks)  # every adapter is in the batch
    assert learner.predict(texts)[:9] == [learner.predict([text])[0] for text in texts[:9]]
    assert furthest(together, alone) < 1e-5  # measured 2e-7: padding is masked, but sums over more terms round anew


# ---- every tuner ----


@pytest.mark.parametrize("kind", TUNERS)
def test_inputs_are_read_by_the_adapter_of_their_task_whatever_it_is(kind, stream, model, tmp_path):
    """Against a fresh model into which each stored adapter is loaded by itself."""
    recipe = Recipe(PeftTuner(TUNERS[kind]()), consolidation=PerTask(), name=kind)
    learner, _ = learn(model, stream, tmp_path / "run", recipe)
    consolidation, texts = learner.recipe.consolidation, mixed_texts(stream)
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts), "id": texts})
    examples = learner.backbone.prepare(rows)
    untouched = load_backbone(model, "text", max_length=32)
    expected = {None: untouched.features(examples, 16)}
    for t, commit in enumerate(Run.read(tmp_path / "run").commits[1:]):
        fresh, tuner = load_backbone(model, "text", max_length=32), PeftTuner(TUNERS[kind]())
        fresh.model = tuner.attach(fresh.model)
        tuner.load(fresh.model, stored_adapter(commit))
        expected[t] = fresh.features(examples, 16)
    assert all(not torch.equal(expected[t], expected[None]) for t in range(3))  # they have learned
    for t in (0, None, 2, 1, None, 0):
        with consolidation.view(t):
            torch.testing.assert_close(learner.backbone.features(examples, 16), expected[t], rtol=1e-5, atol=1e-5)
    assert consolidation._slots.in_place

    route = consolidation.router.route(expected[None]).tolist()
    said = []
    for i, t in enumerate(route):
        own = list(stream.tasks[t].classes)
        best = learner.heads[0].scores(expected[t][i : i + 1], t)[0, own].argmax()
        said.append(stream.labels[own[int(best)]])
    assert learner.predict(texts) == said
    assert pt.Learner.open(tmp_path / "run").predict(texts) == said


# ---- what is said of the routes ----


@pytest.fixture(scope="module")
def routed(stream, model, tmp_path_factory):
    return learn(model, stream, tmp_path_factory.mktemp("runs") / "color")


def test_routes_are_counted_after_every_task(routed, stream):
    learner, result = routed
    routing = result.routing()
    assert routing.tasks == ("films", "news", "mood") and routing.asked == 1
    consolidation = learner.recipe.consolidation
    for j, task in enumerate(stream):
        with consolidation.view(None):
            features = learner.backbone.features(learner.backbone.prepare(task.test), 64)
        sent = consolidation.router.route(features)
        assert routing.confusion[j].tolist() == torch.bincount(sent, minlength=3).tolist()
        assert routing.matrix.values[-1, j] == (sent == j).double().mean()
    assert routing.matrix.values[0, 0] == 1  # one task: nowhere else to go
    assert np.isnan(routing.matrix.values[np.triu_indices(3, 1)]).all()
    assert routing.accuracy == pytest.approx(
        np.diag(routing.confusion / routing.confusion.sum(1, keepdims=True)).mean()
    )


def test_there_are_no_weights_to_compare(routed):
    _, result = routed
    with pytest.raises(pt.ConfigError, match="keeps an adapter for every task.*export the model of one task"):
        difference(result.path)


def test_with_a_hard_choice_no_more_is_right_than_what_is_sent_to_its_own_task(routed):
    """Classes of tasks are disjoint here; after every task, and for every task."""
    _, result = routed
    accuracy, routing = result.matrix("linear", "class").values, result.routing().matrix.values
    below = np.tril_indices(3)
    assert (accuracy[below] <= routing[below]).all()
    told = result.matrix("linear", "task").values
    assert (told[below] >= accuracy[below]).all()


def test_routes_stand_in_the_summary_the_records_and_the_report(routed):
    from perpetune.report import render
    from perpetune.report.collect import report_data

    _, result = routed
    routing = result.routing()
    share = f"{100 * routing.accuracy:.1f}"
    (line,) = (line for line in result.summary().splitlines() if "sent to their own task" in line)
    assert f"{share} of 100" in line and "films" in line
    records = result.records()
    assert {record.routing_accuracy for record in records} == {routing.accuracy}
    page = render(report_data([result], records, "run"))
    assert '<section id="routes">' in page and f"<b>{share}</b> of 100 test examples to their own task" in page


def test_several_candidates_are_counted(stream, model, tmp_path):
    _, result = learn(model, stream, tmp_path / "run", "routed")
    asked = [v for k, v in Run.read(tmp_path / "run").commits[-1].tensors("predictions.safetensors").items()
             if k.startswith("asked/")]  # fmt: skip
    assert result.routing().asked == pytest.approx(float(torch.cat(asked).double().mean()))
    assert 1 <= result.routing().asked <= 3


def test_a_run_with_one_model_for_all_tasks_has_no_routes(stream, model, tmp_path):
    _, result = learn(model, stream, tmp_path / "run", "lora", max_steps=1)
    assert result.routing() is None and "own task" not in result.summary()
    assert all(record.routing_accuracy is None for record in result.records())
