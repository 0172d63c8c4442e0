"""Adapters that count as much as held-out examples show that they help."""

from __future__ import annotations

import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import perpetune as pt
from perpetune.consolidation import WeighedPerTask
from perpetune.consolidation.states import Reading
from perpetune.consolidation.weighed import UNKNOWN, VOTES, WEIGHTS
from perpetune.core.errors import ConfigError
from perpetune.core.progress import Progress
from perpetune.heads.moments import in_holdout
from perpetune.routers import LDARouter, RidgeRouter
from perpetune.runs.directory import Run

SHARE = 0.2  # the tasks are small
DEFAULT = {"name": "default", "features": 64, "holdout": SHARE}
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


class Frozen(LDARouter):
    """p(t, c | x) = these, of tasks 0 and 1; it has the classes of a task in an order of its own."""

    JOINT = torch.tensor([[0.30, 0.10, 0.0], [0.0, 0.15, 0.45]], dtype=torch.float64)
    calibrated = True
    tasks = (0, 1)

    def log_joint(self, features):
        task_of, class_of = torch.tensor([1, 0, 0, 1]), torch.tensor([2, 1, 0, 1])
        return self.JOINT[task_of, class_of].log().expand(len(features), 4), task_of, class_of

    def log_within(self, features, task):
        p = self.JOINT[task]
        return (p / p.sum()).log().expand(len(features), 3)


class Head:
    P = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.6, 0.4]], dtype=torch.float64)

    def scores(self, features, task):
        return self.P[task].log().expand(len(features), 3)


def made(*losses, classes=((0, 1), (1, 2)), offers=()):
    consolidation = WeighedPerTask(Frozen())
    consolidation.backbone, consolidation._classes = SimpleNamespace(offers=offers, layers=3), list(classes)
    consolidation._adapters = [{}] * len(classes)
    consolidation._votes = {t: {"samples": 10, "losses": list(vote)} for t, vote in enumerate(losses)}
    return consolidation


def posterior(consolidation, weights, read=None):
    read = read or (lambda t, rows: rows[:, None])
    return consolidation.scores(Head(), 3, Reading(1, read), torch.tensor([weights]).log()).exp()[0]


BEST = {w: [0.0 if k == w else 1.0 for k in WEIGHTS] for w in WEIGHTS}


@pytest.mark.parametrize("w", WEIGHTS)
def test_the_posterior_is_that_of_the_equation(w):
    q = Frozen.JOINT / Frozen.JOINT.sum(1, keepdim=True)
    mixed = [q[t, cs] ** (1 - w) * Head.P[t, cs] ** w for t, cs in enumerate(([0, 1], [1, 2]))]
    first, second = (m / m.sum() for m in mixed)
    expected = torch.stack([0.4 * first[0], 0.4 * first[1] + 0.6 * second[0], 0.6 * second[1]])
    torch.testing.assert_close(posterior(made(BEST[w]), [0.4, 0.6]), expected, atol=1e-7, rtol=0)


def test_a_task_that_an_input_is_not_shown_to_keeps_what_the_frozen_model_says():
    second = (0.25 * 0.6) ** 0.5, (0.75 * 0.4) ** 0.5
    z = sum(second)
    expected = torch.tensor([0.3, 0.1 + 0.6 * second[0] / z, 0.6 * second[1] / z], dtype=torch.float64)
    torch.testing.assert_close(posterior(made(BEST[0.5]), [0.0, 0.6]), expected, atol=1e-7, rtol=0)


def test_with_the_task_given_no_other_has_a_say():
    found = posterior(made(BEST[1.0]), [0.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([0.0, 0.6, 0.4], dtype=torch.float64), atol=1e-7, rtol=0)


def test_at_weight_0_the_frozen_model_predicts_alone_and_no_adapter_is_asked():
    def read(t, rows):
        assert t is None
        return rows[:, None]

    found = posterior(made(BEST[0.0]), [0.4, 0.6], read)
    torch.testing.assert_close(found, Frozen.JOINT.sum(0), atol=1e-7, rtol=0)


def test_the_weight_has_the_least_sum_of_losses_and_of_equals_the_smallest():
    assert made([5, 4, 3, 4, 5], [1, 2, 9, 1, 9]).weight == 0.75
    assert made([1, 1, 1, 1, 1]).weight == 0.0
    assert made().weight == UNKNOWN


@pytest.mark.parametrize(
    ("classes", "offers"), [(((0, 1, 2), (0, 1, 2)), ()), (((0, 1), (1, 2)), ("answers",))], ids=["shared", "language"]
)
def test_where_there_is_nothing_to_weigh_it_is_per_task(classes, offers):
    consolidation = made(BEST[0.0], classes=classes, offers=offers)
    seen = []
    posterior(consolidation, [0.4, 0.6], lambda t, rows: seen.append(t) or rows[:, None])
    assert {0, 1} <= set(seen)  # both adapters are asked, whatever was held out
    assert consolidation._opinions() == ((0.5, 0.0) if offers else (0.0, 0.0))


@pytest.mark.parametrize(
    ("consolidation", "told"),
    [
        (made(BEST[0.0]), "the frozen model alone"),
        (made(BEST[0.5], BEST[0.5]), "each task's adapter, which counts 50%: the best on 20 held-out examples"),
        (made(), "no examples could be held out"),
        (made(classes=((0, 1), (0, 1))), "alone, since all tasks have the same classes"),
        (made(offers=("answers",)), "no features predict"),
    ],
    ids=["none", "half", "unknown", "shared", "language"],
)
def test_what_decides_is_told_with_its_reason(consolidation, told):
    assert told in consolidation.decision()


@pytest.fixture(scope="module")
def stream(word_stream):
    """Two tasks, of which the second has rows enough to hold out."""
    return pt.load_stream(word_stream, tasks=["films", "mood"])


@pytest.fixture(scope="module")
def learned(stream, model, tmp_path_factory):
    class Heard(Progress):
        def say(self, line):
            lines.append(line)

    lines: list[str] = []
    path = tmp_path_factory.mktemp("weighed") / "run"
    learner = pt.Learner(model, DEFAULT, path, training=TRAINING, max_length=16, progress=Heard())
    learner.learn(stream)
    return learner, lines


def test_what_is_kept_of_held_out_rows_are_their_losses(learned, stream):
    """Made anew from the rows: those that no adapter was trained on."""
    learner, lines = learned
    consolidation, head, backbone = learner.recipe.consolidation, learner.heads[0], learner.backbone
    commits = Run.read(learner.path).commits[1:]
    for t, (task, commit) in enumerate(zip(stream, commits, strict=True)):
        held = [k for k, i in enumerate(task.train["id"]) if in_holdout(i, SHARE)]
        if not commit.has(VOTES):
            assert len(held) < 10
            continue
        examples, own = backbone.prepare(task.train.select(held)), list(task.classes)
        right = torch.tensor([own.index(task.train["label"][k]) for k in held])
        with consolidation.view(None):
            q = consolidation.router.alone(backbone.pooled(examples, 8), t)[:, own].exp()
        with consolidation.view(t):
            p = head.scores(backbone.features(examples, 8), t)[:, own].double().softmax(1)
        vote = commit.json(VOTES)
        assert vote["samples"] == len(held)
        for w, loss in zip(WEIGHTS, vote["losses"], strict=True):
            mixed = q ** (1 - w) * p**w
            expected = -(mixed / mixed.sum(1, keepdim=True))[torch.arange(len(held)), right].log().sum()
            assert loss == pytest.approx(float(expected), rel=1e-4)
    assert consolidation._votes, "no task had rows enough to hold out: the test shows nothing"
    assert sum("held-out examples" in line for line in lines) == 1


def test_a_run_that_was_stopped_and_opened_again_has_the_same_bits(learned, stream, model, tmp_path, monkeypatch):
    whole, original = learned[0], Run.commit

    def stop_after(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    options = {"training": TRAINING, "max_length": 16}
    for _ in range(len(stream)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "commit", stop_after)
            pt.Learner(model, DEFAULT, tmp_path / "parts", **options).learn(stream)
    parts = pt.Learner(model, DEFAULT, tmp_path / "parts", **options)
    parts.learn(stream)
    files = [
        {str(p.relative_to(path)): p.read_bytes() for p in sorted((path / "commits").rglob("*")) if p.is_file()}
        for path in (whole.path, parts.path)
    ]
    assert files[0] == files[1]
    texts = [text for task in stream for text in task.test["text"]]
    assert pt.Learner.open(whole.path).predict(texts) == whole.predict(texts)
    assert whole.recipe.consolidation._mixes()  # or it would be a test of `PerTask`


def test_adapters_do_not_train_on_held_out_rows_and_lose_no_class(learned, stream):
    consolidation = learned[0].recipe.consolidation
    for session in consolidation.schedule(stream):
        rows, all_rows = consolidation.rows(session), session.tasks[0].train
        held = [i for i in all_rows["id"] if in_holdout(i, SHARE)]
        expected = len(all_rows) - (len(held) if len(held) >= 10 else 0)
        assert len(rows) == expected and set(rows["label"]) == set(all_rows["label"])


def test_a_task_that_is_taken_out_takes_its_vote_along(stream, model, tmp_path, learned):
    whole = dict(learned[0].recipe.consolidation._votes)
    shutil.copytree(learned[0].path, tmp_path / "run")
    assert pt.Learner.open(tmp_path / "run").recipe.consolidation._votes == whole
    pt.Learner.described(tmp_path / "run").revert(stream, stream.tasks[1].name)
    left = pt.Learner.open(tmp_path / "run").recipe.consolidation
    assert Counter(v["samples"] for v in left._votes.values()) == Counter(
        vote["samples"] for t, vote in whole.items() if t != 1
    )
    assert len(left._adapters) == len(stream) - 1


@pytest.mark.parametrize(
    "settings", [{"router": RidgeRouter()}, {"holdout": 0.0}, {"holdout": 0.3}, {"frozen": 1.0}], ids=str
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        WeighedPerTask(**settings)


def test_the_router_is_asked_once_for_routes_and_scores(monkeypatch):
    consolidation, asked, joint = made(BEST[0.5]), [], Frozen.log_joint
    monkeypatch.setattr(Frozen, "log_joint", lambda self, f: asked.append(len(f)) or joint(self, f))
    consolidation.router.known = {0: {}, 1: {}}
    reading = Reading(4, lambda t, rows: rows[:, None])
    weights = consolidation.weights(reading)
    found = consolidation.scores(Head(), 3, reading, weights)
    assert asked == [4]
    again = consolidation.scores(Head(), 3, Reading(4, reading.read), weights)
    assert asked == [4, 4] and torch.equal(again, found)
