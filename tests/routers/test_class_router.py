from __future__ import annotations

import itertools

import pytest
import torch

from perpetune.heads.ridge import in_holdout
from perpetune.routers import ClassRouter, KMeansRouter, LDARouter, PooledRouter, RidgeRouter, RouterError
from perpetune.routers.classes import TEMPERATURES

WIDTH, PER_TASK = 8, 4
LABELS = [f"letter {i:02d}" for i in range(3 * PER_TASK)]


def samples(task, n=120, seed=0):
    """Four classes with centres of their own; tasks have nothing in common but their classes."""
    g = torch.Generator().manual_seed(1000 * (seed + 1) + task)
    labels = torch.randint(PER_TASK * task, PER_TASK * (task + 1), (n,), generator=g)
    centres = 2 * torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 0.7 * torch.randn(n, WIDTH, generator=g), labels, [f"{task}-{seed}-{i}" for i in range(n)]


def router_of(tasks, router=None, labels=LABELS):
    router = router or ClassRouter(64)
    router.open(WIDTH, labels, seed=3)
    for index, given in tasks:
        router.observe(index, *given)
    return router


def test_the_posterior_is_a_softmax_of_class_scores_summed_over_a_task():
    router = router_of([(t, samples(t)) for t in range(3)])
    head, task_of, class_of, tau = router.fit()
    x = samples(1, seed=5)[0]
    p = (head.scores(x.double()) / tau).softmax(1)
    expected = torch.stack([p[:, task_of == t].sum(1) for t in range(3)], 1)
    torch.testing.assert_close(router.log_posterior(x).exp(), expected, atol=1e-12, rtol=0)
    within = router.log_within(x, 1).exp()
    own = torch.arange(PER_TASK, 2 * PER_TASK)
    assert torch.equal(class_of[task_of == 1].sort().values, own)
    order = [int((class_of == c).nonzero()) for c in own]
    torch.testing.assert_close(within[:, own], p[:, order] / p[:, order].sum(1, keepdim=True), atol=1e-12, rtol=0)
    assert (within[:, [0, 11]] == 0).all()


def test_the_temperature_comes_from_the_moments_of_the_holdout_samples_themselves():
    tasks = [samples(t) for t in range(3)]
    router = router_of(list(enumerate(tasks)))
    head, task_of, class_of, tau = router.fit()
    H = head.expand(torch.cat([t[0] for t in tasks]).double())[0] * head.unit
    y = torch.cat([t[1] for t in tasks])
    v = torch.tensor([in_holdout(i, 0.2) for t in tasks for i in t[2]])
    column = torch.stack([(class_of == c).nonzero()[0, 0] for c in y])
    Y = torch.eye(len(task_of)).double()[column]
    A = H[~v].T @ H[~v] + head.fit()[2] * torch.eye(H.shape[1], dtype=H.dtype)
    s = H[v] @ torch.linalg.solve(A, H[~v].T @ Y[~v])
    right = torch.zeros_like(s, dtype=torch.bool)
    right[torch.arange(len(s)), column[v]] = True
    foreign = task_of[None] != task_of[column[v]][:, None]
    m_1, m_0 = s[right].mean(), s[~right].mean()
    e_0 = s[foreign].square().mean()
    near = ~foreign & ~right
    e_1 = ((s[right].square().sum() + s[near].square().sum()) - near.sum() * e_0) / right.sum()
    v_0 = e_0 - m_0**2
    v_1 = torch.maximum(e_1 - m_1**2, v_0)
    draws = torch.randn(4096, len(task_of), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = m_0 + v_0.sqrt() * draws
    z[:, 0] = m_1 + v_1.sqrt() * draws[:, 0]
    losses = [-(z / t).log_softmax(1)[:, 0].mean() for t in TEMPERATURES]
    assert tau == pytest.approx(float(TEMPERATURES[int(torch.stack(losses).argmin())]), rel=1e-12)


def test_it_is_nearly_as_sure_as_it_is_right():
    router = router_of([(t, samples(t, n=400)) for t in range(3)])
    x = torch.cat([samples(t, n=1000, seed=9)[0] for t in range(3)])
    true = torch.arange(3).repeat_interleave(1000)
    log_p = router.log_posterior(x)
    right = (log_p.argmax(1) == true).double().mean()
    assert right > 0.9 and abs(log_p.exp().amax(1).mean() - right) < 0.08


def test_tasks_that_only_their_classes_tell_apart_need_it():
    tasks = [(t, samples(t, n=400)) for t in range(3)]
    x = torch.cat([samples(t, n=300, seed=9)[0] for t in range(3)])
    true = torch.arange(3).repeat_interleave(300)
    right = {
        type(r).__name__: float((router_of(tasks, r).route(x) == true).double().mean())
        for r in (ClassRouter(64), RidgeRouter(), KMeansRouter(1), PooledRouter(64))
    }
    assert right["ClassRouter"] > right["RidgeRouter"] + 0.1 and right["ClassRouter"] > right["KMeansRouter"] + 0.1
    assert right["PooledRouter"] > right["RidgeRouter"] + 0.05


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_the_order_of_tasks_changes_no_bit(order):
    tasks, x = [samples(t) for t in range(3)], samples(0, seed=5)[0]
    ours = router_of([(t, tasks[t]) for t in range(3)]).log_posterior(x)
    assert torch.equal(router_of([(t, tasks[t]) for t in order]).log_posterior(x), ours)


def test_one_task_has_no_rival_and_no_posterior():
    router = router_of([(2, samples(2))])
    assert not router.calibrated and (router.route(samples(2, seed=5)[0]) == 2).all()
    assert router.log_within(samples(2)[0], 2) is None
    with pytest.raises(RouterError, match="two tasks"):
        router.log_posterior(samples(2)[0])


def test_tasks_may_share_their_classes():
    def moved(task):
        f, labels, ids = samples(0, seed=task)
        return f + 3 * task, labels, ids

    router = router_of([(0, moved(0)), (1, moved(1))])
    x = torch.cat([samples(0, seed=7)[0], samples(0, seed=8)[0] + 3])
    assert (router.route(x) == torch.arange(2).repeat_interleave(120)).double().mean() > 0.95
    assert (router.log_within(x, 1)[:, :PER_TASK] > -torch.inf).all()


def test_the_pool_is_the_geometric_mean_of_its_experts():
    tasks, x = [(t, samples(t)) for t in range(3)], samples(1, seed=5)[0]
    a = router_of(tasks, RidgeRouter()).log_posterior(x)
    b = router_of(tasks, ClassRouter(64)).log_posterior(x)
    expected = ((a + b) / 2).softmax(1)
    torch.testing.assert_close(router_of(tasks, PooledRouter(64)).log_posterior(x).exp(), expected, atol=1e-12, rtol=0)


def test_a_third_expert_takes_part_in_the_pool_of_tasks_and_of_classes():
    tasks, x = [(t, samples(t)) for t in range(3)], samples(1, seed=5)[0]
    ridge, classes, lda = (router_of(tasks, r) for r in (RidgeRouter(), ClassRouter(64), LDARouter()))
    pool = router_of(tasks, PooledRouter(64, discriminants=True))
    of_tasks = (sum(r.log_posterior(x) for r in (ridge, classes, lda)) / 3).softmax(1)
    torch.testing.assert_close(pool.log_posterior(x).exp(), of_tasks, atol=1e-12, rtol=0)
    of_classes = ((classes.log_classes(x) + lda.log_classes(x)) / 2).softmax(1)
    torch.testing.assert_close(pool.log_classes(x).exp(), of_classes, atol=1e-12, rtol=0)
    assert torch.equal(router_of(tasks, PooledRouter(64)).log_classes(x), classes.log_classes(x).log_softmax(1))
    assert pool.plain() is None


def test_among_all_classes_the_posterior_is_summed_over_the_tasks_that_share_one():
    def moved(task):
        f, labels, ids = samples(0, seed=task)
        return f + 3 * task, labels, ids

    router = router_of([(0, moved(0)), (1, moved(1)), (2, samples(2))])
    x = torch.cat([samples(0, seed=7)[0], samples(2, seed=8)[0]])
    log_p = router.log_posterior(x)
    expected = sum(log_p[:, [t]].exp() * router.log_within(x, t).exp() for t in range(3))
    torch.testing.assert_close(router.log_classes(x).exp(), expected, atol=1e-12, rtol=0)
    assert router_of([(2, samples(2))]).log_classes(x) is None  # one task: no temperature
    assert router_of([(0, samples(0)), (1, samples(1))], KMeansRouter()).log_classes(x) is None
