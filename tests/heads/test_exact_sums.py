import hashlib
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetune.core.errors import HeadError
from perpetune.heads.exact_sums import (
    EXACT_BITS,
    FEATURES,
    FixedPoint,
    check_room,
    exact_matmul,
    gaussian_steps,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_are_the_nearest_point_of_the_grid():
    grid = FixedPoint(bits=8, step=0.25)
    steps, clipped = grid.steps(torch.tensor([0.0, 0.3, -0.3, 63.75, 63.8, -1000.0]))
    assert steps.tolist() == [0, 1, -1, 255, 255, -255]
    assert clipped == 1  # 63.8 rounds to the last point of the grid, -1000 lies outside


@given(seed=st.integers(0, 2**32), pieces=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_sums_of_products_have_the_same_bits_in_any_order_and_partition(seed, pieces):
    x = normal(61, 9, seed=seed % 1000) * 30
    k, _ = FEATURES.steps(x)
    k = (k / 2**10).round()  # 15 bits, so that 2 * bits + log2(61) < 53
    whole = k.T @ k
    order = torch.randperm(61, generator=torch.Generator().manual_seed(seed))
    parts = sum(part.T @ part for part in k[order].chunk(pieces))
    assert torch.equal(whole, parts)


def test_plain_sums_do_depend_on_the_order():
    x = normal(500, 9)
    orders = [torch.randperm(500, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    assert len({tuple((x[o].T @ x[o]).flatten().tolist()) for o in orders}) > 1


@pytest.mark.parametrize(("samples", "fits"), [(2**19 - 1, True), (2**19, False)])
def test_refuses_before_a_bit_is_lost(samples, fits):
    grid = FixedPoint(bits=17, step=1.0)
    top = float(2**17 - 1)
    if fits:
        check_room(grid, samples, 2, "ridge", "")
        assert samples * top * top < 2**EXACT_BITS
    else:
        with pytest.raises(HeadError, match=r"524288 samples of 17 bits.*must stay below 53\); use less"):
            check_room(grid, samples, 2, "ridge", "use less")


@given(seed=st.integers(0, 1000), inner=st.integers(1, 40), scale=st.floats(1e-12, 1e12))
@settings(max_examples=50, deadline=None)
def test_exact_matmul_is_a_product_and_its_rows_do_not_know_each_other(seed, inner, scale):
    a = (normal(7, inner, seed=seed) * 2**14).round().clamp(-(2**17) + 1, 2**17 - 1)
    b = normal(inner, 5, seed=seed + 1) * scale
    product = exact_matmul(a, 17, b)
    error = (product - a @ b).abs().max()
    assert error <= 1e-14 * inner * float(a.abs().max() * b.abs().max())
    assert torch.equal(product, torch.cat([exact_matmul(row[None], 17, b) for row in a]))


def test_exact_matmul_of_nothing():
    assert torch.equal(exact_matmul(torch.ones(2, 3).double(), 17, torch.zeros(3, 4).double()), torch.zeros(2, 4))
    assert exact_matmul(torch.ones(2, 3).double(), 17, torch.zeros(3, 0).double()).shape == (2, 0)


def test_gaussian_is_the_documented_sum_of_raw_words():
    w = gaussian_steps(7, 6, 10)
    raw = numpy.random.Philox(key=numpy.array([7, 0x52504B], dtype=numpy.uint64)).random_raw(180)
    column, row = 4, 3
    words = [int(word) for word in raw[(column * 6 + row) * 3 :][:3]]
    lanes = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    exact = (sum(lanes) - 6 * 65535) / 65536
    assert abs(float(w[row, column]) * 2**-10 - exact) <= 2**-11


def test_gaussian_bits_never_change():
    digest = hashlib.sha256(gaussian_steps(7, 6, 10).to(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()
    assert digest[:16] == "72022e1aeae2b2ef"


def test_gaussian_is_standard_normal_and_grows_by_columns():
    w = gaussian_steps(0, 64, 600) * 2.0**-10
    n = w.numel()
    assert abs(float(w.mean())) < 5 / math.sqrt(n)
    assert abs(float(w.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((w**4).mean()) - 2.9) < 0.2
    assert torch.equal(gaussian_steps(0, 64, 300), gaussian_steps(0, 64, 600)[:, :300])
    assert not torch.equal(gaussian_steps(1, 64, 300), gaussian_steps(0, 64, 300))
