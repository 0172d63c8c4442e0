from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules.bases import basis, soft_bound, soft_projector, squared_norm
from perpetune.rules.second_moments import SecondMoment, tokens
from perpetune.rules.sketches import FrequentDirections, restore

KINDS = {"exact": lambda d: SecondMoment(d), "sketch": lambda d: FrequentDirections(d, max(1, d // 3))}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def make(request):
    return request.param


def inputs(rows: int, d: int, seed: int = 0, decay: float = 1.0) -> torch.Tensor:
    """Tokens (rows x d) whose second moment has a spectrum of about 1 / i^decay, in a random frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** (-decay / 2)
    return torch.randn(rows, d, generator=generator, dtype=torch.float64) * scale @ frame


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def harmonic(d: int) -> torch.Tensor:
    return torch.diag(1 / torch.arange(1, d + 1, dtype=torch.float64))


# ---- the equations ----


def test_second_moment_is_that_of_all_tokens():
    X, mask = inputs(60, 5).view(4, 15, 5), torch.rand(4, 15, generator=torch.Generator().manual_seed(0)) > 0.3
    moment = SecondMoment(5)
    assert moment.add(X, mask) == int(mask.sum())
    expected = sum(torch.outer(x, x) for x, m in zip(X.view(-1, 5), mask.view(-1), strict=True) if m)
    torch.testing.assert_close(moment.C, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moment.total, tokens(X, mask).square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("energy", "k"), [(0.9, 373), (0.99, 715), (0.999, 763)])
def test_energy_counts_sigma_squared(energy, k):
    """Check 6: spectrum 1 / i, d = 768; an energy of sigma^4 would give 5, 55, 339."""
    M = basis(harmonic(768), energy)
    assert M.shape == (768, k)
    values = harmonic(768).diag()
    assert values[:k].sum() >= energy * values.sum() > values[: k - 1].sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 48, 80])
def test_energy_one_is_the_rank(rank, dtype):
    moment = SecondMoment(96, dtype)
    moment.add((randn(rank, 96) * 10 ** torch.linspace(0, -1, rank).unsqueeze(1).double()).to(dtype))
    assert moment.basis(1.0).shape[1] == rank
    assert moment.basis(1.0, cap=20).shape[1] == min(rank, 20)


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 20), rows=st.integers(1, 60), seed=st.integers(0, 999), energy=st.floats(0.05, 1.0))
def test_basis_holds_the_energy_with_the_fewest_columns(d, rows, seed, energy):
    moment = SecondMoment(d)
    moment.add(inputs(rows, d, seed))
    M = moment.basis(energy)
    k = M.shape[1]
    torch.testing.assert_close(M.mT @ M, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    assert moment.residual(M) <= 1 - energy + 1e-9
    if energy < 1 and k > 1:
        assert moment.residual(M[:, :-1]) > 1 - energy - 1e-9


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(2, 16), rows=st.integers(1, 40), out=st.integers(1, 6), seed=st.integers(0, 999),
    energy=st.sampled_from([0.5, 0.9, 0.99, 1.0]), sketch=st.booleans(),
)  # fmt: skip
def test_no_projected_change_passes_the_bound(d, rows, out, seed, energy, sketch):
    """sum_old |dW x|^2 <= ||dW||_2^2 (1 - kept) sum_old |x|^2 where dW M = 0, for the tokens themselves."""
    X = inputs(rows, d, seed)
    memory = FrequentDirections(d, 1 + d // 3) if sketch else SecondMoment(d)
    memory.add(X)
    M = memory.basis(energy)
    D = randn(out, d, seed=seed)
    rounding = 1e-13 * d * X.square().sum() * D.square().sum()
    D = D - D @ M @ M.mT
    drift = (X @ D.mT).square().sum()
    assert drift <= memory.drift(D) + rounding
    assert memory.drift(D) <= memory.bound(D, M) + rounding
    if not sketch:
        torch.testing.assert_close(memory.drift(D), drift, rtol=1e-9, atol=float(rounding))
        share = torch.linalg.matrix_norm(D, 2).square() * memory.residual(M) * X.square().sum()
        torch.testing.assert_close(memory.bound(D, M), share, rtol=1e-6, atol=float(rounding))


def test_the_bound_is_nothing_without_a_projection():
    X = inputs(50, 8)
    memory = SecondMoment(8)
    memory.add(X)
    assert memory.drift(randn(3, 8)) > 2 * memory.bound(randn(3, 8), memory.basis(0.99))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_squared_norm(n, d, seed):
    D = randn(n, d, seed=seed)
    torch.testing.assert_close(squared_norm(D), torch.linalg.matrix_norm(D, 2).square(), rtol=1e-10, atol=1e-12)


def test_squared_norm_of_large_matrices_is_an_upper_bound(monkeypatch):
    monkeypatch.setattr("perpetune.rules.bases.LARGEST_SPECTRUM", 3)
    D = randn(4, 6)
    assert squared_norm(D) >= torch.linalg.matrix_norm(D, 2).square()


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), tasks=st.integers(1, 30), tau=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_soft_projector_keeps_its_bound_for_any_number_of_tasks(d, tasks, tau, seed):
    """S = (I + C / tau)^-1 and sum_old |D S x|^2 <= (tau / 4) ||D||_F^2."""
    X = torch.cat([inputs(7, d, seed + task) for task in range(tasks)])
    C, D = X.mT @ X, randn(3, d, seed=seed)
    S = soft_projector(C, tau)
    torch.testing.assert_close(S @ (torch.eye(d, dtype=torch.float64) + C / tau), torch.eye(d, dtype=torch.float64))
    assert (X @ (D @ S).mT).square().sum() <= soft_bound(D, tau) * (1 + 1e-9)


def test_soft_bound_is_reached():
    D = torch.ones(1, 1, dtype=torch.float64)
    moved = (D @ soft_projector(torch.full((1, 1), 3.0, dtype=torch.float64), 3.0)).square() * 3.0
    torch.testing.assert_close(moved.sum(), soft_bound(D, 3.0))


# ---- the traps ----


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), parts=st.integers(1, 9))
def test_order_and_batches_do_not_matter(seed, parts):
    """Check 7: features are projected, not samples: shuffling or splitting leaves span(M) where it is."""
    X = inputs(64, 24, seed, decay=3)
    shuffled = X[torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
    whole, split = SecondMoment(24), SecondMoment(24)
    whole.add(X)
    for part in shuffled.chunk(parts):
        split.add(part)
    M, N = whole.basis(0.9), split.basis(0.9)
    torch.testing.assert_close(M @ M.mT, N @ N.mT, rtol=0, atol=1e-9)
    assert (X @ N).square().sum() >= 0.9 * X.square().sum()


def test_it_is_uncentred():
    """Check 8: with a dominant mean, the mean lies inside span(M)."""
    X = inputs(500, 192, decay=0.5) + 0.5 * randn(192, seed=1)
    moment = SecondMoment(192)
    moment.add(X)
    M = moment.basis(0.9)
    mean = X.mean(0)
    assert M.shape[1] < 150
    assert (mean @ M).norm() / mean.norm() > 0.999
    centred = basis((X - mean).mT @ (X - mean), 0.9, cap=M.shape[1])
    assert (mean @ centred).square().sum() / mean.square().sum() < 0.9


def test_padding_leaves_no_trace(make):
    X = inputs(40, 9).view(4, 10, 9)
    mask = torch.arange(10) < torch.tensor([[10], [3], [7], [1]])
    masked, plain = make(9), make(9)
    masked.add(torch.where(mask.unsqueeze(-1), X, 1e6), mask.long())
    plain.add(X[mask])
    assert all(torch.equal(a, b) for a, b in zip(masked.state().values(), plain.state().values(), strict=True))


def test_tasks_count_alike_whatever_their_size(make):
    long, short, memory = make(12), make(12), make(12)
    long.add(100 * inputs(900, 12, 0, decay=4))
    short.add(inputs(9, 12, 1, decay=4))
    memory.merge(long.unit())
    memory.merge(short.unit())
    assert math.isclose(memory.total, 2.0, rel_tol=1e-12)
    X = inputs(9, 12, 1, decay=4)
    M = memory.basis(0.95)
    assert (X @ M).square().sum() / X.square().sum() > 0.9 - 2 * float(memory.Delta)


def test_unit_of_nothing_is_nothing(make):
    memory = make(4)
    assert memory.add(torch.zeros(3, 4)) == 3
    unit = memory.unit()
    assert unit.total == 0 and unit.basis(1.0).shape == (4, 0) and unit.basis(0.5).shape == (4, 0)
    assert unit.residual(unit.basis(0.5)) == 0


def test_refusals(make):
    memory = make(4)
    with pytest.raises(RuleError, match="another layer"):
        memory.add(torch.zeros(3, 5))
    memory.add(torch.full((1, 4), math.nan))
    with pytest.raises(RuleError, match="not finite"):
        memory.unit()
    for energy in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="energy"):
            make(4).basis(energy)
    with pytest.raises(ConfigError, match="cap"):
        make(4).basis(0.5, 0)
    with pytest.raises(ConfigError, match="tau"):
        soft_projector(torch.eye(2), 0)
    with pytest.raises(ConfigError, match="row"):
        FrequentDirections(4, 0)
    with pytest.raises(RuleError, match="stored"):
        restore({"A": torch.zeros(2)})


def test_state_is_restored_to_the_bit_and_goes_on(make):
    straight = make(12)
    for seed in range(2):
        straight.add(inputs(40, 12, seed))
        resumed = restore(load(save(straight.state())))
        for memory in (straight, resumed):
            other = make(12)
            other.add(inputs(30, 12, seed + 9))
            memory.merge(other.unit())
            memory.add(inputs(10, 12, seed + 99))
        assert all(torch.equal(straight.state()[key], value) for key, value in resumed.state().items())
        assert torch.equal(straight.basis(0.9), resumed.basis(0.9))


# ---- Frequent Directions ----


def excess(C: torch.Tensor, sketch: FrequentDirections) -> torch.Tensor:
    """Eigenvalues of C - B^T B: between 0 and Delta."""
    return torch.linalg.eigvalsh(C - sketch.B.mT @ sketch.B)


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 16), rows=st.integers(1, 12), seed=st.integers(0, 999), parts=st.integers(1, 6))
def test_sketch_certificate_after_every_update(d, rows, seed, parts):
    """Check 10: 0 <= C - B^T B <= Delta I, Delta <= ||X - X_k||_F^2 / (l - k) for all k < l; protecting B bounds dW."""
    sketch, seen = FrequentDirections(d, rows), torch.zeros(0, d, dtype=torch.float64)
    for part in inputs(50, d, seed).chunk(parts):
        sketch.add(part)
        seen = torch.cat([seen, part])
        values, slack = excess(seen.mT @ seen, sketch), 1e-12 * d * float(sketch.total)
        assert values[-1] <= sketch.Delta + slack and values[0] >= -slack
        assert len(sketch.B) <= 2 * rows
        torch.testing.assert_close(sketch.total, seen.square().sum(), rtol=1e-12, atol=0)
    sigma = torch.linalg.eigvalsh(seen.mT @ seen).flip(0).clamp_min(0)
    assert all(sketch.Delta <= sigma[k:].sum() / (rows - k) + slack for k in range(min(rows, d)))
    D, M = randn(3, d, seed=seed), sketch.basis(1.0)
    slack *= float(D.square().sum())
    D = D - D @ M @ M.mT
    assert (seen @ D.mT).square().sum() <= sketch.Delta * D.square().sum() + slack


@settings(max_examples=30, deadline=None)
@given(d=st.integers(2, 12), rows=st.integers(1, 8), seed=st.integers(0, 999))
def test_merged_sketches_keep_the_certificate(d, rows, seed):
    X, Y = inputs(40, d, seed), inputs(25, d, seed + 1)
    a, b = FrequentDirections(d, rows), FrequentDirections(d, rows)
    a.add(X)
    b.add(Y)
    before = a.Delta + b.Delta
    a.merge(b)
    values, slack = excess(X.mT @ X + Y.mT @ Y, a), 1e-11 * float(a.total)
    assert before <= a.Delta and values[-1] <= a.Delta + slack and values[0] >= -slack
    assert len(a.B) <= rows


def test_a_sketch_that_is_large_enough_is_exact():
    X = inputs(30, 5) @ randn(5, 40)  # rank 5
    sketch, moment = FrequentDirections(40, 6), SecondMoment(40)
    for part in X.split(4):
        sketch.add(part)
        moment.add(part)
    assert sketch.Delta < 1e-12 * sketch.total
    torch.testing.assert_close(sketch.B.mT @ sketch.B, moment.C, rtol=1e-9, atol=1e-9)
    M, N = sketch.basis(0.99), moment.basis(0.99)
    torch.testing.assert_close(M @ M.mT, N @ N.mT, rtol=0, atol=1e-8)


# ---- many tasks ----


def test_a_thousand_tasks_in_the_memory_of_ten(make):
    """Size of what is kept, and the bound: never passed by the mean drift over all tasks seen."""
    d, memory, sizes = 12, make(12), {}
    weighted = torch.zeros(d, d, dtype=torch.float64)  # the truth that the sketch must bound
    for task in range(1, 1001):
        X = inputs(5, d, task % 50, decay=3)
        own = make(d)
        own.add(X)
        memory.merge(own.unit())
        weighted += X.mT @ X / X.square().sum()
        if task in (10, 100, 1000):
            sizes[task] = sum(t.numel() for t in memory.state().values())
            M = memory.basis(0.8)
            D = randn(4, d, seed=task)
            D = D - D @ M @ M.mT
            drift = ((D @ weighted) * D).sum()
            assert 0 < drift <= memory.drift(D) * (1 + 1e-9) <= memory.bound(D, M) * (1 + 2e-9)
    assert len(set(sizes.values())) == 1
