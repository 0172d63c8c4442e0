from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perpetune.core.errors import ConfigError
from perpetune.metrics.energy import hyperspherical_energy, relative_energy_change, row_norm_change


def weight(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(weight(width, width, seed)).Q


def naive(W: Tensor) -> float:
    """The sum as it is printed, term by term."""
    u = W / W.norm(dim=1, keepdim=True)
    return math.fsum(1 / (u[i] - u[j]).norm().item() for i, j in itertools.permutations(range(len(u)), 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 24), st.integers(3, 40), st.integers(0, 999), st.integers(1, 200))
def test_energy_is_its_equation_in_any_chunks(rows, width, seed, chunk):
    W = weight(rows, width, seed)
    assert hyperspherical_energy(W, chunk=chunk) == pytest.approx(naive(W), rel=1e-9)


def test_two_rows_by_hand():
    """At right angles: 1 / sqrt 2 each way."""
    assert hyperspherical_energy(torch.tensor([[3.0, 0.0], [0.0, 0.1]])) == pytest.approx(math.sqrt(2), rel=1e-15)


def test_chunks_do_not_matter():
    W = weight(300, 64)
    whole = hyperspherical_energy(W, chunk=300 * 300)
    for chunk in (1, 1000, 7777):
        assert hyperspherical_energy(W, chunk=chunk) == pytest.approx(whole, rel=1e-14)
        assert hyperspherical_energy(W, gram=torch.float32, chunk=chunk) == pytest.approx(whole, rel=1e-9)


def test_no_more_than_a_chunk_of_the_products_is_made(monkeypatch):
    made: list[int] = []
    plain = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda x, y: made.append((out := plain(x, y)).numel()) or out)
    hyperspherical_energy(weight(100, 8), chunk=1000)
    assert max(made) == 1000 and sum(made) == 5500  # ten rows a time, from the diagonal on


def test_a_rotation_of_the_inputs_changes_neither_figure():
    W = weight(256, 96)
    turned = W @ rotation(96).T
    assert abs(relative_energy_change(turned, W)) < 1e-14
    assert abs(relative_energy_change(turned, W, gram=torch.float32)) < 1e-9
    assert row_norm_change(turned, W) < 1e-14


def test_lengths_of_rows_count_in_one_of_them_only():
    W = weight(256, 96)
    D = torch.linspace(0.5, 2, 256, dtype=torch.float64).unsqueeze(1)
    assert abs(relative_energy_change(D * W, W)) < 1e-14
    assert abs(relative_energy_change(D * W, W, gram=torch.float32)) < 1e-9
    assert row_norm_change(D * W, W) == pytest.approx(1)


def test_other_weights_have_another_energy():
    pulled = weight(256, 96) + 1.0  # all towards one direction
    assert relative_energy_change(pulled, weight(256, 96)) > 0.1


@pytest.mark.parametrize(
    ("std", "energy", "norms"), [(0.01, 2e-9, 1e-5), (0.03, 3e-7, 1e-3), (0.06, 6e-6, 0.015), (0.1, 1.3e-4, 0.17)]
)
def test_energy_alone_does_not_see_a_loss_of_orthogonality(std, energy, norms):
    """Check 5 of the sheet: five Neumann terms, blocks of 32, elements of Q of that size."""
    from peft.tuners.oft.layer import OFTRotationModule

    blocks = OFTRotationModule(24, 496, 32, 768, use_cayley_neumann=True).double()
    blocks.weight.data = std * weight(24, 496)
    W = weight(768, 768, 2)
    R = blocks.get_weight().detach()
    changed = abs(relative_energy_change(W @ R.T, W))
    assert energy / 10 < changed < energy * 10
    assert norms / 10 < row_norm_change(W @ R.T, W) < norms * 10
    assert changed < 0.01 * row_norm_change(W @ R.T, W)


@pytest.mark.parametrize("gram", [torch.float32, torch.float64])
def test_rows_that_coincide_and_rows_of_zero(gram):
    W = weight(40, 768)
    alone = hyperspherical_energy(W, gram=gram)
    doubled = hyperspherical_energy(torch.cat([W, 3 * W]), gram=gram)
    assert doubled == pytest.approx(4 * alone + 2 * 40 * 500, rel=1e-9)
    empty = torch.cat([W, torch.zeros(3, 768)])
    assert hyperspherical_energy(empty, gram=gram) == alone
    R = rotation(768)
    for V in (empty, torch.cat([W, W])):
        assert abs(relative_energy_change(V @ R.T, V, gram=gram)) < 1e-9
        assert row_norm_change(V @ R.T, V) < 1e-14


def test_weights_without_a_pair_of_directions():
    nothing, one = torch.zeros(3, 4), torch.eye(3, 4)[:1]
    assert hyperspherical_energy(nothing) == hyperspherical_energy(one) == 0.0
    assert relative_energy_change(nothing, nothing) == relative_energy_change(2 * one, one) == 0.0
    assert row_norm_change(nothing, nothing) == row_norm_change(torch.empty(0, 4), torch.empty(0, 4)) == 0.0
    assert row_norm_change(torch.eye(3, 4), nothing) == relative_energy_change(torch.eye(3, 4), nothing) == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_fp64(dtype):
    W = weight(64, 32).to(dtype)
    assert hyperspherical_energy(W) == hyperspherical_energy(W.double())
    assert row_norm_change(W, W) == 0.0


def test_shapes_that_are_no_two_states_of_one_weight():
    with pytest.raises(ConfigError, match="matrix"):
        hyperspherical_energy(torch.ones(3))
    for change in (relative_energy_change, row_norm_change):
        with pytest.raises(ConfigError, match="one shape"):
            change(torch.ones(3, 2), torch.ones(2, 2))
