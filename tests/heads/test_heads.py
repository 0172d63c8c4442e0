"""What every head promises; a new head joins with one line in `HEADS`."""

import json

import pytest
import safetensors.torch
import torch
import yaml

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import HEADS as ALL
from perpetune.heads import Head, make_head

HEADS = [name for name in ALL if not name.startswith("language")]  # whose features are answers: test_language_model.py
LABELS = ["ant", "bee", "cat", "dog", "eel", "fox"]
WIDTH = 7
EMBEDDINGS = dict(zip(LABELS, torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(5)), strict=True))
TASKS = ([0, 1], [1, 2, 3])


def make(name):
    return make_head(name, **({"features": 16} if name in ("ridge", "klda", "closed_form", "anacp") else {}))


def opened(name, labels=LABELS, width=WIDTH, seed=3):
    head = make(name)
    embeddings = (
        torch.stack([EMBEDDINGS[label] for label in labels]) if width == WIDTH else torch.ones(len(labels), width)
    )
    head.open(width, labels, seed=seed, label_embeddings=embeddings if head.needs_label_embeddings else None)
    if head.follows_texts:
        head.embed(range(len(labels)), embeddings)
    return head


def samples(classes, n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.randint(0, len(classes), (n,), generator=g)]
    f = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))[y] + torch.randn(n, WIDTH, generator=g)
    return f, y, [f"{seed}-{i}" for i in range(n)]


def live(head, tasks=TASKS, first=0):
    """The life of a head, as the learner leads it."""
    for j, classes in enumerate(tasks, start=first):
        f, y, ids = samples(classes, seed=j)
        head.begin_task(classes)
        parameters = list(head.parameters())
        if head.trains and parameters:
            optimizer = torch.optim.AdamW(parameters, lr=0.05)
            for _ in range(3):
                optimizer.zero_grad()
                head.loss(f, y).backward()
                optimizer.step()
        head.end_task()
        head.observe(f, y, ids)
    return head


QUERY = samples([0, 1, 2, 3], seed=9)[0]


@pytest.mark.parametrize("name", HEADS)
def test_name_and_settings_make_the_same_head(name):
    head = make(name)
    written = yaml.safe_load(yaml.safe_dump({head.name: head.config()}))
    again = make_head(head.name, **written[head.name])
    assert isinstance(head, Head) and head.name == name
    assert type(again) is type(head) and again.config() == head.config() and again.name == name
    assert str(head).startswith(type(head).__name__)


@pytest.mark.parametrize("name", HEADS)
def test_state_round_trips_to_the_bit_and_the_next_task_goes_on(name):
    head = live(opened(name))
    again = opened(name)
    again.load_state(safetensors.torch.load(safetensors.torch.save(head.state())))
    assert head.state().keys() == again.state().keys()
    assert all(torch.equal(head.state()[k], v) and head.state()[k].dtype == v.dtype for k, v in again.state().items())
    for h in (head, again):
        live(h, [[4, 5]], first=2)
    assert torch.equal(head.scores(QUERY), again.scores(QUERY))
    assert torch.equal(head.scores(QUERY, task=0), again.scores(QUERY, task=0))


@pytest.mark.parametrize("name", HEADS)
def test_a_saved_state_is_not_changed_by_what_comes_after(name):
    head = live(opened(name))
    state = head.state()
    before = {k: v.clone() for k, v in state.items()}
    live(head, [[4, 5]], first=2)
    assert all(torch.equal(state[k], before[k]) for k in before)


@pytest.mark.parametrize("name", HEADS)
def test_scores_have_one_column_per_class(name):
    head = live(opened(name))
    scores = head.scores(QUERY)
    assert scores.shape == (40, 6) and torch.isfinite(scores[:, :4]).all()
    assert head.knows([0, 1, 2, 3])
    unseen = scores[:, 4:]
    by_name = head.needs_label_embeddings or head.follows_texts
    assert torch.isfinite(unseen).all() if by_name else (unseen == -torch.inf).all()
    assert head.knows([4]) == by_name


@pytest.mark.parametrize("name", HEADS)
def test_a_stream_may_grow_and_list_its_labels_in_another_order(name):
    small = live(opened(name, labels=LABELS[:4]))
    grown = opened(name, labels=[LABELS[c] for c in (2, 5, 0, 3, 1, 4)])
    grown.load_state(small.state())
    columns = [grown.labels.index(label) for label in LABELS[:4]]
    for task in (None, 1):
        ours, theirs = grown.scores(QUERY, task=task)[:, columns], small.scores(QUERY, task=task)
        assert torch.allclose(ours, theirs, atol=1e-6) if small.trains else torch.equal(ours, theirs)
    live(grown, [columns[:2] + [5]], first=2)
    assert grown.knows([5])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_no_longer_fits_its_checkpoint_is_refused_and_unchanged(name):
    state = live(opened(name)).state()
    some = next(k for k in state if k not in ("labels", "width", "seed", "bits"))
    cases = [
        (opened(name, width=9), state, "expected features of width 9, found 7"),
        (opened(name, labels=LABELS[:3]), state, "it knows 4 classes, this stream has 3 and lacks `dog`"),
        (opened(name), {k: v for k, v in state.items() if k != some}, f"expected `{some}`, found "),
        (opened(name), {**state, some: torch.zeros(3, 3, 3)}, f"expected `{some}` of shape "),
        (opened(name), {}, "found nothing"),
        (opened(name), {**state, "labels": torch.tensor([255, 3], dtype=torch.uint8)}, "label texts cannot be read"),
    ]
    for head, wrong, message in cases:
        before = head.state()
        with pytest.raises(HeadError, match=message) as caught:
            head.load_state(wrong)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(head.state()[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", HEADS)
def test_a_forgotten_task_has_never_been(name):
    """Three tasks, the one in the middle is forgotten; class 1 is the first task's too, 2 and 3 are its own."""
    head, states = opened(name), [{}]
    for j, classes in enumerate((*TASKS, [4, 5])):
        live(head, [classes], first=j)
        states.append(head.state())
    own, last = head.scores(QUERY, task=0), head.scores(QUERY, task=2)
    if head.refresh:
        return  # not asked: see `Head.forget`
    head.forget(1, [2, 3], states[1], states[2])
    known = [0, 1, 4, 5]
    saved = head.state()
    assert json.loads(bytes(saved["labels"].tolist())) == [LABELS[c] for c in known]
    if head.trains:
        assert torch.equal(head.scores(QUERY, task=0)[:, [0, 1]], own[:, [0, 1]])
        assert torch.equal(head.scores(QUERY, task=1)[:, [4, 5]], last[:, [4, 5]])  # it has moved up
    else:
        never = opened(name)
        for j, classes in ((0, TASKS[0]), (2, [4, 5])):
            live(never, [classes], first=j)
        assert saved.keys() == never.state().keys()
        assert all(torch.equal(saved[key], value) for key, value in never.state().items())
        with pytest.raises(HeadError, match="not seen"):
            head.forget(1, [2, 3], states[1], states[2])
    if not (head.needs_label_embeddings or head.follows_texts):
        assert (head.scores(QUERY)[:, [2, 3]] == -torch.inf).all() and not head.knows([2])
    small = opened(name, labels=[LABELS[c] for c in (4, 5, 1, 0)])  # the others may leave the stream
    small.load_state(safetensors.torch.load(safetensors.torch.save(saved)))
    for task in (None, 0):
        ours, theirs = small.scores(QUERY, task=task), head.scores(QUERY, task=task)[:, [4, 5, 1, 0]]
        assert torch.allclose(ours, theirs, atol=1e-6)
    live(head, [[2, 3]], first=3)  # and may come back
    assert head.knows([2, 3])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_has_seen_nothing_is_saved_too(name):
    state = opened(name).state()
    again = opened(name, labels=LABELS[:2])
    again.load_state(safetensors.torch.load(safetensors.torch.save(state)))
    live(again, [[0, 1]])
    assert again.knows([0, 1])


@pytest.mark.parametrize("name", HEADS)
def test_promises_are_kept(name):
    for measured in live(opened(name)).guarantee():
        assert measured.holds is not False and measured.source and measured.note


@pytest.mark.parametrize("name", HEADS)
def test_bad_openings_are_refused(name):
    for width, labels, message in (
        (0, LABELS, "width 0"),
        (3, [], "no labels"),
        (3, ["a", "b", "a"], "`a` stands twice"),
    ):
        with pytest.raises(HeadError, match=message):
            make(name).open(width, labels, seed=0, label_embeddings=torch.ones(len(labels), width))
    with pytest.raises(HeadError, match="not open yet"):
        make(name).scores(torch.zeros(1, 3))
    with pytest.raises(HeadError, match="not open yet"):
        make(name).begin_task([0])


def test_unknown_names_and_settings_get_advice():
    with pytest.raises(ConfigError, match="no head is called `rigde`: did you mean `ridge`"):
        make_head("rigde")
    with pytest.raises(ConfigError, match="no setting `regularization`: did you mean `regularisation`"):
        make_head("ridge", regularization=1.0)
    with pytest.raises(ConfigError, match="head `ncm` has no setting `features`: did you mean `refresh`"):
        make_head("ncm", features=3)
