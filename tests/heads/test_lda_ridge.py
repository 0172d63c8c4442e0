"""Discriminant analysis and ridge of the same sums as one read-out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from perpetune.heads.closed_form import PENALTIES
from perpetune.heads.holdout import TEMPERATURES
from perpetune.heads.lda import EQUAL, LDAHead
from perpetune.heads.lda_ridge import SCALE, LDARidgeHead
from perpetune.heads.moments import in_holdout
from tests.heads.points import LABELS, head_of, samples


def by_hand(h, y, strength):
    """Ridge, and discriminant analysis with its offsets, of these rows alone."""
    Y = F.one_hot(y, 4).double()
    penalty, a = strength
    eye = torch.eye(h.shape[1], dtype=h.dtype)
    G = h.T @ h
    ridge = torch.linalg.solve(G + penalty * G.diagonal().mean() * eye, h.T @ Y)
    m = h.T @ Y / Y.sum(0)
    S = (G - m @ (h.T @ Y).T) / (len(h) - 4)
    Theta = torch.linalg.solve((1 - a) * S + a * S.diagonal().mean() * eye, m)
    return ridge, Theta, -0.5 * (m * Theta).sum(0)


@pytest.mark.parametrize("settings", [{"map": "normalised"}, {"map": "kernel_normalised", "gamma": 0.3}], ids=str)
def test_the_logarithm_is_the_mean_of_both_at_their_temperatures(settings):
    f, y, ids = samples(noise=2.0)
    head = head_of(f, y, ids, LDARidgeHead, **settings)
    h = head.expand(f.double())[0] * head.unit
    scores, a = head.scores(f)[:, :4], head.fit()[2]
    penalty, tau_L, tau_R = head._with_ridge
    assert a == head_of(f, y, ids, LDAHead, **{"features": 16, **settings}).fit()[2]  # as without ridge

    ridge, Theta, offset = by_hand(h, y, (penalty, a))
    expected = ((h @ Theta + offset) / tau_L + SCALE * h @ ridge / tau_R) / 2
    torch.testing.assert_close(scores, expected, atol=1e-7, rtol=1e-7)

    train = torch.tensor([not in_holdout(i, 0.2) for i in ids])
    moments = head.holdout_moments(head.seen())
    of_train = {p: by_hand(h[train], y[train], (p, a)) for p in PENALTIES}
    _, Theta, offset = of_train[penalty]
    assert tau_L == float(TEMPERATURES[moments.log_losses((Theta, offset)).argmin()])
    assert tau_R == float(TEMPERATURES[moments.log_losses((SCALE * of_train[penalty][0], None)).argmin()])
    accuracies = dict(zip(PENALTIES, moments.accuracies((of_train[p][0], None) for p in PENALTIES), strict=True))
    assert penalty == max(p for p, found in accuracies.items() if found >= max(accuracies.values()) - EQUAL)


def test_with_too_few_samples_it_is_discriminant_analysis():
    f, y, ids = samples(12)
    found, alone = (head_of(f, y, ids, kind, map="normalised") for kind in (LDARidgeHead, LDAHead))
    assert torch.equal(found.scores(f), alone.scores(f)) and found._with_ridge is None


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [2, 3, 1, 0]])
def test_the_same_bits_in_any_order_and_after_another_choice(order):
    f, y, ids = samples()
    plain = head_of(f, y, ids, LDARidgeHead)
    index = torch.cat([(y == c).nonzero().flatten() for c in order])
    other = head_of(f[index], y[index], [ids[i] for i in index], LDARidgeHead, LABELS, batch=7)
    assert torch.equal(plain.scores(f), other.scores(f))
    mine = (y < 2).nonzero().flatten()
    few = head_of(f[mine], y[mine], [ids[i] for i in mine], LDARidgeHead)
    before = few.scores(f)
    few.load_state(plain.state())
    assert torch.equal(few.scores(f), plain.scores(f))
    few.load_state(head_of(f[mine], y[mine], [ids[i] for i in mine], LDARidgeHead).state())
    assert torch.equal(few.scores(f), before)
