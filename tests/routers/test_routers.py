"""What all routers have in common."""

import pytest
import torch

from perpetune.core.errors import ConfigError
from perpetune.routers import (
    ROUTERS,
    ClassRouter,
    KMeansRouter,
    LDARouter,
    OracleRouter,
    PooledRouter,
    RidgeRouter,
    RouterError,
    make_router,
)

LABELS = ["ant", "bee"]
WIDTH = 6
KNOWING = [KMeansRouter(), RidgeRouter(), RidgeRouter(features=20), RidgeRouter(reading="sum")]
KNOWING += [ClassRouter(0), ClassRouter(20), PooledRouter(20), LDARouter(), LDARouter(20, map="relu")]
KNOWING += [PooledRouter(20, discriminants=True), LDARouter(20, map="kernel_normalised", ridge=True)]


def samples(task, n=100, seed=0):
    """Features, labels, ids; the centre of a task depends on the task, the noise on the seed as well."""
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(task))
    g = torch.Generator().manual_seed(1000 * (seed + 1) + task)
    f = centre + 0.8 * torch.randn(n, WIDTH, generator=g)
    return f, torch.randint(0, 2, (n,), generator=g), [f"{task}-{seed}-{i}" for i in range(n)]


def opened(router, tasks=(0, 1, 2)):
    router.open(WIDTH, LABELS, seed=3)
    for task in tasks:
        router.observe(task, *samples(task))
    return router


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(params=KNOWING, ids=str)
def router(request):
    return opened(request.param)


def test_they_are_found_by_name():
    known = "KMeansRouter RidgeRouter ClassRouter LDARouter PooledRouter OracleRouter"
    assert " ".join(ROUTERS) == known
    assert all(ROUTERS[type(r).__name__] is type(r) for r in KNOWING)
    assert [name for name, r in ROUTERS.items() if r.needs_task] == ["OracleRouter"]


def test_a_run_of_a_router_that_is_gone_is_told_what_to_do():
    with pytest.raises(ConfigError, match="`ChosenRouter` is gone.*learn the run again"):
        make_router({"type": "ChosenRouter", "features": 2048})


def test_state_round_trip(router):
    x = samples(1, seed=7)[0]
    state, routes = router.state(), router.route(x)
    fresh = type(router)(**{k: getattr(router, k) for k in router.__dataclass_fields__ if k in repr(router)})
    assert fresh == router
    opened(fresh, tasks=[5])  # forgotten by loading
    fresh.load_state(state)
    assert fresh.tasks == [0, 1, 2] and same(fresh.state(), state) and torch.equal(fresh.route(x), routes)
    by_task = opened(fresh, tasks=[])
    for task in (2, 0, 1):
        by_task.load_task_state(task, router.task_state(task))
    assert same(by_task.state(), state) and torch.equal(by_task.route(x), routes)
    fresh.observe(3, *samples(3))
    router.observe(3, *samples(3))
    assert torch.equal(fresh.route(x), router.route(x))


def test_a_state_is_a_copy(router):
    before = router.route(samples(1)[0])
    for tensor in router.state().values():
        tensor.zero_()
    assert torch.equal(router.route(samples(1)[0]), before)


def test_a_task_that_is_forgotten_was_never_seen(router):
    x = samples(0, seed=7)[0]
    without = router.route(x), router.state()
    router.observe(9, *samples(0, seed=5))  # in the way of task 0
    assert not torch.equal(router.route(x), without[0])
    router.forget(9)
    assert torch.equal(router.route(x), without[0]) and same(router.state(), without[1])


def test_one_task_is_always_right(router):
    opened(router, tasks=[2])
    assert router.route(samples(0)[0]).unique().tolist() == [2]


def test_guarantees_hold_and_say_whose_they_are(router):
    measured = router.guarantee()
    assert all(m.holds is not False and m.source == type(router).__name__ and m.note for m in measured)
    stored = max(sum(t.nbytes for t in router.task_state(task).values()) for task in router.tasks)
    assert {m.name: m.value for m in measured}["stored for a task"] == stored
    assert opened(router, tasks=[]).guarantee()[0].value == 0


def test_no_task_was_observed(router):
    opened(router, tasks=[])
    for ask in (router.route, router.log_posterior):
        with pytest.raises(RouterError):
            ask(samples(0)[0])
    with pytest.raises(RouterError, match="no task was observed yet"):
        router.route(samples(0)[0])
    assert not router.calibrated
    for one in (router.forget, router.task_state):
        with pytest.raises(RouterError, match="task 4 was not observed"):
            one(4)


@pytest.mark.parametrize("new", KNOWING, ids=str)
def test_it_must_be_open(new):
    router = type(new)()
    for ask in (router.route, lambda f: router.observe(0, *samples(0))):
        with pytest.raises(RouterError, match="not open yet|no task"):
            ask(samples(0)[0])


@pytest.mark.parametrize(("width", "labels"), [(0, LABELS), (3, [])])
def test_nothing_to_open(router, width, labels):
    with pytest.raises(RouterError, match="it needs one of each"):
        router.open(width, labels, seed=0)


def test_bad_input_is_refused_and_changes_nothing(router):
    f, y, ids = samples(0)
    nan = torch.where(torch.arange(WIDTH) == 2, torch.nan, f)
    before = router.state()
    for message, given in [
        ("expected features of shape", (0, f[:, :-1], y, ids)),
        ("not finite", (0, nan, y, ids)),
        ("each sample needs one of each", (0, f, y[:-1], ids)),
        ("each sample needs one of each", (0, f, y, ids[:-1])),
        ("a task needs a sample", (0, f[:0], y[:0], [])),
        ("not one of the 2 classes", (0, f, y + 1, ids)),
        ("counted from 0", (-1, f, y, ids)),
    ]:
        with pytest.raises(RouterError, match=message):
            router.observe(*given)
    for message, queries in (("expected features of shape", f[0]), ("not finite", nan)):
        with pytest.raises(RouterError, match=message):
            router.route(queries)
    with pytest.raises(RouterError, match="names like `0.centres`"):
        router.load_state({**before, "centres": torch.zeros(1)})
    assert same(router.state(), before)


def test_the_oracle_knows_nothing():
    router = opened(OracleRouter())
    assert router.state() == {} == router.task_state(1) and router.guarantee()[0].value == 0
    with pytest.raises(RouterError, match="give the task"):
        router.route(samples(0)[0])
    with pytest.raises(RouterError, match="stores nothing"):
        router.load_state({"0.centres": torch.zeros(1, WIDTH)})
    router.load_task_state(1, {})


@pytest.mark.real
def test_text_tasks_by_the_features_of_a_real_encoder(streams_dir, minilm):
    from perpetune.models.loading import load_backbone
    from perpetune.streams import load_stream

    names = ["agnews", "dbpedia", "sst2"]
    stream = load_stream(streams_dir / "cl-benchmark", tasks=names, train_limit=90, test_limit=30)
    backbone = load_backbone(minilm, "text", max_length=16)
    found = {
        split: [backbone.features(backbone.prepare(getattr(task, split)), 64) for task in stream]
        for split in ("train", "test")
    }
    x, home = torch.cat(found["test"]), torch.arange(3).repeat_interleave(30)
    for router, least in ((KMeansRouter(), 0.85), (RidgeRouter(), 0.9)):
        router.open(backbone.width, stream.labels, seed=0)
        for t, task in enumerate(stream):
            router.observe(t, found["train"][t], torch.tensor(task.train["label"]), task.train["id"])
        right = router.route(x) == home
        assert float(right.double().mean()) > least
    confidence = router.log_posterior(x).exp().amax(1)
    assert abs(float(confidence.mean() - right.double().mean())) < 0.05
