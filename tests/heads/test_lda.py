import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import ClosedFormHead, KLDAHead, LDAHead, RidgeHead
from perpetune.heads.feature_maps import FeatureMap
from perpetune.heads.holdout import TEMPERATURES, HoldoutMoments
from perpetune.heads.moments import in_holdout, shard
from tests.heads.points import LABELS, WIDTH, N, head_of, opened, samples

KINDS = ["raw", "normalised", "relu", "relu_normalised", "kernel", "kernel_normalised", "gelu", "gelu_normalised"]


def mapped(head, f):
    return head.expand(f.double())[0] * head.unit


@pytest.mark.parametrize("settings", [{}, {"map": "relu_normalised"}, {"map": "kernel"}])
def test_scores_are_discriminant_analysis_with_equal_priors(settings):
    """Against scikit-learn, up to a constant of each sample. Its covariance is divided by n, ours by n - C."""
    f, y, ids = samples()
    head = head_of(f, y, ids, shrinkage=0.3, batch=7, **settings)
    h = mapped(head, f)
    centred = torch.cat([h[y == c] - h[y == c].mean(0) for c in range(4)])
    S = centred.T @ centred / (N - 4)
    S = 0.7 * S + 0.3 * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
    means = torch.stack([h[y == c].mean(0) for c in range(4)])
    direct = -0.5 * torch.stack([((h - m) * torch.linalg.solve(S, (h - m).T).T).sum(1) for m in means], 1)
    ours = head.scores(f)[:, :4]
    difference = ours - direct
    assert float((difference - difference[:, :1]).abs().max() / direct.abs().max()) < 1e-11
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3, priors=[0.25] * 4).fit(h.numpy(), y.numpy())
    assert (theirs.predict(h.numpy()) == ours.argmax(1).numpy()).mean() > 0.97


@given(order=st.permutations([0, 1, 2, 3]), batch=st.integers(1, 60), seed=st.integers(0, 10**6))
@settings(max_examples=4, deadline=None)
@pytest.mark.parametrize("kind", [LDAHead, KLDAHead, ClosedFormHead])
def test_same_bits_under_any_order_of_tasks_labels_samples_and_any_batch_size(kind, order, batch, seed):
    f, y, ids = samples()
    plain = head_of(f, y, ids, kind)
    labels = [LABELS[c] for c in order] + ["eel"]
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    index = torch.cat([shuffled[y[shuffled] == c] for c in order])
    renamed = torch.tensor([labels.index(LABELS[c]) for c in range(4)])[y]
    other = head_of(f[index], renamed[index], [ids[i] for i in index], kind, labels, batch)
    assert torch.equal(plain.fit()[1], other.fit()[1]) and plain.fit()[2] == other.fit()[2]
    scores = torch.cat([other.scores(part) for part in f.split(batch)])
    assert torch.equal(plain.scores(f), scores[:, [labels.index(label) for label in LABELS]])


@pytest.mark.parametrize("kind", [LDAHead, ClosedFormHead])
def test_subtracting_is_never_having_seen_and_adding_is_having_seen(kind):
    f, y, ids = samples()
    mine = (y != 2).nonzero().flatten()
    rest = (y == 2).nonzero().flatten()
    without = head_of(f[mine], y[mine], [ids[i] for i in mine], kind)
    task = head_of(f[rest], y[rest], [ids[i] for i in rest], kind)
    head = head_of(f, y, ids, kind)
    whole = head.state()
    head.subtract(task.state())
    assert all(torch.equal(head.state()[k], v) for k, v in without.state().items())
    assert torch.equal(head.scores(f), without.scores(f))
    head.add(task.state())
    assert all(torch.equal(head.state()[k], v) for k, v in whole.items())
    with pytest.raises(HeadError, match="not seen"):
        without.subtract(task.state())


def test_the_chosen_shrinkage_has_the_best_expected_accuracy_and_the_fit_is_on_both_folds():
    f, y, ids = samples(noise=2.0)
    head = head_of(f, y, ids)
    a = head.fit()[2]
    assert 0 < a <= 1
    given = head_of(f, y, ids, shrinkage=a)
    assert torch.allclose(head.fit()[1], given.fit()[1], rtol=1e-12)


def test_few_samples_and_single_ones_give_finite_scores():
    f, y, ids = samples(4)
    scores = head_of(f, torch.arange(4), ids).scores(f)
    assert torch.isfinite(scores[:, :4]).all() and (scores[:, 4] == -torch.inf).all()
    assert torch.equal(opened().scores(f), torch.full((4, 5), -torch.inf).double())


# Hold-out


def test_expected_accuracy_is_the_accuracy_on_many_samples_of_these_gaussians():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(4, WIDTH, generator=g, dtype=torch.float64)
    spread = torch.tensor([0.3, 0.6, 1.0, 1.5], dtype=torch.float64)  # classes differ: a pooled covariance would not do
    y = torch.arange(4).repeat(3000)
    h = means[y] + spread[y, None] * torch.randn(len(y), WIDTH, generator=g, dtype=torch.float64)
    Theta, offset = means.T.contiguous(), -0.5 * means.square().sum(1)
    true = float(((h @ Theta + offset).argmax(1) == y).double().mean())
    Y, part = torch.eye(4, dtype=torch.float64)[y], torch.tensor([shard(str(i), 64) for i in range(len(y))])
    sums = torch.zeros(4 * 64, WIDTH, dtype=torch.float64).index_add_(0, y * 64 + part, h).reshape(4, 64, WIDTH)
    counts = torch.bincount(y * 64 + part, minlength=256).reshape(4, 64)
    moments = HoldoutMoments(h.T @ h, h.T @ Y, Y.sum(0), sums, counts)
    (expected,) = moments.accuracies([(Theta, offset)])
    assert abs(expected - true) < 0.015
    (pooled,) = HoldoutMoments(h.T @ h, h.T @ Y, Y.sum(0)).accuracies([(Theta, offset)])
    assert abs(pooled - true) > abs(expected - true)


def test_shards_are_sums_of_the_hold_out_alone():
    f, y, ids = samples()
    head = head_of(f, y, ids, shards=4)
    held = torch.tensor([in_holdout(i, 0.2) for i in ids])
    assert int(head.statistics["shard_counts"].sum()) == int(held.sum())
    assert torch.equal(head.statistics["shards"].sum(1), head.statistics["cross"][1])


def test_a_flatter_posterior_is_found_where_scores_are_too_sure():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat(500)
    means = torch.randn(4, WIDTH, generator=g, dtype=torch.float64)
    h = means[y] + torch.randn(len(y), WIDTH, generator=g, dtype=torch.float64)
    Y = torch.eye(4, dtype=torch.float64)[y]
    moments = HoldoutMoments(h.T @ h, h.T @ Y, Y.sum(0))
    true = means.T.contiguous(), -0.5 * means.square().sum(1)
    assert 0.7 < moments.temperature(true) < 1.5
    assert 3.5 < moments.temperature((5 * true[0], 5 * true[1])) < 7
    for scale in (1e-3, 0.05, 0.3, 2.0, 20.0, 1e3):  # the least of the whole grid, at its ends, too
        linear = scale * true[0], scale * true[1]
        assert moments.temperature(linear) == float(TEMPERATURES[moments.log_losses(linear).argmin()])


# Choosing


def test_the_choice_is_the_candidate_with_the_best_expected_accuracy():
    f, y, ids = samples(400)
    ring = (1 + y[:, None]) * torch.ones(WIDTH) + 0.2 * (f - f.mean(0))  # classes differ in length alone
    head = head_of(ring, y, ids, ClosedFormHead, kinds=["raw", "normalised"])
    found = list(head._candidates())
    assert {(c.prefix, c.method) for c in found} == {(p, m) for p in ("raw.", "normalised.") for m in ("lda", "ridge")}
    assert head.choice().accuracy >= max(c.accuracy for c in found) - 1e-3
    assert head.choice().prefix == "raw."  # directions alone do not tell lengths
    seen, Theta, strength = head.fit()
    alone = head_of(ring, y, ids, map="raw", features=1, shrinkage=strength)
    if head.choice().method == "lda":
        assert torch.allclose(Theta, alone.fit()[1], rtol=1e-9)


def test_the_first_features_are_those_of_a_narrower_map():
    f, _, _ = samples()
    for kind in KINDS[2:]:
        wide, narrow = (FeatureMap(kind, WIDTH, m, seed=3) for m in (16, 6))
        assert torch.equal(wide.steps(f.double())[0][:, :6], narrow.steps(f.double())[0])


def test_memory_is_stated_and_kept():
    head = opened(ClosedFormHead, features=None, memory=40.0)
    assert head.maps["relu_normalised."].size == 1024  # two random maps of 2 * 8 * 1,024^2 bytes, not of 2,048^2
    sums = {m.name: m for m in head.guarantee()}["sums"]
    assert sums.holds and sums.bound == 40
    with pytest.raises(ConfigError, match="memory"):
        opened(ClosedFormHead, features=2048, memory=40.0)


def test_settings_out_of_range_are_refused():
    for wrong in ({"map": "rely"}, {"map": "relu", "features": 0}, {"shrinkage": 0}, {"shards": -1}, {"holdout": 1}):
        with pytest.raises(ConfigError):
            LDAHead(**wrong)
    for wrong in ({"methods": ["svm"]}, {"kinds": []}, {"memory": 0}):
        with pytest.raises(ConfigError):
            ClosedFormHead(**wrong)


# Maps


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_gives_a_sample_the_same_bits_in_any_batch_and_ridge_reads_it(kind):
    f, y, ids = samples()
    feature_map = FeatureMap(kind, WIDTH, 16, seed=3)
    whole, _ = feature_map.steps(f.double())
    assert torch.equal(whole, torch.cat([feature_map.steps(part)[0] for part in f.double().split(3)]))
    assert torch.equal(whole, whole.round())
    head = head_of(f, y, ids, RidgeHead, map=kind)
    assert float((head.scores(f).argmax(1) == y).double().mean()) > 0.6


def test_random_fourier_features_approach_the_gaussian_kernel():
    f = torch.nn.functional.normalize(
        torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)).double(), dim=1
    )
    feature_map = FeatureMap("kernel_normalised", WIDTH, 8192, seed=0, gamma=0.7)
    h = feature_map.steps(3 * f)[0] * feature_map.unit
    kernel = (-0.7 * torch.cdist(f, f).square()).exp()
    assert float((h @ h.T / 8192 - kernel).abs().max()) < 0.06


def test_normalised_maps_ignore_the_length_of_features():
    f, _, _ = samples(5)
    for kind in ("normalised", "relu_normalised", "kernel_normalised"):
        feature_map = FeatureMap(kind, WIDTH, 8, seed=0)
        assert float((feature_map.steps(f.double())[0] - feature_map.steps(4 * f.double())[0]).abs().max()) <= 8
