"""Statistics that follow the features by a linear map: exact where the drift is one, estimates everywhere else."""

from __future__ import annotations

import math

import pytest
import torch

import perpetune as pt
from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import Carried, make_head
from perpetune.heads.carried import transition

WIDTH, LABELS = 6, ["ant", "bee", "cat", "dog"]
RAW = {"lda": {"type": "lda", "shrinkage": 0.1}, "ncm": "ncm", "ridge": {"type": "ridge", "features": 0}}
EXACT = {"strength": 1e-15, "temperature": 0.0, "normalise": False}


def numbers(*shape: int, seed: int, scale: float = 1 / 8) -> torch.Tensor:
    """On every head's grid, and so is what a matrix of such numbers makes of them: sums have no rounding at all."""
    return torch.randint(-12, 13, shape, generator=torch.Generator().manual_seed(seed)) * scale


def samples(classes: list[int], seed: int, n: int = 60) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    y = torch.tensor(classes)[torch.arange(n) % len(classes)]
    return numbers(4, WIDTH, seed=1, scale=0.25)[y] + numbers(n, WIDTH, seed=seed), y, [f"{seed}-{i}" for i in range(n)]


def opened(of, **settings):
    head = Carried(of, **settings) if settings else make_head(of)
    head.open(WIDTH, LABELS, seed=0)
    return head


DRIFT = numbers(WIDTH, WIDTH, seed=7, scale=1 / 32)


def test_the_map_is_ridge_of_the_new_features_on_the_old_and_leans_towards_no_change():
    F, G = (torch.randn(20, 4, dtype=torch.float64) for _ in range(2))
    M, w = transition(F, G, 0.01, 2.0, normalise=False)
    eye = torch.eye(4, dtype=torch.float64)
    level = 0.01 * F.square().sum(1).mean()
    ridge = torch.linalg.inv(F.T @ F + level * eye) @ F.T @ G
    assert w == pytest.approx(math.exp(-20 / 8))
    torch.testing.assert_close(M, (1 - w) * ridge + w * eye, rtol=0, atol=1e-12)
    unit, of_unit = (x / x.norm(dim=1, keepdim=True) for x in (F, G))
    published = torch.linalg.inv(unit.T @ unit + 1e-4 * eye) @ unit.T @ of_unit  # of length 1: gamma itself
    torch.testing.assert_close(transition(F, G, 1e-4, 0.0, normalise=True)[0], published, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RAW)
def test_a_linear_drift_is_undone_exactly(name):
    """Old classes after the drift are what a head knows that saw them after it; a head that was left as it is fails."""
    (f, y, ids), (g, z, others) = samples([0, 1], 2), samples([2, 3], 3)
    carried, left, seen = opened(RAW[name], **EXACT), opened(RAW[name]), opened(RAW[name])
    carried.observe(f, y, ids)
    left.observe(f, y, ids)
    seen.observe(f @ DRIFT, y, ids)
    carried.carry(g, g @ DRIFT)
    for head in (carried, left, seen):
        head.observe(g @ DRIFT, z, others)
    for key, expected in seen.statistics.items():
        found = carried.inner.statistics[key]
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max(), key
    query, truth, _ = samples([0, 1], 4)
    torch.testing.assert_close(carried.scores(query @ DRIFT), seen.scores(query @ DRIFT), rtol=1e-7, atol=1e-7)
    right = [float((h.scores(query @ DRIFT).argmax(1) == truth).double().mean()) for h in (carried, left)]
    assert right[0] > 0.9 and right[0] > right[1] + 0.2


def test_old_classes_that_drift_otherwise_are_not_recovered():
    """What is not promised: the map knows the new task alone."""
    (f, y, ids), (g, _, _) = samples([0, 1], 2), samples([2, 3], 3)
    carried, seen, other = opened("ncm", **EXACT), opened("ncm"), numbers(WIDTH, WIDTH, seed=11, scale=1 / 32)
    carried.observe(f, y, ids)
    seen.observe(f @ other, y, ids)
    carried.carry(g, g @ DRIFT)
    ours, theirs = carried.inner.statistics["sums"], seen.statistics["sums"]
    assert (ours - theirs).norm() > 0.5 * theirs.norm()


def test_few_samples_change_little():
    f, y, ids = samples([0, 1], 2)
    head = opened("ncm", strength=1e-4, temperature=1.0, normalise=True)
    head.observe(f, y, ids)
    before = head.inner.statistics["sums"].clone()
    one = numbers(1, WIDTH, seed=3)
    head.carry(one, one @ DRIFT)
    w = math.exp(-1 / WIDTH)
    assert {m.name: m.value for m in head.guarantee()}["weight of no change"] == pytest.approx(w)
    across = torch.linalg.svd(one.double())[2][1:].T  # directions of which one sample says nothing: they only shrink
    sums = head.inner.statistics["sums"]
    M, _ = transition(one.double(), (one @ DRIFT).double(), 1e-4, 1.0, True)
    torch.testing.assert_close(sums, before @ M)
    torch.testing.assert_close(across.T @ M, w * across.T)


def test_it_says_that_its_statistics_are_estimates_and_takes_nothing_out():
    f, y, ids = samples([0, 1], 2)
    head = opened("lda", strength=1e-4, temperature=1.0, normalise=True)
    head.carry(f, f @ DRIFT)  # nothing is known yet
    head.observe(f, y, ids)
    names = {m.name for m in head.guarantee()}
    assert "bits of the largest sum" in names and not any("estimates" in name for name in names)
    state = head.state()
    head.carry(f, f @ DRIFT)
    names = {m.name for m in head.guarantee()}
    assert "bits of the largest sum" not in names and "statistics that are estimates: maps" in names
    with pytest.raises(HeadError, match="estimates"):
        head.forget(0, [0, 1], {}, state)
    again = opened("lda", strength=1e-4, temperature=1.0, normalise=True)
    again.load_state(head.state())
    assert [m.to_dict() for m in again.guarantee()] == [m.to_dict() for m in head.guarantee()]
    assert torch.equal(again.scores(f), head.scores(f))


def test_heads_and_settings_that_do_not_fit_are_refused():
    for of in ("closed_form", "linear", make_head("anacp")):
        with pytest.raises(ConfigError, match="lda, klda, ncm, ridge"):
            Carried(of)
    with pytest.raises(ConfigError, match="anew"):
        Carried({"type": "ncm", "refresh": True})
    with pytest.raises(ConfigError, match="strength"):
        Carried("lda", strength=0)
    recipe = pt.make_recipe("color")
    with pytest.raises(ConfigError, match="read `lda`"):
        recipe.with_heads([Carried("lda")])
    head = opened("lda", **EXACT)
    with pytest.raises(HeadError, match="one pair each"):
        head.carry(torch.zeros(2, WIDTH), torch.zeros(3, WIDTH))
