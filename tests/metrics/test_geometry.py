from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perpetune.core.errors import ConfigError
from perpetune.metrics.geometry import (
    GEOMETRY_LABELS,
    Factors,
    average_collision_rate,
    awom,
    collision_rate,
    collision_rate_factors,
    geometry_lines,
    nuclear_norm,
    pooled_collision_rate,
    sparsity,
    subspace_overlap,
)


def factors(d_out: int, d_in: int, r: int, seed: int, scaling: float = 1.0, integers: bool = False) -> Factors:
    g = torch.Generator().manual_seed(seed)
    if integers:  # products are exact, so that chunked and dense can be compared to the bit
        B, A = (torch.randint(-2, 3, s, generator=g).float() for s in ((d_out, r), (r, d_in)))
    else:
        B, A = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((d_out, r), (r, d_in)))
    return Factors(B, A, scaling)


def dense(f: Factors) -> Tensor:
    return f.scaling * (f.B @ f.A)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10_000))


@settings(max_examples=40)
@given(shapes, st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]), st.integers(1, 200))
def test_collision_rate_is_its_equation_dense_and_in_chunks(shape, tolerance, chunk):
    d_out, d_in, r, seed = shape
    f, g = (factors(d_out, d_in, r, seed + k, 0.5, integers=True) for k in (0, 1))
    dW_i, dW_j = dense(f), dense(g)
    count = sum(
        bool(abs(dW_i[a, b]) > tolerance and abs(dW_j[a, b]) > tolerance)
        for a, b in itertools.product(range(d_out), range(d_in))
    )
    assert collision_rate(dW_i, dW_j, tolerance) == count / (d_out * d_in)
    assert collision_rate_factors(f, g, tolerance, chunk=chunk) == count / (d_out * d_in)


@settings(max_examples=40)
@given(shapes, st.integers(2, 5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 200))
def test_average_collision_rate_is_the_mean_over_pairs(shape, T, tolerance, chunk):
    d_out, d_in, r, seed = shape
    updates = [factors(d_out, d_in, r, seed + k, 0.5, integers=True) for k in range(T)]
    pairs = [collision_rate(dense(f), dense(g), tolerance) for f, g in itertools.combinations(updates, 2)]
    expected = pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert average_collision_rate(updates, tolerance, chunk=chunk) == expected
    assert average_collision_rate([dense(f) for f in updates], tolerance) == expected


def test_disjoint_supports_never_collide_and_equal_dense_updates_always_do():
    left, right = torch.zeros(4, 6), torch.zeros(4, 6)
    left[:, :3], right[:, 3:] = 1.0, -1.0
    assert collision_rate(left, right, 0.0) == 0.0
    ones = -torch.ones(4, 6)
    assert collision_rate(ones, ones, 0.0) == average_collision_rate([ones] * 3, 0.5) == 1.0


def test_the_scaling_and_the_tolerance_decide_what_counts():
    f = Factors(torch.ones(3, 1), torch.ones(1, 5), 0.25)
    assert collision_rate_factors(f, f, 0.2) == 1.0
    assert collision_rate_factors(f, f, 0.25) == 0.0  # strictly above


def test_no_more_than_a_chunk_of_an_update_is_made(monkeypatch):
    made: list[int] = []
    plain = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda x, y: made.append((out := plain(x, y)).numel()) or out)
    updates = [factors(64, 32, 2, k) for k in range(3)]
    average_collision_rate(updates, 0.1, chunk=100)
    collision_rate_factors(*updates[:2], 0.1, chunk=100)
    sparsity(updates[0], chunk=100)
    assert made and max(made) == 96  # three rows of 32


def test_pooling_weighs_layers_by_their_size():
    a, b = torch.ones(2, 2), torch.zeros(2, 6)
    assert pooled_collision_rate(iter([[a, a], [b, b]]), 0.0) == pytest.approx(4 / 16)
    assert pooled_collision_rate([], 0.0) is pooled_collision_rate([[a], [b]], 0.0) is None
    with pytest.raises(ConfigError, match="every task"):
        pooled_collision_rate([[a, a], [b, b, b]], 0.0)


def test_a_single_task_has_no_average_collision_rate():
    assert average_collision_rate([torch.ones(2, 2)], 0.0) is None


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan")])
def test_a_tolerance_that_means_nothing_is_refused(tolerance):
    with pytest.raises(ConfigError, match="tolerance must be 0 or more"):
        collision_rate(torch.ones(2, 2), torch.ones(2, 2), tolerance)


def test_shapes_that_would_broadcast_or_have_no_product_are_refused():
    with pytest.raises(ConfigError, match="one shape"):
        collision_rate(torch.ones(2, 2), torch.ones(1, 2), 0.0)
    with pytest.raises(ConfigError, match="have no product"):
        collision_rate_factors((torch.ones(2, 3), torch.ones(2, 4), 1.0), factors(2, 4, 2, 0), 0.0)
    with pytest.raises(ConfigError, match="matrix"):
        sparsity(torch.ones(3))


@settings(max_examples=40)
@given(shapes, st.integers(0, 3))
def test_overlap_is_its_equation_listed_or_concatenated(shape, past):
    _, d_in, r, seed = shape
    A = [factors(1, d_in, r, seed + k).A for k in range(past + 1)]
    *earlier, A_t = A
    squares = [(A_i @ A_t.T).abs().pow(2).sum() for A_i in earlier]
    expected = pytest.approx(float(sum(squares)), rel=1e-12, abs=1e-12)
    assert subspace_overlap(earlier, A_t) == expected
    assert subspace_overlap(torch.cat([torch.empty(0, d_in, dtype=torch.float64), *earlier]), A_t) == expected
    if past:
        assert awom(earlier[0], A_t) ** 2 == pytest.approx(float(squares[0]), rel=1e-10, abs=1e-12)


def test_orthogonal_rows_do_not_overlap_and_the_first_task_has_no_past():
    Q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    assert subspace_overlap([Q[:4], Q[4:8]], Q[8:12]) == pytest.approx(0.0, abs=1e-24)
    assert awom(Q[:4], Q[4:8]) == pytest.approx(0.0, abs=1e-12)
    assert subspace_overlap([], Q[:4]) == subspace_overlap(torch.empty(0, 16), Q[:4]) == 0.0


@settings(max_examples=40)
@given(shapes, st.sampled_from([-2.0, 0.5, 4.0]))
def test_nuclear_norm_through_qr_is_that_of_the_product(shape, scaling):
    """Also where r exceeds d_out or d_in."""
    f = factors(*shape, scaling)
    expected = float(torch.linalg.matrix_norm(dense(f), ord="nuc"))
    assert nuclear_norm(*f) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_nuclear_norm_never_forms_the_product():
    """4 million x 4 million would be 64 TB."""
    B, A = torch.zeros(4_000_000, 1), torch.zeros(1, 4_000_000)
    B[7], A[0, 9] = 3.0, -2.0
    assert nuclear_norm(B, A, 0.5) == pytest.approx(3.0)


def test_nuclear_norm_of_a_half_precision_trained_adapter():
    B, A = torch.ones(8, 2, dtype=torch.bfloat16).requires_grad_(), torch.ones(2, 4, dtype=torch.bfloat16)
    assert nuclear_norm(B, A, 1.0) == pytest.approx(2 * (8 * 4) ** 0.5)


def test_sparsity_counts_exact_zeros_and_what_is_above_a_share_of_the_largest():
    dW = torch.tensor([[0.0, 100.0, -0.5, 2.0], [0.0, -1.0, 1.5, -3.0]])
    found = sparsity(dW)
    assert found.zero_share == 2 / 8 and found.largest == 100.0 and found.relative == 0.01
    assert found.above_share == 4 / 8  # 1.0 is at, not above, 1 %
    assert sparsity(dW, relative=0.5).above_share == 1 / 8
    assert sparsity(torch.zeros(2, 2)) == (1.0, 0.0, 0.0, 0.01)


@settings(max_examples=40)
@given(shapes, st.integers(1, 200))
def test_sparsity_of_factors_is_that_of_the_product(shape, chunk):
    d_out, d_in, r, seed = shape
    f = factors(d_out, d_in, r, seed, 0.5, integers=True)
    assert sparsity(f, relative=0.3, chunk=chunk) == sparsity(dense(f), relative=0.3)


def test_a_dense_low_rank_update_has_no_exact_zeros():
    """Why a collision rate without a tolerance says nothing (sheet, section 4)."""
    f, g = factors(64, 64, 8, 0), factors(64, 64, 8, 1)
    assert sparsity(f).zero_share == 0.0 and collision_rate_factors(f, g, 0.0) == 1.0


def test_every_figure_of_a_run_is_printed_with_what_it_is():
    lines = geometry_lines({**dict.fromkeys(GEOMETRY_LABELS, 0.25), "average_collision_rate": None}, 1e-4)
    assert [line.split()[0] for line in lines] == list(GEOMETRY_LABELS)
    rate, overlap, awom, norm, zero, above = lines
    assert "undefined" in rate and "mean over pairs of tasks, all layers pooled" in rate
    assert "|dW_i[a, b]| > tolerance" in rate and rate.endswith("tolerance 0.0001]")
    assert overlap == (
        "subspace_overlap 0.25: squared overlap of the last task's A with the A of every earlier task, sum over layers "
        "[OO = sum over i < t of ||A_i A_t^T||_F^2, s not included]"
    )
    assert "stacked as A_1" in awom and "mean over tasks and layers" in norm
    assert "last task's update that are exactly 0, mean over layers" in zero and "relative = 0.01" in above
    assert not any("tolerance" in line for line in lines[1:])
