"""What routers cost when tasks come one after another: the new task's sums are added, and the others left alone."""

from __future__ import annotations

import pytest
import torch

from perpetune.routers import ClassRouter, KMeansRouter, PooledRouter, RidgeRouter
from perpetune.routers.sums import SumsRouter

WIDTH, LABELS = 6, ("ask", "tell", "order")


def samples(task, n=80, seed=0):
    generator = torch.Generator().manual_seed(100 * task + seed)
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(task))
    y = torch.randint(len(LABELS), (n,), generator=generator)
    f = centre + 0.4 * torch.randn(n, WIDTH, generator=generator) + 0.3 * torch.eye(WIDTH)[y]
    return f, y, [f"{task}-{seed}-{i}" for i in range(n)]


def opened(router, sizes=()):
    router.open(WIDTH, LABELS, seed=0)
    for task, n in enumerate(sizes):
        router.observe(task, *samples(task, n))
    return router


def fit(router):
    for one in router._experts.values() if isinstance(router, PooledRouter) else [router]:
        one.fit()


KINDS = [lambda: RidgeRouter(many_tasks=True), lambda: ClassRouter(16, many_tasks=True), lambda: PooledRouter(16, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_of_earlier_tasks_are_not_read_again_to_add_a_task(kind, monkeypatch):
    """Reading a task's stored Gram matrix costs M^2: a refit does it for the new task and for the few whose moments
    it takes, however many there are."""
    monkeypatch.setattr("perpetune.routers.classes.SAMPLED", 4)
    read = 0

    def counted(method):
        def call(*arguments):
            nonlocal read
            read += 1
            return method(*arguments)

        return call

    router, x, work = opened(kind()), samples(0, 40, seed=9)[0][:1], []
    for task in range(18):
        router.observe(task, *samples(task))
        with monkeypatch.context() as patched:
            patched.setattr(SumsRouter, "_count", counted(SumsRouter._count))
            patched.setattr(SumsRouter, "_squares", counted(SumsRouter._squares))
            read = 0
            fit(router)
            router.guarantee()
        work.append(read)
    assert 0 < work[-1] <= work[4] + 1 and router.route(x).shape == (1,), work


@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_were_held_are_those_of_a_router_that_never_fitted_before(kind):
    held, fresh = opened(kind()), opened(kind(), [60, 90, 70, 8])
    for task, n in enumerate([60, 90, 70, 8]):
        held.observe(task, *samples(task, n))
        fit(held)
    held.observe(4, *samples(4, 50))
    held.route(samples(1, 5)[0])
    held.forget(4)
    x = torch.cat([samples(t, 10, seed=5)[0] for t in range(4)])
    assert held.calibrated and torch.equal(held.log_posterior(x), fresh.log_posterior(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_task_does_not_take_the_posterior_from_the_others(kind):
    sizes = [120, 120, 8]
    router, without = opened(kind(), sizes), opened(kind(), sizes[:2])
    x = torch.cat([samples(t, 60, seed=5)[0] for t in range(3)])
    home = torch.arange(3).repeat_interleave(60)
    logp = router.log_posterior(x)
    assert router.calibrated and torch.allclose(logp.exp().sum(1), torch.ones(180).double())
    assert (logp[:120].argmax(1) == home[:120]).double().mean() > 0.8  # as well as two tasks are told apart
    assert (logp[120:].argmax(1) == 2).double().mean() > 0.5  # and the small one is found
    old = type(router)(16) if not isinstance(router, RidgeRouter) else RidgeRouter()
    assert without.calibrated and not opened(old, sizes).calibrated  # as runs made before have it


def test_where_most_tasks_are_small_there_is_no_posterior():
    few = opened(RidgeRouter(many_tasks=True), [14] * 3 + [120] * 2)
    assert not few.calibrated and few.route(samples(4, 5)[0]).shape == (5,)
    few.observe(5, *samples(5, 120))
    assert few.calibrated


def test_a_task_is_held_once():
    router = opened(PooledRouter(16), [40, 40])
    again = opened(PooledRouter(16))
    again.load_state(router.state())
    for each in (router, again):
        held = {t.data_ptr() for expert in each._experts.values() for s in expert.known.values() for t in s.values()}
        assert {t.data_ptr() for state in each.known.values() for t in state.values()} == held


@pytest.mark.parametrize("make", [PooledRouter, KMeansRouter])
def test_what_is_stored_of_a_task_may_lie_in_a_file(make, tmp_path):
    """Then it takes no memory, and changes nothing: no sum is made anew."""
    from safetensors.torch import load_file, save_file

    router, twin = make(), make()
    generator = torch.Generator().manual_seed(0)
    for each in (router, twin):
        each.open(6, ["a", "b", "c", "d"], seed=0)
    for task in range(2):
        features, labels = torch.randn(40, 6, generator=generator), torch.arange(40) % 2 + 2 * task
        for each in (router, twin):
            each.observe(task, features, labels, [f"{task} {i}" for i in range(40)])
    queries = torch.randn(8, 6, generator=generator)
    router.route(queries)
    for task in range(2):
        save_file(router.task_state(task), tmp_path / f"{task}.safetensors")
        before = {name: tensor.data_ptr() for name, tensor in router.known[task].items()}
        router.hold_mapped(task, load_file(tmp_path / f"{task}.safetensors"))
        assert all(tensor.data_ptr() != before[name] for name, tensor in router.known[task].items())
    counted = []
    for expert in getattr(router, "_experts", {}).values():
        count = expert._count
        expert._count = lambda *given, count=count: counted.append(given) or count(*given)
    assert torch.equal(router.route(queries), twin.route(queries)) and not counted
    assert router.state().keys() == twin.state().keys()
    assert all(torch.equal(router.state()[name], tensor) for name, tensor in twin.state().items())
    router.forget(0), twin.forget(0)
    assert torch.equal(router.route(queries), twin.route(queries))
