"""Prototypes in concatenated subspaces against the formulas of EASE, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import SubspaceHead, make_head

L = 4
TASKS = [[0, 1], [2, 3, 4], [5]]
LABELS = [f"class {c}" for c in range(7)]


def samples(task, seed=0):
    """Features under the adapters up to a task (N x (task + 1) L), labels, ids."""
    generator = torch.Generator().manual_seed(10 * task + seed)
    labels = torch.tensor(TASKS[task] * 5)
    features = torch.randn(len(labels), (task + 1) * L, dtype=torch.float64, generator=generator)
    features = (features * 2**18).round() / 2**18  # on the grid of the sums, which are exact there
    return features, labels, [f"{task}.{i}" for i in range(len(labels))]


def learned(tasks=(0, 1, 2), **settings):
    head = SubspaceHead(**settings)
    head.open(L, LABELS, seed=0)
    for task in tasks:
        head.begin_task(TASKS[task])
        head.end_task()
        head.observe(*samples(task))
    return head


def cos(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


def published(f, alpha, released=False):
    """Scores of one input f (T L,), from the samples, class by class and subspace by subspace."""
    T, own = len(TASKS), {c: t for t, classes in enumerate(TASKS) for c in classes}
    P = {}
    for c, s in own.items():
        features, labels, _ = samples(s)
        for t in range(s + 1):
            P[c, t] = features[labels == c][:, t * L : (t + 1) * L].mean(0)
    exact = dict(P)
    for c, s in own.items():
        for t in range(s + 1, T):
            donors = [n for n in own if (own[n] >= t if released else own[n] == t)]
            w = [math.exp(cos(exact[c, s], exact[n, s])) for n in donors]
            P[c, t] = sum(x / sum(w) * exact[n, t] for x, n in zip(w, donors, strict=True))
    other = alpha / (T - 1) if released else alpha
    return [
        sum((1 if t == s else other) * cos(f[t * L : (t + 1) * L], P[c, t]) for t in range(T)) for c, s in own.items()
    ]


@pytest.mark.parametrize(("alpha", "released"), [(0.1, False), (0.7, False), (0.1, True)])
def test_scores_are_those_of_the_equation(alpha, released):
    inputs = torch.randn(3, 3 * L, dtype=torch.float64)
    scores = learned(alpha=alpha, released=released).scores(inputs)
    expected = torch.tensor([published(f, alpha, released) for f in inputs], dtype=torch.float64)
    torch.testing.assert_close(scores[:, :6], expected, atol=1e-12, rtol=0)
    assert (scores[:, 6] == -torch.inf).all()


def test_a_saved_head_is_the_same_to_the_bit_and_finds_its_classes_by_their_names():
    head, inputs = learned(), torch.randn(5, 3 * L)
    again, turned = SubspaceHead(), SubspaceHead()
    for other, labels in ((again, LABELS), (turned, LABELS[::-1])):
        other.open(L, labels, seed=0)
        other.load_state(head.state())
    assert torch.equal(again.scores(inputs), head.scores(inputs))
    torch.testing.assert_close(turned.scores(inputs).flip(1), head.scores(inputs), atol=1e-12, rtol=0)


def test_batches_of_samples_add_up():
    head, features, labels, ids = learned((0,)), *samples(1)
    for part in (slice(0, 4), slice(4, None)):
        head.observe(features[part], labels[part], ids[part])
    assert torch.equal(head.prototypes(), learned((0, 1)).prototypes())


def test_a_task_that_is_forgotten_takes_its_subspace_along():
    head = learned((0, 1))
    before, after = learned((0,)).state(), head.state()
    features, labels, ids = samples(2)
    head.observe(features, labels, ids)
    head.forget(1, TASKS[1], before, after)
    without = learned((0,))
    without.observe(features[:, [*range(L), *range(2 * L, 3 * L)]], labels, ids)
    inputs = torch.randn(3, 2 * L)
    assert torch.equal(head.scores(inputs), without.scores(inputs))


def test_features_of_one_adapter_where_there_are_more_are_refused():
    with pytest.raises(HeadError, match="features of 1 adapters; 3 were observed"):
        learned().scores(torch.randn(2, L))
    with pytest.raises(HeadError, match="recipe `ease`"):
        learned().scores(torch.randn(2, L + 1))
    with pytest.raises(ConfigError, match="alpha"):
        make_head("ease", alpha=-1.0)
