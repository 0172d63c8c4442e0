import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_t
from torch.nn.functional import normalize

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import RidgeHead
from perpetune.heads.ridge import in_holdout
from perpetune.routers import RidgeRouter, RouterError

WIDTH, LABELS = 6, ["ant", "bee"]


def samples(task, n=150, seed=0, width=WIDTH, spread=1.0):
    """A Gaussian of its own centre and width, and a constant feature; features, labels, ids."""
    g = torch.Generator().manual_seed(task)
    centre, widths = torch.randn(width, generator=g), 0.4 + torch.rand(width, generator=g)
    g = torch.Generator().manual_seed(1000 * (seed + 1) + task)
    f = centre + spread * widths * torch.randn(n, width, generator=g)
    f[:, -1] = 1.0
    return f, torch.randint(0, 2, (n,), generator=g), [f"{task}-{seed}-{i}" for i in range(n)]


def router_of(tasks, width=WIDTH, **settings):
    """`tasks`: (index, (features, labels, ids)), in the order of observation."""
    router = RidgeRouter(**settings)
    router.open(width, LABELS, seed=3)
    for index, given_ in tasks:
        router.observe(index, *given_)
    return router


def direct_ridge(H, Y, penalty):
    rows = torch.cat([H, math.sqrt(penalty) * torch.eye(H.shape[1], dtype=H.dtype)])
    zeros = torch.zeros(H.shape[1], Y.shape[1], dtype=Y.dtype)
    return torch.linalg.lstsq(rows, torch.cat([Y, zeros])).solution


@pytest.mark.parametrize("features", [0, 20])
def test_the_posterior_from_moments_is_the_one_from_the_holdout_samples_themselves(features):
    T, x = 3, samples(1, seed=7)[0]
    tasks = [samples(t, n=100 + 40 * t) for t in range(T)]
    router = router_of(list(enumerate(tasks)), features=features)
    head = router.fit().head
    H, X = (head.expand(f.double())[0] * head.unit for f in (torch.cat([t[0] for t in tasks]), x))
    home = torch.cat([torch.full((len(t[0]),), i) for i, t in enumerate(tasks)])
    Y, v = torch.eye(T).double()[home], torch.tensor([in_holdout(i, 0.2) for t in tasks for i in t[2]])
    penalty = head.fit()[2]
    s_v, s = H[v] @ direct_ridge(H[~v], Y[~v], penalty), X @ direct_ridge(H, Y, penalty)
    groups = [s_v[home[v] == t] for t in range(T)]
    n = sum(map(len, groups))
    pooled = sum((len(g) - 1) * g.T.cov() for g in groups) / (n - T)
    pooled = n / (n + T) * pooled + T / (n + T) * torch.diag(pooled.diagonal()) + 1e-6 * torch.eye(T)
    density = []
    for g in groups:
        k = len(g)
        cov = ((k - 1) * g.T.cov() + 100 * pooled) / (k - 1 + 100) * (1 + 1 / k)
        density.append(torch.from_numpy(multivariate_t.logpdf(s.numpy(), g.mean(0).numpy(), cov.numpy() * 0.8, df=10)))
    expected = torch.stack(density, 1).log_softmax(1)
    assert router.calibrated and (expected.exp().amax(1) < 0.9).any()
    assert torch.allclose(router.log_posterior(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(router.route(x), expected.argmax(1))


def test_of_many_tasks_the_nearest_have_covariances_of_their_own(monkeypatch):
    """S_t of the two that are nearest under S, (1 + 1 / n_t) S of the others; a row does not know the others."""
    T, x = 5, torch.cat([samples(t, n=30, seed=7)[0] for t in range(5)])
    router = router_of([(t, samples(t, n=100 + 40 * t)) for t in range(T)])
    full, density = router.log_posterior(x), router.fit().density
    s = router.fit().head.scores(x)
    S = torch.linalg.inv(density.W.T @ density.W)
    expected = torch.empty(len(x), T, dtype=torch.float64)
    for i, row in enumerate(s):
        far = torch.stack(
            [(row - m) @ torch.linalg.solve(S, row - m) / w for m, w in zip(density.m, density.widened, strict=True)]
        )
        near = far.argsort()[:2].tolist()
        for t in range(T):
            cov = torch.linalg.inv(density.P[t]) if t in near else density.widened[t] * S
            expected[i, t] = multivariate_t.logpdf(row.numpy(), density.m[t].numpy(), cov.numpy() * 0.8, df=10)
    order = torch.tensor(router.fit().order)
    monkeypatch.setattr("perpetune.routers.density.CLOSE", 2)
    found = router.log_posterior(x)
    assert torch.allclose(found[:, order], expected.log_softmax(1), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(found, full, atol=1e-3)
    assert torch.equal(torch.cat([router.log_posterior(row[None]) for row in x]), found)


def test_the_nearest_sixteen_route_as_all_do(monkeypatch):
    tasks = [samples(t, n=120, width=24, spread=0.9) for t in range(24)]
    router = router_of(list(enumerate(tasks)), width=24)
    x = torch.cat([samples(t, n=20, seed=7, width=24, spread=0.9)[0] for t in range(24)])
    found = router.route(x)
    monkeypatch.setattr("perpetune.routers.density.CLOSE", 24)
    assert 0.99 <= (router.route(x) == found).double().mean() and len(set(found.tolist())) == 24


def test_the_scores_are_class_scores_summed_over_the_classes_of_a_task():
    tasks, x = [samples(t) for t in range(3)], samples(1, seed=7)[0]
    head = router_of(list(enumerate(tasks)), reading="sum").fit().head
    classes = RidgeHead(features=0, regularisation=head.fit()[2])
    classes.open(WIDTH, [f"{t} {label}" for t in range(3) for label in LABELS], seed=3)
    for t, (f, y, ids) in enumerate(tasks):
        classes.observe(f, 2 * t + y, ids)
    summed = classes.scores(x).reshape(-1, 3, 2).sum(2)
    router = router_of(list(enumerate(tasks)), reading="sum")
    assert torch.allclose(
        router.fit().head.scores(x)[:, torch.tensor(router.fit().order).argsort()], summed, atol=1e-12
    )
    assert torch.equal(router.route(x), summed.argmax(1))
    assert not router.calibrated


@pytest.mark.parametrize("features", [0, 64])
def test_separated_domains_are_all_routed_home(features):
    tasks = [samples(t, width=32, spread=0.2) for t in range(4)]
    router = router_of(list(enumerate(tasks)), width=32, features=features)
    for t in range(4):
        assert (router.route(samples(t, seed=7, width=32, spread=0.2)[0]) == t).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
@pytest.mark.parametrize("reading", ["posterior", "sum"])
def test_the_order_of_tasks_and_samples_changes_no_bit(order, reading):
    tasks = [samples(t) for t in range(3)]
    x = torch.cat([samples(t, seed=7)[0] for t in range(3)])
    plain = router_of(list(enumerate(tasks)), reading=reading)
    mixed = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    moved = [(f[mixed], y[mixed], [ids[i] for i in mixed]) for f, y, ids in tasks]
    late = router_of([(t, moved[t]) for t in order], reading=reading)  # the same indices, another order of arrival
    assert all(torch.equal(late.state()[k], v) for k, v in plain.state().items())
    renamed = router_of([(i, moved[t]) for i, t in enumerate(order)], reading=reading)  # index = order of arrival
    assert torch.equal(late.route(x), plain.route(x))
    assert torch.equal(torch.tensor(order)[renamed.route(x)], plain.route(x))
    if reading == "posterior":
        assert torch.equal(late.log_posterior(x), plain.log_posterior(x))
        assert torch.equal(renamed.log_posterior(x), plain.log_posterior(x)[:, order])


@given(batch=st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch(batch):
    router, x = router_of([(t, samples(t)) for t in range(3)]), samples(0, seed=7)[0]
    assert torch.equal(torch.cat([router.log_posterior(part) for part in x.split(batch)]), router.log_posterior(x))


def test_distances_in_chunks(monkeypatch):
    router, x = router_of([(t, samples(t)) for t in range(3)]), samples(0, seed=7)[0]
    whole = router.log_posterior(x)
    monkeypatch.setattr("perpetune.routers.density.ENTRIES", 60)
    assert torch.equal(router.log_posterior(x), whole)


def test_what_it_says_it_is_sure_of_happens_as_often():
    tasks = [samples(t, n=600, width=8) for t in range(4)]  # Gaussians that overlap, each of its own widths
    router = router_of(list(enumerate(tasks)), width=8)
    x = torch.cat([samples(t, n=2000, seed=7, width=8)[0] for t in range(4)])
    home = torch.arange(4).repeat_interleave(2000)
    p = router.log_posterior(x).exp()
    confidence, right = p.amax(1), (p.argmax(1) == home).double()
    assert torch.allclose(p.sum(1), torch.ones(len(p)).double())
    assert 0.6 < float(right.mean()) < 0.95
    assert abs(float(confidence.mean() - right.mean())) < 0.02
    bins = (confidence * 10).long().clamp(max=9)
    gaps = [float((confidence - right)[bins == b].sum().abs()) for b in range(10)]
    assert sum(gaps) / len(p) < 0.03  # expected calibration error
    by_scores = router_of(list(enumerate(tasks)), width=8, reading="sum").route(x) == home
    assert float(right.mean()) > float(by_scores.double().mean())


def test_tasks_are_equally_likely_however_many_samples_they_have():
    few, many = samples(0, n=80), samples(1, n=2000)
    middle = (samples(0, n=4000, seed=7)[0].mean(0) + samples(1, n=4000, seed=7)[0].mean(0)) / 2
    balanced = router_of([(0, samples(0, n=2000)), (1, many)]).log_posterior(middle[None])
    skewed = router_of([(0, few), (1, many)]).log_posterior(middle[None])
    assert abs(float((balanced - skewed).exp()[0, 0]) - 1) < 0.5  # counts as a prior: a factor of 25


def test_a_task_that_comes_back_is_a_task_seen_once_with_all_samples():
    f, y, ids = samples(0)
    router = router_of([(0, (f[:70], y[:70], ids[:70])), (1, samples(1)), (0, (f[70:], y[70:], ids[70:]))])
    once = router_of([(0, (f, y, ids)), (1, samples(1))])
    assert all(torch.equal(router.state()[k], v) for k, v in once.state().items())
    assert torch.equal(router.log_posterior(f), once.log_posterior(f))


def test_columns_are_task_indices_and_unknown_tasks_impossible():
    x = samples(0, seed=7)[0]
    sparse, dense = (router_of([(i, samples(t)) for i, t in zip(at, (0, 1), strict=True)]) for at in ([4, 1], [1, 0]))
    logp = sparse.log_posterior(x)
    assert logp.shape == (150, 5) and torch.equal(logp[:, [1, 4]], dense.log_posterior(x))
    assert (logp[:, [0, 2, 3]] == -torch.inf).all()


def test_two_tasks_of_the_same_samples_are_equally_likely_and_the_lowest_wins():
    router = router_of([(5, samples(0)), (2, samples(0))])
    x = samples(0, seed=7)[0]
    assert torch.allclose(router.log_posterior(x)[:, [2, 5]], torch.full((150, 2), math.log(0.5)).double(), atol=1e-9)
    assert router_of([(5, samples(0)), (2, samples(0))], reading="sum").route(x).unique().tolist() == [2]


def test_with_too_few_held_out_samples_it_falls_back_to_the_sum():
    tasks = [(0, samples(0)), (1, samples(1, n=20))]
    router, by_sum = router_of(tasks), router_of(tasks, reading="sum")
    x = torch.cat([samples(t, seed=7)[0] for t in range(2)])
    assert {m.name: m.value for m in router.guarantee()}["held-out samples of a task"] < 10
    assert not router.calibrated
    assert torch.equal(router.route(x), by_sum.route(x))
    for one in (router, by_sum):
        with pytest.raises(RouterError, match="needs 10 samples of every task"):
            one.log_posterior(x)
    router.observe(1, *samples(1, n=130, seed=2))
    assert router.calibrated


def test_features_that_are_always_the_same_stay_finite():
    y = torch.zeros(100, dtype=torch.long)
    flat = [(t, (torch.eye(WIDTH)[[t]].repeat(100, 1), y, [f"{t}-{i}" for i in range(100)])) for t in range(2)]
    router = router_of(flat)
    logp = router.log_posterior(torch.cat([torch.eye(WIDTH)[:2], torch.zeros(1, WIDTH)]))
    assert torch.isfinite(logp).all() and logp.argmax(1).tolist()[:2] == [0, 1]


def test_the_fit_is_made_once_until_something_changes(monkeypatch):
    router, x = router_of([(t, samples(t)) for t in range(2)]), samples(0)[0]
    fit = router.fit()
    router.route(x), router.log_posterior(x), router.guarantee()
    assert router.fit() is fit
    router.observe(2, *samples(2))
    assert router.fit() is not fit and router.log_posterior(x).shape == (150, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"features": -1}, "features"), ({"reading": "som"}, "did you mean `sum`"), ({"holdout": 1.0}, "share")],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        RidgeRouter(**settings)


@pytest.mark.parametrize(
    ("settings", "seed", "message"),
    [({"features": 20}, 4, "expected random features of seed 4"), ({"features": 21}, 3, "`gram` of shape")],
)
def test_a_checkpoint_of_other_random_features_is_refused(settings, seed, message):
    state = router_of([(0, samples(0))], features=20).state()
    router = RidgeRouter(**settings)
    router.open(WIDTH, LABELS, seed=seed)
    with pytest.raises(HeadError, match=message):
        router.load_state(state)
    assert router.tasks == []


def test_features_of_length_one_lose_nothing_to_the_grid():
    tasks = [(t, (normalize(f, dim=1), y, ids)) for t in range(2) for f, y, ids in [samples(t, width=384)]]
    assert all(m.holds is not False for m in router_of(tasks, width=384).guarantee())
