from __future__ import annotations

import math

import pytest

from benchmarks import delta_storage


@pytest.fixture(scope="module")
def disk() -> dict[str, dict]:
    return {record["name"]: record for record in delta_storage.disk(8_000_000)}


@pytest.mark.parametrize("storage", delta_storage.STORAGES)
def test_a_delta_takes_no_more_disk_than_promised(storage, disk):
    record = disk[f"delta in {storage}"]
    assert 0.9 * record["at_most"] < record["share"] <= record["at_most"]


@pytest.mark.parametrize("size", delta_storage.SIZES)
def test_weekly_merges_in_half_precision_lose_what_one_merge_keeps(size):
    found = delta_storage.weekly(size, side=128)
    # one rounding of W to 8 bits: an error uniform over 2^-8 .. 2^-9 of |W|, against updates of size * sqrt(weeks)
    rounding = 2**-9 / math.sqrt(3) * 1.5 / (size * math.sqrt(delta_storage.WEEKS))
    assert 0.5 * rounding < found["once"] < 2 * rounding
    assert found["weekly"] > 1.5 * found["once"]
