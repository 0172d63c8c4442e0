import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import RidgeHead
from perpetune.heads import ridge as module
from perpetune.heads.exact_sums import gaussian_steps
from perpetune.heads.ridge import GRID, choose_penalty, holdout_errors, in_holdout, solve

LABELS = ["ant", "bee", "cat", "dog", "eel"]
N, WIDTH = 120, 6


def samples(n=N, seed=0, noise=0.7, prefix="sample"):
    """Features, labels (the last label never occurs), ids."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    f = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))[y] + noise * torch.randn(
        n, WIDTH, generator=g
    )
    return f, y, [f"{prefix}-{i}" for i in range(n)]


def head_of(f, y, ids, labels=LABELS, batch=10**9, **settings):
    head = RidgeHead(**{"features": 20, **settings})
    head.open(f.shape[1], labels, seed=3)
    for i in range(0, len(y), batch):
        head.observe(f[i : i + batch], y[i : i + batch], ids[i : i + batch])
    return head


def expanded(head, f):
    return head.expand(f.double())[0] * head.unit


def direct_ridge(H, Y, penalty):
    """argmin |H Theta - Y|^2 + lambda |Theta|^2, by least squares on stacked rows: no Gram matrix."""
    m = H.shape[1]
    rows = torch.cat([H, math.sqrt(penalty) * torch.eye(m, dtype=H.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([Y, torch.zeros(m, Y.shape[1], dtype=Y.dtype)])).solution


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("features", [20, 0])
def test_ridge_from_moments_is_ridge_on_stacked_features(features):
    f, y, ids = samples()
    head = head_of(f, y, ids, features=features, regularisation=2.5, batch=7)
    seen, Theta, penalty = head.fit()
    H, Y = expanded(head, f), torch.eye(4, dtype=torch.float64)[y]
    assert (seen, penalty) == ([0, 1, 2, 3], 2.5)
    assert relative(Theta, direct_ridge(H, Y, 2.5)) < 1e-12
    assert relative(head.scores(f)[:, :4], H @ direct_ridge(H, Y, 2.5)) < 1e-12


@pytest.mark.parametrize("features", [20, 0])
def test_the_chosen_lambda_minimises_the_direct_holdout_error_and_the_fit_is_on_both_folds(features):
    f, y, ids = samples()
    head = head_of(f, y, ids, features=features)
    H, Y = expanded(head, f), torch.eye(4, dtype=torch.float64)[y]
    v = torch.tensor([in_holdout(i, 0.2) for i in ids])
    errors = [float((H[v] @ direct_ridge(H[~v], Y[~v], p) - Y[v]).square().mean()) for p in GRID]
    _, Theta, penalty = head.fit()
    assert penalty == GRID[errors.index(min(errors))]
    assert GRID[0] < penalty < GRID[-1]
    assert relative(Theta, direct_ridge(H, Y, penalty)) < 1e-12


@given(m=st.integers(1, 12), c=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_holdout_error_from_moments_is_the_direct_error(m, c, seed):
    g = torch.Generator().manual_seed(seed)
    H = torch.randn(100, m, generator=g, dtype=torch.float64).clamp(min=0)
    Y = torch.eye(c, dtype=torch.float64)[torch.randint(0, c, (100,), generator=g)]
    G = torch.stack([H[:80].T @ H[:80], H[80:].T @ H[80:]])
    Q = torch.stack([H[:80].T @ Y[:80], H[80:].T @ Y[80:]])
    direct = torch.stack([(H[80:] @ direct_ridge(H[:80], Y[:80], p) - Y[80:]).square().mean() for p in GRID])
    assert torch.allclose(holdout_errors(G, Q, 20, GRID), direct, rtol=1e-12, atol=1e-13)


def test_random_features_are_relu_of_the_projection():
    f, y, ids = samples()
    head = head_of(f, y, ids)
    W = gaussian_steps(3, WIDTH, 20) * 2.0**-10
    scale = 2.0**-1  # the power of two nearest to 1/sqrt(6)
    assert relative(expanded(head, f), (f.double() @ W).clamp(min=0) * scale) < 1e-3


@pytest.mark.parametrize("norm", [1, 10, 100])
@pytest.mark.parametrize("width", [64, 768])
def test_the_grid_suits_features_of_norm_1_to_100(norm, width):
    f = torch.nn.functional.normalize(torch.randn(200, width, generator=torch.Generator().manual_seed(0)), dim=1) * norm
    head = head_of(f, torch.zeros(200, dtype=torch.long), [str(i) for i in range(200)], features=128)
    assert all(m.holds is not False for m in head.guarantee())
    exact = (f.double() @ gaussian_steps(3, width, 128) * 2.0**-10).clamp(min=0) * head.unit / head.grid.step
    assert float((expanded(head, f) - exact).norm() / exact.norm()) < 3e-3


# Order

TASK_ORDERS = st.permutations([0, 1, 2, 3])


@given(order=TASK_ORDERS, batch=st.integers(1, 50), query=st.integers(1, N), seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_same_bits_under_any_order_of_tasks_labels_samples_and_any_batch_size(order, batch, query, seed):
    f, y, ids = samples()
    plain = head_of(f, y, ids)
    labels = [LABELS[c] for c in order] + ["eel"]  # labels in order of first appearance, as a stream has them
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    index = torch.cat([shuffled[y[shuffled] == c] for c in order])
    renamed = torch.tensor([labels.index(LABELS[c]) for c in range(4)])[y]
    other = head_of(f[index], renamed[index], [ids[i] for i in index], labels=labels, batch=batch)
    assert torch.equal(plain.statistics["gram"], other.statistics["gram"])
    seen, Theta, penalty = plain.fit()
    other_seen, other_Theta, other_penalty = other.fit()
    assert [LABELS[c] for c in seen] == [labels[c] for c in other_seen]
    assert penalty == other_penalty and torch.equal(Theta, other_Theta)
    columns = [labels.index(label) for label in LABELS]
    scores = torch.cat([other.scores(part) for part in f.split(query)])
    assert torch.equal(plain.scores(f), scores[:, columns])


@given(cuts=st.lists(st.integers(0, N), max_size=4), order=st.randoms())
@settings(max_examples=10, deadline=None)
def test_shards_add_up_to_the_same_bits(cuts, order):
    f, y, ids = samples()
    edges = [0, *sorted(cuts), N]
    shards = [head_of(f[a:b], y[a:b], ids[a:b]).state() for a, b in zip(edges, edges[1:], strict=False)]
    order.shuffle(shards)
    total = head_of(f[:0], y[:0], [])
    for shard in shards:
        total.add(shard)
    whole = head_of(f, y, ids)
    assert all(torch.equal(total.state()[k], v) for k, v in whole.state().items())
    assert torch.equal(total.scores(f), whole.scores(f))


def test_plain_fp64_agrees_closely_but_not_to_the_bit():
    f, y, ids = samples()
    head = head_of(f, y, ids, regularisation=1.0)
    H, Y = (f.double() @ head.W).clamp(min=0), torch.eye(4, dtype=torch.float64)[y]
    H = H * 1.1  # off the grid
    thetas = []
    for s in range(6):
        o = torch.randperm(N, generator=torch.Generator().manual_seed(s))
        thetas.append(solve(H[o].T @ H[o], H[o].T @ Y[o], float(H.square().mean())))
    assert max(relative(t, thetas[0]) for t in thetas) < 1e-12
    assert any(not torch.equal(t, thetas[0]) for t in thetas)


def published_penalty(H, Y):
    """RanPAC's released rule: the last task alone, first 80 % against the other 20 %, one point per decade."""
    n = int(0.8 * len(H))
    decades = [10.0**k for k in range(-8, 9)]
    errors = [float((H[n:] @ direct_ridge(H[:n], Y[:n], p) - Y[n:]).square().mean()) for p in decades]
    return decades[errors.index(min(errors))]


def test_the_published_rule_depends_on_the_order_of_tasks_and_ours_does_not():
    tasks = [samples(seed=1, noise=0.05, prefix="clean"), samples(seed=2, noise=6.0, prefix="noisy")]
    published, ours = [], []
    for order in (tasks, tasks[::-1]):
        head = RidgeHead(features=20)
        head.open(WIDTH, LABELS, seed=3)
        for f, y, ids in order:
            head.observe(f, y, ids)
            last = published_penalty(expanded(head, f), torch.eye(5, dtype=torch.float64)[y])
        published.append(last)
        ours.append(head.fit())
    assert published[0] >= 10 * published[1]
    assert ours[0][2] == ours[1][2] and torch.equal(ours[0][1], ours[1][1])


# Classes


def test_a_class_in_two_tasks_is_a_class_seen_once_and_new_classes_append_columns():
    f, y, ids = samples()
    head = RidgeHead(features=20)
    head.open(WIDTH, LABELS, seed=3)
    even = torch.arange(N) % 2 == 0
    first, second = (y == 0) | ((y == 1) & even), (y > 1) | ((y == 1) & ~even)
    head.observe(f[first], y[first], [ids[i] for i in first.nonzero()])
    assert head.fit()[0] == [0, 1] and head.knows([0, 1]) and not head.knows([0, 2])
    head.observe(f[second], y[second], [ids[i] for i in second.nonzero()])
    assert torch.equal(head.scores(f), head_of(f, y, ids).scores(f))


def test_empty_classes_are_never_predicted_and_give_no_nan():
    f, y, ids = samples()
    head = head_of(f[:0], y[:0], [])
    assert torch.equal(head.scores(f), torch.full((N, 5), -torch.inf).double())
    head.observe(f, y, ids)
    scores = head.scores(f)
    assert torch.isfinite(scores[:, :4]).all() and (scores[:, 4] == -torch.inf).all()
    assert float((scores.argmax(1) == y).double().mean()) > 0.8


def test_subtracting_a_task_is_never_having_seen_it():
    f, y, ids = samples()
    mine = y != 2
    without = head_of(f[mine], y[mine], [ids[i] for i in mine.nonzero()])
    task = head_of(f[~mine], y[~mine], [ids[i] for i in (~mine).nonzero()])
    head = head_of(f, y, ids)
    head.subtract(task.state())
    assert all(torch.equal(head.state()[k], v) for k, v in without.state().items())
    assert torch.equal(head.scores(f), without.scores(f))
    with pytest.raises(HeadError, match="not seen"):
        head.subtract(task.state())


# Choosing lambda


def test_few_samples_fall_back_to_the_scale_of_the_features():
    f, y, ids = samples(n=12)
    head = head_of(f, y, ids)
    mean = float(expanded(head, f).square().sum(1).mean())
    assert head.statistics["counts"][1].sum() < 10
    assert abs(math.log10(head.fit()[2]) - math.log10(0.1 * mean)) <= 0.125 + 1e-9
    assert torch.isfinite(head.scores(f)[:, y.unique()]).all()


def test_where_all_lambdas_tie_the_fall_back_is_used_and_zeros_give_no_nan():
    head = head_of(torch.zeros(N, WIDTH), torch.zeros(N, dtype=torch.long), [str(i) for i in range(N)])
    assert head.fit()[2] == GRID[0]
    assert torch.equal(head.scores(torch.ones(1, WIDTH))[:, 0], torch.zeros(1).double())
    orthogonal = torch.stack([torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 4.0]))]).double()
    Q = torch.stack([torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [2.0]])]).double()
    assert choose_penalty(orthogonal, Q, [20, 20]) == pytest.approx(10**-1.75)  # nearest to 0.1 * 8 / 40


def test_of_equal_lambdas_the_largest():
    G = torch.full((2, 1, 1), 1e12).double()
    Q = G * 0.5
    errors = holdout_errors(G, Q, 20, GRID)
    chosen = choose_penalty(G, Q, [20, 20])
    assert chosen > GRID[0]
    assert float(errors[GRID.index(chosen)] - errors.min()) <= 1e-9


def test_fewer_samples_than_features_and_a_tiny_lambda_stay_finite():
    f, y, ids = samples(n=15)
    head = head_of(f, y, ids, features=200, regularisation=1e-8)
    _, Theta, _ = head.fit()
    assert torch.isfinite(Theta).all()
    H, Y = expanded(head, f), torch.eye(5, dtype=torch.float64)[y]
    assert float((head.scores(f)[:, y.unique()] - Y[:, y.unique()]).abs().max()) < 1e-4  # interpolates
    G = H.T @ H
    drowned = solve(G, H.T @ Y, 1e-30)  # smaller than rounding: the least-norm solution, by the spectrum
    assert relative(drowned, torch.linalg.pinv(H, rtol=1e-10) @ Y) < 1e-4


def test_a_fit_is_computed_once_until_something_changes(monkeypatch):
    f, y, ids = samples()
    fits = []
    monkeypatch.setattr(module, "solve", lambda *a: fits.append(1) or solve(*a))
    head = head_of(f, y, ids)
    for _ in range(3):
        head.scores(f)
    head.guarantee()
    assert len(fits) == 1
    head.observe(f[:5], y[:5], ids[:5])
    head.scores(f)
    assert len(fits) == 2


# The fixed grid


def test_refuses_more_samples_than_exact_sums_allow_and_changes_nothing():
    f, y, ids = samples()
    head = head_of(f[:31], y[:31], ids[:31], bits=24)
    before = head.state()
    with pytest.raises(HeadError, match="32 samples of 24 bits.*fewer `bits`"):
        head.observe(f[:1], y[:1], ids[:1])
    assert all(torch.equal(head.state()[k], v) for k, v in before.items())
    with pytest.raises(HeadError, match="62 samples"):
        head.add(before)


def test_sums_are_exact_up_to_the_last_sample_that_is_allowed():
    f = torch.full((31, WIDTH), 1e6)  # every entry clipped to the top of the grid
    head = head_of(f, torch.zeros(31, dtype=torch.long), [str(i) for i in range(31)], bits=24, features=0)
    assert int(head.statistics["gram"].sum(0)[0, 0]) == 31 * (2**24 - 1) ** 2
    assert {m.name: m.holds for m in head.guarantee()}["clipped entries"] is False


def test_too_small_features_break_the_promise():
    f, y, ids = samples()
    assert {m.name: m.holds for m in head_of(f * 1e-4, y, ids).guarantee()}["rounding of random features"] is False


@pytest.mark.parametrize("share", [0.05, 0.2, 0.7])
def test_the_holdout_has_its_share_and_depends_on_the_id_alone(share):
    chosen = [in_holdout(f"id {i}", share) for i in range(2000)]
    assert abs(sum(chosen) / 2000 - share) < 5 * math.sqrt(share * (1 - share) / 2000)
    assert chosen[::-1] == [in_holdout(f"id {i}", share) for i in reversed(range(2000))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": -1}, "features"),
        ({"regularisation": 0.0}, "positive"),
        ({"holdout": 1.0}, "share"),
        ({"bits": 30}, "8 to 24"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        RidgeHead(**settings)


@pytest.mark.parametrize(
    ("settings", "seed", "message"),
    [
        ({}, 4, "expected random features of seed 4, found seed 3"),
        ({"bits": 16}, 3, "bits 16, found bits 17"),
        ({"features": 21}, 3, r"`gram` of shape \(2, 231\), found \(2, 210\)"),
        ({"regularisation": 1.0}, 3, r"`gram` of shape \(1, 210\), found \(2, 210\)"),
    ],
)
def test_a_checkpoint_of_other_random_features_is_refused(settings, seed, message):
    state = head_of(*samples()).state()
    head = RidgeHead(**{"features": 20, **settings})
    head.open(WIDTH, LABELS, seed=seed)
    with pytest.raises(HeadError, match=message):
        head.load_state(state)
