import pytest
import torch
from torch.nn import functional as F

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import LinearHead

LABELS = ["ant", "bee", "cat", "dog", "eel"]
WIDTH = 6


def opened(loss="current", labels=LABELS, seed=0):
    head = LinearHead(loss=loss)
    head.open(WIDTH, labels, seed=seed)
    return head


def batch(classes, n=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=g), torch.tensor(classes)[torch.randint(0, len(classes), (n,), generator=g)]


def learn(head, classes, steps=5, seed=0):
    head.begin_task(classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    f, y = batch(classes, seed=seed)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(f, y).backward()
        optimizer.step()
    head.end_task()
    return head


@pytest.mark.parametrize(("loss", "columns"), [("current", [3, 1]), ("seen", [0, 1, 2, 3])])
def test_loss_is_cross_entropy_over_the_classes_of_the_loss(loss, columns):
    head = learn(opened(loss), [0, 2])
    head.begin_task([3, 1])
    f, y = batch([1, 3])
    f.requires_grad_()
    logits = (f @ head.weight.T + head.bias)[:, columns]
    picked = torch.tensor([columns.index(c) for c in y.tolist()])
    value, expected = head.loss(f, y), -logits.log_softmax(1)[range(32), picked].mean()
    assert torch.allclose(value, expected)
    assert torch.allclose(*(torch.autograd.grad(v, f)[0] for v in (value, expected)), atol=1e-7)
    assert [tuple(p.shape) for p in head.parameters()] == [(len(columns), WIDTH), (len(columns),)]


def test_scores_are_linear_and_unseen_classes_score_minus_infinity():
    head = learn(opened(), [0, 2])
    f, _ = batch([0])
    scores = head.scores(f)
    assert torch.allclose(scores[:, [0, 2]], (f @ head.weight.T + head.bias)[:, [0, 2]], atol=1e-6)
    assert (scores[:, [1, 3, 4]] == -torch.inf).all()
    assert head.knows([0, 2]) and not head.knows([0, 1])


def test_old_rows_do_not_decay_under_adamw():
    head = learn(opened(), [0, 1])
    old = head.weight[[0, 1]].clone(), head.bias[[0, 1]].clone(), head.scores(batch([0])[0])[:, :2]
    learn(head, [2, 3], steps=50)
    assert torch.equal(head.weight[[0, 1]], old[0]) and torch.equal(head.bias[[0, 1]], old[1])
    # equal weights; a product with more columns may round otherwise
    torch.testing.assert_close(head.scores(batch([0])[0])[:, :2], old[2], rtol=1e-6, atol=1e-6)
    assert [(m.value, m.holds) for m in head.guarantee()] == [(0.0, True)]

    plain = torch.nn.Linear(WIDTH, 5)  # the trap: one module for all classes
    before, optimizer = plain.weight[:2].clone(), torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
    f, y = batch([2, 3])
    F.cross_entropy(plain(f)[:, 2:4], y - 2).backward()
    optimizer.step()
    assert not torch.equal(plain.weight[:2], before)


def test_a_change_of_other_rows_is_measured():
    head = opened()
    head.begin_task([0, 1])
    head.weight[4] += 0.25
    head.end_task()
    (measured,) = head.guarantee()
    assert measured.value == pytest.approx(0.25) and measured.holds is False


def test_training_lowers_the_loss_and_parameters_exist_only_during_a_task():
    head = opened()
    assert list(head.parameters()) == []
    f, y = batch([0, 1])
    head.begin_task([0, 1])
    first = float(head.loss(f, y).detach())
    head.end_task()
    assert list(head.parameters()) == []
    learn(head, [0, 1], steps=30)
    head.begin_task([0, 1])
    assert float(head.loss(f, y).detach()) < first - 0.1


def test_new_rows_depend_on_seed_and_label_text_alone():
    head, other = opened(), opened(labels=LABELS[::-1])
    assert torch.equal(head.weight, other.weight.flip(0))
    assert not torch.equal(head.weight, opened(seed=1).weight)
    assert len({tuple(row.tolist()) for row in head.weight}) == 5
    assert float(head.weight.abs().max()) < 0.1 and not head.bias.any()


def test_a_class_that_reappears_goes_on_from_its_row():
    head = learn(opened(), [0, 1])
    row = head.weight[1].clone()
    head.begin_task([1, 2])
    assert torch.equal(head.active_weight[0], row)


def test_a_forgotten_class_starts_anew_and_a_shared_one_goes_on():
    head = learn(opened(), [0, 1])
    learn(head, [1, 2], seed=1)
    shared, first = head.weight[1].clone(), opened()
    head.forget(1, [2], {}, {})
    assert torch.equal(head.weight[2], first.weight[2]) and head.bias[2] == 0
    assert torch.equal(head.weight[1], shared)  # what both tasks made of it
    assert len(head.tasks) == 1 and head.state()["weight"].shape == (2, WIDTH)
    head.begin_task([3, 4])
    with pytest.raises(HeadError, match="made to forget in the middle of a task"):
        head.forget(0, [0], {}, {})


def test_each_task_keeps_its_own_rows():
    head = learn(opened(), [0, 1])
    f, _ = batch([0])
    first = head.scores(f)
    learn(head, [1, 2], seed=1)
    assert torch.equal(head.scores(f, task=0), first)
    assert (head.scores(f, task=1)[:, [0, 3, 4]] == -torch.inf).all()
    assert torch.equal(head.scores(f, task=1)[:, [1, 2]], head.scores(f)[:, [1, 2]])
    assert not torch.equal(head.scores(f)[:, 1], first[:, 1])  # the shared row moved on
    with pytest.raises(HeadError, match="no rows of task 2; 2 tasks have ended"):
        head.scores(f, task=2)


def test_scores_during_a_task_read_the_parameters():
    head = learn(opened(), [0, 1])
    head.begin_task([1, 2])
    with torch.no_grad():
        head.active_bias += 7
    f, _ = batch([0])
    expected = f @ head.weight.T + head.bias
    assert torch.allclose(head.scores(f)[:, :3], expected[:, :3] + torch.tensor([0, 7, 7]), atol=1e-5)
    assert (head.scores(f, task=1) > -torch.inf).any(0).tolist() == [False, True, True, False, False]


def test_low_precision_features_are_read():
    head = opened()
    head.begin_task([0, 1])
    f, y = batch([0, 1])
    assert torch.allclose(head.loss(f.bfloat16(), y), head.loss(f, y), atol=1e-2)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda h: h.loss(*batch([0])), "no task has begun"),
        (lambda h: h.end_task(), "no task has begun"),
        (lambda h: (h.begin_task([0, 1]), h.begin_task([2, 3])), "begun already"),
        (lambda h: (h.begin_task([0, 1]), h.loss(*batch([2]))), "class `cat` is not a class of the current loss"),
        (lambda h: (h.begin_task([0, 1]), h.state()), "in the middle of a task"),
        (lambda h: h.begin_task([0, 5]), "class 5 is not one of the 5"),
        (lambda h: h.begin_task([0, 0]), "each once"),
        (lambda h: h.scores(torch.zeros(2, 9)), r"shape \(N, 6\), found \(2, 9\)"),
    ],
)
def test_misuse_is_refused(act, message):
    with pytest.raises(HeadError, match=message):
        act(opened())


def test_loss_must_be_known():
    with pytest.raises(ConfigError, match="did you mean `seen`"):
        LinearHead(loss="sen")


def test_a_reopened_task_goes_on_from_its_own_rows():
    head = learn(learn(opened(), [0, 1]), [1, 2], seed=1)
    own, other = head.tasks[0], head.weight[2].clone()
    head.reopen(0)
    head.begin_task([0, 1])
    assert torch.equal(head.active_weight, own[1]) and torch.equal(head.active_bias, own[2])
    assert torch.equal(head.weight[2], other)


def test_one_new_class_is_told_from_all_seen_and_trains_its_row_alone():
    """Cross entropy over W = (w_0, w_1, w_new), of which w_new is the only parameter."""
    head = opened()
    head.begin_task([0, 1])
    with torch.no_grad():
        head.active_weight.add_(torch.randn_like(head.active_weight))
    head.end_task()
    old = head.weight.clone()
    head.begin_task([3])
    assert head.in_loss == [0, 1, 3] and [tuple(p.shape) for p in head.parameters()] == [(1, head.width), (1,)]
    f, y = batch([3], n=3)
    f.requires_grad_()
    w, b = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(f @ w[[0, 1, 3]].T + b[[0, 1, 3]], torch.tensor([2, 2, 2]))
    loss = head.loss(f, y)
    assert torch.allclose(loss, expected) and loss.item() > 0.1
    loss.backward()
    of_features = f.grad.clone()
    f.grad = None
    expected.backward()
    assert torch.allclose(of_features, f.grad)
    assert torch.allclose(head.active_weight.grad, w.grad[[3]]) and torch.allclose(head.active_bias.grad, b.grad[[3]])
    with torch.no_grad():
        head.active_weight.add_(1.0)
    head.end_task()
    assert torch.equal(head.weight[3], old[3] + 1) and torch.equal(head.weight[:3], old[:3])
    assert [m.value for m in head.guarantee()] == [0.0]


def test_the_first_class_of_all_is_predicted():
    head = opened()
    head.begin_task([2])
    assert head.loss(*batch([2, 2])).item() == 0
    head.end_task()
    assert (head.scores(batch([2])[0]).argmax(1) == 2).all()
