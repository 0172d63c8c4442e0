import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from perpetune.core.errors import HeadError
from perpetune.heads import LinearHead, PrototypeHead

LABELS = ["ant", "bee", "cat", "dog", "eel"]


def samples(n=60, width=6, seed=0, classes=4):
    """Features, labels (the last label never occurs), ids."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    f = torch.randn(5, width, generator=g)[y] + 0.7 * torch.randn(n, width, generator=g)
    return f, y, [f"sample-{i}" for i in range(n)]


def head_of(f, y, ids, batch=10**9):
    head = PrototypeHead()
    head.open(6, LABELS, seed=0)
    for i in range(0, len(y), batch):
        head.observe(f[i : i + batch], y[i : i + batch], ids[i : i + batch])
    return head


def test_scores_are_cosines_to_class_means():
    f, y, ids = samples()
    scores = head_of(f, y, ids).scores(f)
    means = torch.stack([f[y == c].mean(0) for c in range(4)])
    expected = F.normalize(f, dim=1) @ F.normalize(means, dim=1).T
    assert torch.allclose(scores[:, :4], expected.double(), atol=1e-5)
    assert scores.dtype == torch.float64
    assert torch.equal(scores[:, 4], torch.full((60,), -torch.inf).double())


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 60), query=st.integers(1, 60))
@settings(max_examples=12, deadline=None)
def test_same_bits_under_any_order_and_batch_size(seed, batch, query):
    f, y, ids = samples()
    plain = head_of(f, y, ids)
    o = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    other = head_of(f[o], y[o], [ids[i] for i in o], batch=batch)
    assert all(torch.equal(plain.state()[k], other.state()[k]) for k in plain.state())
    assert torch.equal(plain.scores(f), torch.cat([other.scores(part) for part in f.split(query)]))


def test_a_class_in_two_tasks_is_a_class_seen_once():
    f, y, ids = samples()
    head = PrototypeHead()
    head.open(6, LABELS, seed=0)
    even = torch.arange(60) % 2 == 0
    for task, mine in (([0, 1], (y == 0) | ((y == 1) & even)), ([1, 2, 3], (y > 1) | ((y == 1) & ~even))):
        head.begin_task(task)
        head.end_task()
        head.observe(f[mine], y[mine], [ids[i] for i in mine.nonzero()])
    assert torch.equal(head.scores(f), head_of(f, y, ids).scores(f))


@given(power=st.integers(-4, 4))
@settings(max_examples=10, deadline=None)
def test_powers_of_two_change_no_bit(power):
    f, y, ids = samples()
    f = (f * 2**8).round() * 2.0**-8  # on a coarser grid, so that scaling by 2^-4 stays on the grid
    scaled = f * 2.0**power
    assert torch.equal(head_of(f, y, ids).scores(f), head_of(scaled, y, ids).scores(scaled))


@given(scale=st.floats(0.3, 20))
@settings(max_examples=20, deadline=None)
def test_feature_scale_changes_no_prediction(scale):
    f, y, ids = samples()
    scaled = f * scale
    plain, other = head_of(f, y, ids).scores(f), head_of(scaled, y, ids).scores(scaled)
    assert torch.allclose(plain[:, :4], other[:, :4], atol=1e-4)
    top = plain.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-3
    assert clear.sum() > 50
    assert torch.equal(plain.argmax(1)[clear], other.argmax(1)[clear])


def test_nothing_seen_and_zero_vectors_give_no_nan():
    head = PrototypeHead()
    head.open(3, LABELS, seed=0)
    assert torch.equal(head.scores(torch.ones(2, 3)), torch.full((2, 5), -torch.inf).double())
    assert not head.knows([0])
    head.observe(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1, 0]]), torch.tensor([0, 0, 1]), ["a", "b", "c"])
    scores = head.scores(torch.tensor([[0.0, 0, 0], [1, 1, 0]]))
    assert scores[:, :2].tolist() == [[0, 0], [0, pytest.approx(0.5**0.5)]]
    assert head.knows([0, 1]) and not head.knows([1, 2])


def test_subtracting_is_never_having_seen_and_adding_is_having_seen():
    f, y, ids = samples()
    first, second = head_of(f[:25], y[:25], ids[:25]), head_of(f[25:], y[25:], ids[25:])
    head = head_of(f, y, ids)
    head.subtract(second.state())
    assert all(torch.equal(head.state()[k], v) for k, v in first.state().items())
    head.add(second.state())
    assert torch.equal(head.scores(f), head_of(f, y, ids).scores(f))
    with pytest.raises(HeadError, match="not seen"):
        first.subtract(second.state())


def test_clipping_is_counted_and_breaks_the_promise():
    f, y, ids = samples()
    assert all(m.holds for m in head_of(f, y, ids).guarantee())
    clipped = {m.name: m for m in head_of(f * 1000, y, ids).guarantee()}["clipped feature entries"]
    assert clipped.value > 0.5 and clipped.holds is False
    tiny = {m.name: m for m in head_of(f * 1e-6, y, ids).guarantee()}["rounding of class means"]
    assert tiny.holds is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y, ids: (f[:, :3], y, ids), r"shape \(N, 6\), found \(60, 3\)"),
        (lambda f, y, ids: (f * torch.nan, y, ids), "not finite"),
        (lambda f, y, ids: (f, y[:7], ids), "60 features, 7 labels and 60 ids"),
        (lambda f, y, ids: (f, y + 4, ids), "class 5 is not one of the 5"),
    ],
)
def test_bad_samples_are_refused(change, message):
    with pytest.raises(HeadError, match=message):
        head_of(*change(*samples()))


def test_does_not_train():
    head = head_of(*samples())
    assert not head.trains and list(head.parameters()) == []
    trainer = head.trainer()
    assert isinstance(trainer, LinearHead) and trainer.config() == {"loss": "current"}
    with pytest.raises(HeadError, match="has no loss"):
        head.loss(torch.zeros(1, 6), torch.zeros(1, dtype=torch.long))
    with pytest.raises(HeadError, match="class 9"):
        head.begin_task([9])
