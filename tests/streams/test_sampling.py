from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perpetune.streams.sampling import generator, quotas, shuffled, stratified

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(np.array)


def test_quotas_are_proportional_by_largest_remainder() -> None:
    # exact shares of 10 rows: 5.0, 3.33, 1.67
    np.testing.assert_array_equal(quotas(np.array([30, 20, 10]), 10), [5, 3, 2])


@given(SIZES, st.integers(0, 500))
def test_plain_quotas_add_up_and_round(sizes: np.ndarray, count: int) -> None:
    taken = quotas(sizes, count)
    count = min(count, sizes.sum())
    assert taken.sum() == count
    assert (np.abs(taken - sizes * count / sizes.sum()) < 1).all()


@given(SIZES, st.integers(0, 500), st.integers(0, 3), st.integers(0, 3))
def test_quotas_keep_their_bounds(sizes: np.ndarray, count: int, least: int, spare: int) -> None:
    taken = quotas(sizes, count, least=least, spare=spare)
    most = np.maximum(sizes - spare, 0)
    floor = np.minimum(least, most)
    assert (floor <= taken).all() and (taken <= most).all()
    assert taken.sum() == np.clip(count, floor.sum(), most.sum())


@given(SIZES, st.integers(1, 40), st.integers(0, 5))
def test_stratified_rows_are_distinct_and_meet_the_quotas(sizes: np.ndarray, count: int, seed: int) -> None:
    strata = np.repeat([f"c{i}" for i in range(len(sizes))], sizes)
    rows = stratified(strata, count, seed)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal([(strata[rows] == f"c{i}").sum() for i in range(len(sizes))], quotas(sizes, count))


def test_a_class_is_drawn_independently_of_the_others_and_of_the_count() -> None:
    strata = np.array(["a", "b"] * 50)
    a_rows = np.flatnonzero(strata == "a")
    small, large = stratified(strata, 20, "key"), stratified(strata, 60, "key")
    assert set(small) < set(large)
    renamed = np.where(strata == "b", "zzz", strata)
    np.testing.assert_array_equal(np.intersect1d(small, a_rows), np.intersect1d(stratified(renamed, 20, "key"), a_rows))
    assert set(stratified(strata, 20, "other key")) != set(small)


def test_generators_do_not_confuse_their_keys() -> None:
    assert generator("ab", "c").integers(1 << 60) != generator("a", "bc").integers(1 << 60)
    assert generator(1, "x").integers(1 << 60) == generator(1, "x").integers(1 << 60)


def test_shuffled_keeps_the_items() -> None:
    assert shuffled("abcdefgh", 1) != shuffled("abcdefgh", 2)
    assert sorted(shuffled("abcdefgh", 1)) == list("abcdefgh")
