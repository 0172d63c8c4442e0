from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune.core.errors import ConfigError, DeltaError
from perpetune.deltas.seeded_mask import CHUNK, SeededMask, tensor_id

WORD = 2**64
QUERY = "encoder.layer.0.attention.attention.query.weight"
words = st.integers(0, WORD - 1)


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """One block of Philox4x64-10, written down from its definition."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        P, Q = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (Q // WORD) ^ c1 ^ k0, Q % WORD, (P // WORD) ^ c3 ^ k1, P % WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return [c0, c1, c2, c3]


def lanes(seed: int, task_key: int, tensor: int, chunk: int, count: int) -> list[int]:
    blocks = range(1, 2 + count // 16)
    stream = [word for block in blocks for word in philox((seed, task_key), (block, chunk, tensor, 0))]
    return [word >> shift & 0xFFFF for word in stream for shift in (0, 16, 32, 48)][:count]


@given(words, st.integers(1, WORD - 1), words, st.integers(0, 2**40), st.integers(0, 70), st.integers(1, 65536))
def test_bernoulli_keeps_where_the_lane_is_below_thr(seed, task_key, tensor, chunk, length, Thr):
    mask = SeededMask("bernoulli", seed, task_key, Thr=Thr)
    start = chunk * CHUNK
    expected = [i for i, u in enumerate(lanes(seed, task_key, tensor, chunk, length)) if u < Thr]
    assert mask.positions(tensor, start + length, chunk).tolist() == expected


@given(
    words, st.integers(1, WORD - 1), words, st.integers(0, 2**30), st.integers(0, 90), st.sampled_from([1, 2, 7, 10])
)
def test_stratified_keeps_one_entry_of_every_block(seed, task_key, tensor, chunk, length, B):
    mask = SeededMask("stratified", seed, task_key, B=B)
    start = chunk * (CHUNK // B) * B
    digits = [u * B >> 16 for u in lanes(seed, task_key, tensor, chunk, length // B)]
    expected = [B * b + digit for b, digit in enumerate(digits)]
    assert mask.positions(tensor, start + length, chunk).tolist() == expected


@given(words, st.integers(1, WORD - 1), words, st.sampled_from([1, 2, 7, 10]), st.data())
def test_disjoint_rotates_digits_that_no_task_key_decides(seed, task_key, tensor, B, data):
    slot = data.draw(st.integers(0, B - 1))
    mask = SeededMask("disjoint", seed, task_key, B=B, slot=slot)
    s = [u * B >> 16 for u in lanes(seed, 0, tensor, 0, 6)]
    assert mask.positions(tensor, 6 * B + B - 1, 0).tolist() == [B * b + (d + slot) % B for b, d in enumerate(s)]


def test_vectors_of_the_specification():
    block = [0x7EAAA29487DDC277, 0x16DBDE5AD8A471FA, 0x33292D36C9549012, 0x9EB2806B8A53209E]
    assert philox((0x50A7, 1), (1, 0, 0, 0)) == block
    one, two = (SeededMask("bernoulli", 0x50A7, task, Thr=6554) for task in (1, 2))
    first, second = one.positions(0, 2 * CHUNK, 0), one.positions(0, 2 * CHUNK, 1)
    assert first[:10].tolist() == [7, 18, 29, 33, 35, 37, 43, 51, 53, 62] and len(first) == 26213
    assert second[:10].tolist() == [5, 29, 40, 44, 50, 58, 65, 72, 81, 91] and len(second) == 26128
    other = two.positions(0, CHUNK, 0)
    assert other[:6].tolist() == [4, 14, 18, 25, 60, 62] and len(other) == 26264
    stratified = SeededMask("stratified", 0x50A7, 1, B=10).positions(0, 160, 0) % 10
    assert stratified.tolist() == [7, 5, 6, 4, 4, 8, 8, 0, 5, 7, 1, 1, 1, 5, 5, 6]
    disjoint = SeededMask("disjoint", 0x50A7, 1, B=10, slot=0).positions(0, 160, 0) % 10
    assert disjoint.tolist() == [7, 5, 6, 4, 8, 9, 5, 5, 4, 5, 0, 1, 9, 5, 7, 4]
    assert tensor_id(QUERY) == 0xC2F536ECD3044DAC
    named = SeededMask("bernoulli", 7, 3, Thr=6554).positions(tensor_id(QUERY), CHUNK, 0)
    assert named[:10].tolist() == [6, 7, 23, 44, 50, 63, 80, 102, 114, 126] and len(named) == 26176
    assert one.count(0, 86_000_000) == 8_598_875


@pytest.mark.parametrize("scheme", ["bernoulli", "stratified", "disjoint"])
def test_any_chunk_can_be_had_alone_and_a_short_one_is_a_prefix(scheme):
    mask = SeededMask.of(scheme, 1 / 7, seed=1, task_key=2, slot=3 if scheme == "disjoint" else None)
    size = 2 * CHUNK + 1000
    starts, stops, chunks = zip(*mask.chunks(5, size), strict=True)
    assert starts == (0, mask.chunk, 2 * mask.chunk) and stops == (mask.chunk, 2 * mask.chunk, size)
    assert all(np.array_equal(mask.positions(5, size, i), chunk) for i, chunk in enumerate(chunks))
    whole = np.concatenate([start + chunk for start, chunk in zip(starts, chunks, strict=True)])
    assert np.all(np.diff(whole) > 0) and whole[-1] < size and mask.count(5, size) == len(whole)
    shorter = mask.positions(5, mask.chunk + 777, 1)
    assert np.array_equal(shorter, chunks[1][: len(shorter)]) and chunks[1][len(shorter)] >= 777 - 7
    assert len(mask.positions(5, size, 3)) == 0
    assert list(mask.chunks(5, 0)) == [] and mask.count(5, 0) == 0


def test_a_tensor_shorter_than_a_block_keeps_nothing():
    mask = SeededMask.of("stratified", 0.1, seed=0, task_key=1)
    assert mask.count(0, 9) == 0 and [len(p) for _, _, p in mask.chunks(0, 9)] == [0]
    assert mask.chunk == 262_140


def test_tasks_of_different_slots_hit_every_position_once():
    masks = [SeededMask.of("disjoint", 0.1, seed=9, task_key=100 + t, slot=t) for t in range(10)]
    size = 300_000
    kept = np.concatenate([start + positions for mask in masks for start, _, positions in mask.chunks(4, size)])
    assert np.array_equal(np.sort(kept), np.arange(size))


@pytest.mark.parametrize("scheme", ["bernoulli", "stratified", "disjoint"])
def test_keep_1_keeps_everything(scheme):
    mask = SeededMask.of(scheme, 1, seed=0, task_key=1, slot=0 if scheme == "disjoint" else None)
    assert np.array_equal(mask.positions(3, 1001, 0), np.arange(1001)) and mask.keep == 1


def kept(mask: SeededMask, tensor: int, size: int) -> np.ndarray:
    m = np.zeros(size, dtype=bool)
    for start, _, positions in mask.chunks(tensor, size):
        m[start + positions] = True
    return m


@pytest.mark.parametrize("scheme", ["bernoulli", "stratified"])
def test_density_overlap_and_lags_are_those_of_chance(scheme):
    size = 2_000_000
    q = SeededMask.of(scheme, 0.1, seed=0, task_key=1).keep
    tensors = [tensor_id("a.weight"), tensor_id("b.weight")]
    # also two tensors of equal shape and two seeds: none may share its mask with another
    pairs = [(seed, key, tensor) for seed in (0, 1) for key in (1, 2) for tensor in tensors]
    masks = [kept(SeededMask.of(scheme, 0.1, seed=s, task_key=k), tensor, size) for s, k, tensor in pairs]
    spread = math.sqrt(size * q * (1 - q))
    for m in masks:
        assert abs(m.sum() - size * q) <= (4 * spread if scheme == "bernoulli" else 0)
        for lag in (16, 64, 1024, CHUNK):  # a lane of the next word, block, and chunk
            together = np.count_nonzero(m[lag:] & m[:-lag])
            n = size - lag
            assert abs(together - n * q * q) < 4 * math.sqrt(n * q * q * (1 - q * q) * (1 + 2 * q))
    for a, b in combinations(masks, 2):
        together = np.count_nonzero(a & b)
        assert abs(together - size * q * q) < 4 * math.sqrt(size * q * q * (1 - q * q))


@pytest.mark.parametrize(
    "mask",
    [
        SeededMask("bernoulli", WORD - 1, 2**63, Thr=6554),
        SeededMask("stratified", 0, 1, B=10),
        SeededMask("disjoint", 5, 6, B=10, slot=9),
    ],
)
def test_settings_survive_json(mask):
    data = json.loads(json.dumps(mask.to_json()))
    assert SeededMask.from_json(data) == mask
    assert data["version"] == 0 and data["lane_bits"] == 16


@pytest.mark.parametrize(
    "scheme, keep, kept",
    [("bernoulli", 0.1, 6554 / 65536), ("bernoulli", 0.3, 19661 / 65536), ("stratified", 0.333, 1 / 3)],
)
def test_keep_is_rounded_to_what_the_scheme_can_do(scheme, keep, kept):
    assert SeededMask.of(scheme, keep, seed=0, task_key=1).keep == kept


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keep": 0}, "keep must be from"),
        ({"keep": 1.5}, "keep must be from"),
        ({"keep": float("nan")}, "keep must be from"),
        ({"keep": 0.3}, "keep must be 1/B, not 0.3: use 0.333333"),
        ({"scheme": "disjoint", "slot": 10}, "at most B tasks can be disjoint"),
        ({"scheme": "disjoint", "slot": -1}, "slot must be a whole number from 0 to 9"),
        ({"scheme": "disjoint"}, "slot must be"),
        ({"slot": 2}, "slot does not belong to a stratified mask"),
        ({"seed": -1}, "seed must be"),
        ({"seed": WORD}, "seed must be"),
        ({"task_key": 0}, "task_key must be a whole number from 1"),
        ({"task_key": 1.0}, "task_key must be"),
        ({"scheme": "gaps"}, "no mask scheme `gaps`"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    settings = {"scheme": "stratified", "keep": 0.1, "seed": 0, "task_key": 1, **change}
    with pytest.raises(ConfigError, match=message):
        SeededMask.of(**settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 1}, "mask version 1 is not known"),
        ({"scheme": "splitmix"}, "no mask scheme `splitmix`"),
        ({"lane_bits": 32}, "lanes of 32 bits"),
        ({"seed": 5}, "cannot be made again"),
        ({"extra": 5}, "extra"),
        ({"Thr": None}, "Thr must be"),
    ],
)
def test_unknown_settings_in_a_file_are_refused(change, message):
    data = {**SeededMask("bernoulli", 1, 2, Thr=5).to_json(), **change}
    with pytest.raises(DeltaError, match=message):
        SeededMask.from_json(data)
    incomplete = {
        key: value for key, value in SeededMask("bernoulli", 1, 2, Thr=5).to_json().items() if key != "version"
    }
    with pytest.raises(DeltaError, match="version"):
        SeededMask.from_json(incomplete)
