import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from perpetune.core.errors import ConfigError
from perpetune.routers import KMeansRouter, RouterError

WIDTH = 8


def domain(task, n=30, spread=0.1):
    """A task of its own direction: features, labels, ids."""
    g = torch.Generator().manual_seed(task)
    f = 3 * torch.eye(WIDTH)[task] + spread * torch.randn(n, WIDTH, generator=g)
    return f, torch.zeros(n, dtype=torch.long), [f"{task}-{i}" for i in range(n)]


def router_of(tasks, seed=0, **settings):
    """`tasks`: (index, (features, labels, ids)), in the order of observation."""
    router = KMeansRouter(**settings)
    router.open(tasks[0][1][0].shape[1], ["a", "b"], seed=seed)
    for index, samples in tasks:
        router.observe(index, *samples)
    return router


def test_the_route_is_the_task_of_the_nearest_kmeans_centre():
    tasks = [domain(t, spread=1.5) for t in range(3)]  # the tasks overlap
    router = router_of(list(enumerate(tasks)), seed=5, centres=4)
    x = torch.cat([f for f, _, _ in tasks])
    nearest = []
    for f, _, ids in tasks:
        by_id = [i for _, i in sorted(zip(ids, range(len(ids)), strict=True))]
        mu = KMeans(4, n_init=10, random_state=5).fit(normalize(f.double()[by_id]).numpy()).cluster_centers_
        pairs = normalize(x.double())[:, None] - torch.from_numpy(mu)
        nearest.append(pairs.norm(dim=2).min(1).values)
    expected = torch.stack(nearest, 1).argmin(1)
    assert len(expected.unique()) == 3
    assert router.route(x).dtype == torch.int64
    assert torch.equal(router.route(x), expected)


def test_centres_are_means_of_features_of_length_one_and_not_of_length_one_themselves():
    f, y, ids = domain(0, spread=2.0)
    mu = router_of([(0, (f, y, ids))], centres=1).task_state(0)["centres"]
    assert torch.allclose(mu[0], normalize(f.double()).mean(0), atol=1e-14)
    assert float(mu.norm()) < 0.99
    assert torch.allclose(
        router_of([(0, (f, y, ids))], centres=1, normalise=False).task_state(0)["centres"][0], f.double().mean(0)
    )


def test_separated_domains_are_all_routed_home():
    router = router_of([(t, domain(t)) for t in range(4)])
    for t in range(4):
        f = 0.1 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(100 + t))
        assert (router.route(f + 3 * torch.eye(WIDTH)[t]) == t).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_the_order_of_tasks_and_samples_changes_no_bit(order):
    tasks = [domain(t, spread=1.0) for t in range(3)]
    x = torch.cat([f for f, _, _ in tasks])
    plain = router_of(list(enumerate(tasks)))
    mixed = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = [(f[mixed], y[mixed], [ids[i] for i in mixed]) for f, y, ids in tasks]
    late = router_of([(t, moved[t]) for t in order])  # the same indices, in another order of arrival
    assert all(torch.equal(late.state()[k], v) for k, v in plain.state().items())
    assert torch.equal(late.route(x), plain.route(x))
    renamed = router_of([(i, moved[t]) for i, t in enumerate(order)])  # index = order of arrival
    assert all(
        torch.equal(renamed.task_state(i)["centres"], plain.task_state(t)["centres"]) for i, t in enumerate(order)
    )
    assert torch.equal(torch.tensor(order)[renamed.route(x)], plain.route(x))


def test_a_new_task_leaves_what_is_stored_of_old_ones_as_it_is():
    router = router_of([(0, domain(0)), (4, domain(1))])
    before = router.state()
    router.observe(2, *domain(2))
    assert all(torch.equal(router.state()[k], v) for k, v in before.items())
    assert router.tasks == [0, 2, 4]
    router.forget(2)
    assert set(router.state()) == set(before) == {"0.centres", "4.centres"}


def test_l1_and_l2_differ():
    """From the origin (0, 0), (3, 3) is nearer than (5, 0) in L2 and farther in L1."""
    one, other = torch.tensor([[3.0, 3.0]]), torch.tensor([[5.0, 0.0]])
    tasks = [(0, (one, torch.tensor([0]), ["a"])), (1, (other, torch.tensor([0]), ["b"]))]
    routes = {d: int(router_of(tasks, distance=d, normalise=False).route(torch.zeros(1, 2))) for d in ("l2", "l1")}
    assert routes == {"l2": 0, "l1": 1}


@given(batch=st.integers(1, 40), distance=st.sampled_from(["l2", "l1"]))
@settings(max_examples=10, deadline=None)
def test_a_sample_is_routed_alone_as_in_a_batch(batch, distance):
    tasks = [(t, domain(t, spread=2.0)) for t in range(3)]
    router, x = router_of(tasks, distance=distance), torch.cat([f for _, (f, _, _) in tasks])
    assert torch.equal(torch.cat([router.route(part) for part in x.split(batch)]), router.route(x))


def test_of_equally_near_tasks_the_lowest_index():
    router = router_of([(7, domain(0)), (3, domain(0)), (5, domain(1))])
    assert router.route(domain(0)[0]).unique().tolist() == [3]
    assert {m.name: m.value for m in router.guarantee()}["nearest centres of two tasks"] == 0.0


@pytest.mark.filterwarnings("error")  # scikit-learn warns of more clusters than points
def test_as_many_centres_as_distinct_samples():
    f = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])  # two directions
    router = router_of([(0, (f, torch.zeros(4, dtype=torch.long), list("abcd")))], centres=5)
    assert router.task_state(0)["centres"].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    zero = router_of([(0, (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), ["a", "b"]))])
    assert zero.route(torch.ones(1, 2)).tolist() == [0]


def test_a_task_that_comes_back_keeps_the_centres_of_both_times():
    first, again, other = domain(0), domain(1), domain(2)
    router = router_of([(0, first), (1, other), (0, again)])
    swapped = router_of([(0, again), (0, first), (1, other)])
    assert len(router.task_state(0)["centres"]) == 10
    assert all(torch.equal(swapped.state()[k], v) for k, v in router.state().items())
    assert (router.route(first[0]) == 0).all() and (router.route(again[0]) == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"), [({"centres": 0}, "at least 1"), ({"distance": "l3"}, "did you mean `l")]
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        KMeansRouter(**settings)


@pytest.mark.parametrize("state", [{}, {"centres": torch.zeros(0, 8)}, {"centres": torch.zeros(2, 7)}])
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(state):
    router = router_of([(0, domain(0))])
    with pytest.raises(RouterError, match=r"expected `centres` of shape \(k, 8\)"):
        router.load_task_state(0, state)
    assert len(router.task_state(0)["centres"]) == 5
