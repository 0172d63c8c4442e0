"""What tasks keep of their deltas, and how these become one change: against the published equations, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import perpetune as pt
from perpetune.deltas.combination import Chunk, ElectLargest, ElectSign, Sum
from perpetune.deltas.combine import merge
from perpetune.deltas.extract import extract
from perpetune.deltas.keep import Everything, RandomMask, TopMagnitude

BASE = "f" * 64


def ties_merging(base, tuned, keep, scale):
    """Algorithm 1 of 2306.01708 on dense vectors, fp64; trimming over all parameters of a task."""
    tau = torch.stack([t.double() - base.double() for t in tuned])  # T x d
    k = max(1, int(keep * tau.shape[1]))
    for row in tau:
        row[row.abs() < row.abs().sort(descending=True).values[k - 1]] = 0
    gamma = tau.sum(0).sign()
    agrees = (tau.sign() == gamma) & (tau != 0)
    return base.double() + scale * (tau * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def states(seed, tasks, sizes, dtype=torch.float32):
    """theta_0 and theta_1, ... theta_T with steps of sixteenths, so that sums are exact and signs do tie."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        whole = {f"t{i}": torch.randint(low, high, size, generator=generator) for i, size in enumerate(sizes)}
        return {name: (t / 16).to(dtype) for name, t in whole.items()}

    base = draw(-64, 64)
    return base, [{n: base[n] + d for n, d in draw(-8, 9).items()} for _ in range(tasks)]


def merged(base, tuned, keep, combine, scale):
    deltas = []
    for number, theta_t in enumerate(tuned):
        kept = keep(base, theta_t)
        deltas.append(
            extract(base, theta_t, keep.mask(f"task {number}"), fingerprint=BASE, dense=kept.dense, bits=kept.masks)
        )
    found = dict(merge(base, deltas, [scale] * len(deltas), fingerprint=BASE, combine=combine))
    return torch.cat([found[name].reshape(-1) for name in base])


def flat(state):
    return torch.cat([t.reshape(-1) for t in state.values()])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tasks=st.integers(1, 6),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=4),
    keep=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 0.5, -1.0]),
)
def test_ties_is_the_published_algorithm(seed, tasks, sizes, keep, scale):
    base, tuned = states(seed, tasks, sizes)
    found = merged(base, tuned, TopMagnitude(keep), ElectSign(), scale)
    expected = ties_merging(flat(base), [flat(t) for t in tuned], keep, scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    unchanged = expected == flat(base).double()
    assert torch.equal(found[unchanged], flat(base)[unchanged])


def test_signs_that_weigh_the_same_change_nothing():
    values = [np.array(v, dtype=np.float32) for v in ([1.0, 2.0, -3.0, 0.5], [-1.0, -0.5, -1.0, 0.5])]
    chunks = [Chunk(np.arange(4), v) for v in values]
    change = ElectSign()(iter(chunks), 5)
    assert change.tolist() == [0, 2, -2, 0.5, 0] and change.dtype == np.float32
    assert np.signbit(change[[0, 4]]).all()  # x + -0.0 is x, also for -0.0


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_of_the_elected_sign_is_the_published_merge(seed):
    """The universal adapter of 2508.08165: signs are added up, magnitudes of that sign compete."""
    tau = torch.randint(-4, 5, (4, 30), generator=torch.Generator().manual_seed(seed)) / 4  # signs do tie
    gamma = tau.sum(0).sign()
    expected = gamma * (tau.abs() * (tau.sign() == gamma)).amax(0)
    chunks = (Chunk(np.flatnonzero(row), row[np.flatnonzero(row)]) for row in tau.numpy())
    found = ElectLargest()(chunks, 30)
    assert torch.equal(torch.from_numpy(found), expected) and (expected == 0).any()
    assert np.signbit(found[expected.numpy() == 0]).all()  # to which a base is added without a change of its bits


def test_the_scale_of_a_task_weighs_its_sign():
    chunks = [Chunk(np.arange(1), np.array([1.0], np.float32), 3.0), Chunk(np.arange(1), np.array([-2.0], np.float32))]
    assert ElectSign()(iter(chunks), 1).tolist() == [3.0]
    assert Sum()(iter(chunks), 1).tolist() == [1.0]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=300),
    cut=st.integers(1, 299),
    share=st.floats(0.01, 1),
)
def test_trimming_keeps_the_largest_of_all_tensors(values, cut, share):
    whole = torch.tensor(values)
    parts = {"a": whole[: min(cut, len(whole) - 1)], "b": whole[min(cut, len(whole) - 1) :]}
    zeros = {name: torch.zeros_like(t) for name, t in parts.items()}
    kept = TopMagnitude(share)(zeros, parts).masks
    mask = torch.cat([kept[name] for name in parts])
    k = max(1, int(share * len(whole)))
    least = whole.abs().sort(descending=True).values[k - 1]
    assert torch.equal(mask, (whole.abs() >= least) & (whole != 0))


def test_trimming_over_each_tensor_and_tied_weights_count_once():
    embedding = torch.zeros(10)
    base = {"embed": embedding, "out": embedding, "b": torch.zeros(10), "steps": torch.tensor(3)}
    now = torch.arange(10.0)
    tuned = {"embed": now, "out": now, "b": torch.arange(10.0) + 100, "steps": torch.tensor(4)}
    share = {name: m.sum().item() for name, m in TopMagnitude(0.2, "tensor")(base, tuned).masks.items()}
    assert share == {"embed": 2, "out": 2, "b": 2}
    whole = TopMagnitude(0.5)(base, tuned).masks  # 10 of 20, all of them in b
    assert whole["b"].all() and not whole["embed"].any()


def test_a_task_that_changed_little_keeps_no_zeros():
    base = {"w": torch.zeros(100)}
    tuned = {"w": torch.zeros(100).index_fill(0, torch.tensor([3, 4]), 1.0)}
    assert TopMagnitude(0.5)(base, tuned).masks["w"].nonzero().flatten().tolist() == [3, 4]


def test_hooks_are_made_of_plain_data_and_checked():
    spelled = {"keep": {"type": "TopMagnitude", "share": 0.3}, "combine": "ElectSign"}
    assert pt.DeltaMerge(**spelled) == pt.DeltaMerge(TopMagnitude(0.3), ElectSign())
    assert pt.SparseSum(0.2, "stratified") == pt.DeltaMerge(RandomMask(0.2, "stratified"), Sum())
    assert pt.SparseSum(1.0, scale="1/T") == pt.DeltaMerge(Everything(), Sum(), scale="1/T")
    for wrong in (
        {"keep": "TopMagnitud"},
        {"keep": {"type": "TopMagnitude", "shares": 1}},
        {"keep": {"type": "TopMagnitude", "share": 0}},
        {"keep": {"type": "TopMagnitude", "over": "layer"}},
        {"combine": "Median"},
        {"combine": {"type": "Sum", "scale": 2}},
    ):
        with pytest.raises(pt.ConfigError):
            pt.DeltaMerge(**wrong)
