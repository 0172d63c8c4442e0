from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import perpetune as pt
from perpetune.consolidation import PerTask
from perpetune.consolidation.states import Reading
from perpetune.core.errors import ConfigError
from perpetune.core.progress import Progress
from perpetune.recipes import make_recipe
from perpetune.recipes.recipe import Recipe
from perpetune.routers import KMeansRouter, OracleRouter, PooledRouter, RidgeRouter, Router

RECIPES = ["color", "color_adapted", "routed", "routed_product", "routed_layers", {"name": "default", "features": 64}]
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


class Half(Router):
    """Says that tasks 0 and 1 are equally likely, and no other."""

    def log_posterior(self, features):
        return torch.tensor([[0.5, 0.5, 0.0]]).log().expand(len(features), 3)

    calibrated = True


class Says:
    """A head with given probabilities of its two classes, for every task."""

    def __init__(self, p):
        self.p = p

    def scores(self, features, task):
        scores = torch.full((len(features), 6), -torch.inf)
        scores[:, 2 * task : 2 * task + 2] = torch.tensor(self.p[task]).log()
        return scores


class Three(PerTask):
    def task_classes(self, task):
        return (2 * task, 2 * task + 1)


def learner(model, recipe="color", **options):
    return pt.Learner(model, recipe=recipe, training=TRAINING, max_length=16, **options)


def test_the_posterior_is_the_sum_over_tasks_of_route_times_class():
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]]).log()
    head = Says([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    seen = []

    def features(t, rows):
        seen.extend([] if t is None else [(t, rows.tolist())])
        return rows[:, None]

    scores = Three().scores(head, 6, Reading(2, features), weights)
    expected = torch.tensor([[0.63, 0.07, 0.06, 0.24, 0, 0], [0, 0, 0, 0, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(scores.exp(), expected, atol=1e-7, rtol=0)
    assert seen == [(0, [0]), (1, [0]), (2, [1])]  # a pass for every task present, its inputs alone


def test_a_prior_of_the_router_multiplies_what_the_adapter_says_within_a_task():
    class Prior(Three):
        def _prior(self, features, task):
            log_p = torch.full((1, 6), -torch.inf, dtype=torch.float64)
            log_p[:, 2 * task : 2 * task + 2] = torch.tensor([0.25, 0.75]).log()
            return log_p

    head = Says([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    scores = Prior().scores(head, 6, Reading(1, lambda t, rows: rows[:, None]), torch.tensor([[0.7, 0.3, 0.0]]).log())
    p = torch.tensor([0.7 * 3 / 4, 0.7 / 4, 0.3 / 13, 0.3 * 12 / 13, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(scores.exp()[0], p, atol=1e-7, rtol=0)


def test_a_class_of_several_tasks_gathers_from_all():
    class Shared(PerTask):
        def task_classes(self, task):
            return (0, 1)

    class Head:
        def scores(self, features, task):
            return torch.tensor([[0.9, 0.1], [0.2, 0.8]][task]).log().expand(len(features), 2)

    scores = Shared().scores(Head(), 2, Reading(1, lambda t, rows: rows[:, None]), torch.tensor([[0.5, 0.5]]).log())
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.55, 0.45]], dtype=torch.float64), atol=1e-7, rtol=0)


def product(classes, offers=(), **settings):
    """A consolidation of two tasks with these classes, whose router has its own opinion on all four."""

    class Knows(Half):
        tasks = (0, 1)
        log_classes = staticmethod(lambda features: torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().double())
        log_within = staticmethod(lambda features, task: torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().double())

    made = PerTask(Knows(), 2, **settings)
    made.backbone, made._classes = SimpleNamespace(offers=offers, layers=3), classes
    made._adapters = [{}] * len(classes)
    return made


class Four:
    """p(c | x, t) over four classes, the same under both adapters of a pair."""

    def scores(self, features, task):
        return torch.tensor([[0.9, 0.1, 0.6, 0.4], [0.3, 0.7, 0.5, 0.5]])[[task]].log()


WEIGHTS = torch.tensor([[0.7, 0.3]]).log()


def posterior(made):
    return made.scores(Four(), 4, Reading(1, lambda t, rows: rows[:, None]), WEIGHTS).softmax(1)[0]


@pytest.mark.parametrize("v", [0.5, 2.0])
def test_the_product_multiplies_the_routed_posterior_with_that_of_frozen_features(v):
    routed = torch.tensor([0.7 * 0.9, 0.7 * 0.1, 0.3 * 0.5, 0.3 * 0.5], dtype=torch.float64)
    p = routed * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) ** v
    found = posterior(product([(0, 1), (2, 3)], prior=0.5, frozen=v))
    torch.testing.assert_close(found, p / p.sum(), atol=1e-6, rtol=0)


def test_where_all_tasks_share_their_classes_the_adapters_alone_decide():
    shared = [(0, 1), (0, 1)]
    alone = posterior(product(shared))
    assert torch.equal(posterior(product(shared, prior=0.5, frozen=0.5)), alone)
    assert not torch.equal(posterior(product([(0, 1), (1, 2)], frozen=0.5)), posterior(product([(0, 1), (1, 2)])))


def test_answers_of_a_language_model_are_weighed_by_the_prior_as_before():
    tasks = [(0, 1), (2, 3)]
    before = posterior(product(tasks, prior=0.5))
    assert torch.equal(posterior(product(tasks, ("answers",), prior=0.5, frozen=0.5)), before)


@pytest.mark.parametrize(
    ("classes", "offers", "told"),
    [
        ([(0, 1), (2, 3)], (), r"times the frozen model \(the last 3 layers\), since tasks bring new classes"),
        ([(0, 1), (0, 1)], (), "alone, since all tasks have the same classes"),
        ([(0, 1), (2, 3)], ("answers",), "no features predict"),
    ],
    ids=str,
)
def test_what_decides_is_told_with_its_reason(classes, offers, told):
    assert re.search(told, product(classes, offers, frozen=1.0).decision())
    assert product(classes, offers).decision() is None  # nothing depends on the tasks


def test_it_is_told_when_a_stream_is_learned(stream, model, tmp_path):
    class Heard(Progress):
        def say(self, line):
            lines.append(line)

    lines: list[str] = []
    learner(model, "routed_layers", run=tmp_path / "run", progress=Heard()).learn(stream)
    assert sum("since tasks bring new classes" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("candidates", "mass", "asked"), [(1, 0.95, [[0]]), (3, 0.95, [[0, 1]]), (2, 0.4, [[0]]), (3, 1.0, [[0, 1]])]
)
def test_candidates_are_asked_until_they_hold_enough(candidates, mass, asked):
    consolidation = PerTask(Half(), candidates, mass)
    consolidation._adapters = [{}, {}, {}]
    if candidates == 1:
        consolidation.router.route = lambda features: torch.zeros(len(features), dtype=torch.long)
    weights = consolidation.weights(Reading(1, lambda t, rows: torch.zeros(1, 4)))
    assert [(row > -torch.inf).nonzero().flatten().tolist() for row in weights] == asked


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_run_predicts_as_one_that_is_opened_again(recipe, stream, model, tmp_path):
    first = learner(model, recipe, run=tmp_path / "run")
    result = first.learn(stream)
    texts = [x for task in stream for x in task.test["text"]]
    opened = pt.Learner.open(tmp_path / "run")
    assert opened.predict(texts) == first.predict(texts)
    matrix = result.matrix("linear", "class").values
    labels = [stream.labels[c] for task in stream for c in task.test["label"]]
    sizes = [len(task.test) for task in stream]
    predicted = opened.predict(texts)
    right = [a == b for a, b in zip(predicted, labels, strict=True)]
    per_task = [sum(right[sum(sizes[:j]) : sum(sizes[: j + 1])]) / sizes[j] for j in range(len(sizes))]
    assert per_task == pytest.approx(list(matrix[-1]))


def test_later_tasks_change_nothing_of_an_earlier_one(stream, model, tmp_path):
    result = learner(model, "color", run=tmp_path / "run").learn(stream)
    matrix = result.matrix("linear", "task").values
    assert all(matrix[i, j] == matrix[j, j] for i in range(len(matrix)) for j in range(i + 1))
    drift = [g for g in result.guarantees if g["name"].startswith("change of features")]
    assert drift and all(g["value"] == 0 for g in drift)


def test_with_the_task_given_the_classes_are_those_of_the_task(stream, model, tmp_path):
    oracle = Recipe(make_recipe("color").tuner, consolidation=PerTask(OracleRouter()), name="oracle")
    own = learner(model, oracle, run=tmp_path / "run")
    result = own.learn(stream)
    assert (result.matrix("linear", "class").values[-1] == result.matrix("linear", "task").values[-1]).all()
    task = stream.tasks[0]
    assert set(own.predict(task.test["text"], task=task.name)) <= set(stream.label_texts(task.classes))
    with pytest.raises(pt.PerpetuneError, match="give it"):
        own.predict(task.test["text"])
    with pytest.raises(ConfigError, match="no task `nowhere`"):
        own.predict(task.test["text"], task="nowhere")


def test_one_task_is_exported_and_not_several(stream, model, tmp_path):
    from transformers import AutoModel

    own = learner(model, "color", run=tmp_path / "run")
    own.learn(stream)
    with pytest.raises(ConfigError, match="--only TASK"):
        own.export(tmp_path / "all")
    task = stream.tasks[0]
    own.export(tmp_path / "one", only=[task.name])
    plain = AutoModel.from_pretrained(tmp_path / "one", add_pooling_layer=False)
    backbone, examples = own.backbone, own.backbone.prepare(task.test)
    with own.recipe.consolidation.view(0):
        expected = backbone.features(examples, 8)
    backbone.model = plain
    torch.testing.assert_close(backbone.features(examples, 8), expected, atol=1e-5, rtol=1e-5)


def test_adapters_are_exchanged_in_place(stream, model, tmp_path):
    own = learner(model, "color", run=tmp_path / "run")
    own.learn(stream)
    consolidation = own.recipe.consolidation
    with consolidation.view(0):
        assert consolidation._slots.in_place  # else every exchange would go through peft's loading
        found = consolidation.tuner.tensors(own.backbone.model)
    assert all(torch.equal(found[k], v) for k, v in consolidation._adapters[0].items())


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "nobody"},
        {"router": {"type": "KMeansRouter", "centers": 3}},
        {"router": KMeansRouter(), "candidates": 2},
        {"router": RidgeRouter(), "candidates": 0},
        {"router": RidgeRouter(), "mass": 1.5},
        {"features": "mine"},
        {"prior": -1.0},
        {"frozen": -0.5},
        {"frozen": float("nan")},
        {"layers": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        PerTask(**settings)


def test_a_recipe_with_a_router_is_plain_data_and_back():
    data = make_recipe("routed").to_dict()
    assert data["consolidation"]["router"]["type"] == "PooledRouter"
    again = Recipe.from_dict(data)
    assert again.to_dict() == data and again.consolidation.router == PooledRouter(many_tasks=True, together=True)
    assert "frozen" not in data["consolidation"]  # which came later
    product = make_recipe("routed_product")
    assert Recipe.from_dict(product.to_dict()).consolidation == product.consolidation


def test_only_adapters_can_be_kept_for_every_task(stream, model):
    recipe = Recipe(make_recipe("sequential").tuner, consolidation=PerTask())
    with pytest.raises(ConfigError, match="AllWeights"):
        learner(model, recipe).learn(stream)


def test_nothing_is_gathered_anew_where_nothing_grows_stale():
    with pytest.raises(ConfigError, match="read `ncm`"):
        Recipe(
            make_recipe("color").tuner, consolidation=PerTask(), head=[pt.LinearHead(), pt.PrototypeHead(refresh=True)]
        )
