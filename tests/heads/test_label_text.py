import pytest
import torch

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import LabelTextHead

LABELS = ["ant", "bee", "cat", "dog"]
E = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def opened(labels=LABELS, embeddings=E, **settings):
    head = LabelTextHead(**settings)
    head.open(6, labels, seed=0, label_embeddings=embeddings)
    return head


def batch(classes, n=32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=g), torch.tensor(classes)[torch.randint(0, len(classes), (n,), generator=g)]


def test_scores_are_cosines_over_the_temperature():
    f, _ = batch([0])
    expected = torch.nn.functional.cosine_similarity(f[:, None], E[None], dim=2) / 0.1
    assert torch.allclose(opened(temperature=0.1).scores(f), expected, atol=1e-5)
    assert torch.allclose(opened().scores(f), opened().scores(f * 3), atol=1e-5)


def test_every_class_is_known_from_the_start():
    head = opened()
    assert head.knows([0, 1, 2, 3]) and torch.isfinite(head.scores(batch([0])[0])).all()
    assert torch.equal(head.scores(E).argmax(1), torch.arange(4))


@pytest.mark.parametrize(("loss", "columns"), [("current", [3, 1]), ("seen", [0, 1, 2, 3])])
def test_loss_is_cross_entropy_over_the_classes_of_the_loss_and_shapes_the_features(loss, columns):
    head = opened(loss=loss)
    head.begin_task([0, 2])
    head.end_task()
    head.begin_task([3, 1])
    f, y = batch([1, 3])
    f.requires_grad_()
    picked = torch.tensor([columns.index(c) for c in y.tolist()])
    value = head.loss(f, y)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(head.scores(f)[:, columns], picked)
    assert torch.allclose(value, expected)
    value.backward()
    assert float(f.grad.norm()) > 0
    assert list(head.parameters()) == [] and head.trains and head.trainer() is head
    with torch.no_grad():
        assert head.loss(f - 0.1 * f.grad / f.grad.norm(), y) < value


def test_template_makes_the_texts_to_embed():
    assert opened(template="a photo of a {}.").label_prompts(["ant", "bee"]) == [
        "a photo of a ant.",
        "a photo of a bee.",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"loss": "all"}, "loss='all'"),
        ({"template": "label"}, "template"),
        ({"template": "{} {}"}, "template"),
        ({"template": "{label}"}, "template"),
        ({"template": "{"}, "template"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        LabelTextHead(**settings)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (None, "found none"),
        (E[:3], r"shape \(4, 6\), found \(3, 6\)"),
        (E * torch.nan, "not finite"),
    ],
)
def test_needs_label_embeddings(embeddings, message):
    assert LabelTextHead.needs_label_embeddings
    with pytest.raises(HeadError, match=message):
        opened(embeddings=embeddings)


def test_embeddings_of_another_model_are_refused_and_saved_ones_replace_ours_to_the_bit():
    head = opened()
    head.begin_task([0, 1, 2, 3])
    head.end_task()
    saved = head.state()
    near = opened(embeddings=E * (1 + 1e-4 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))))
    assert not torch.equal(near.embeddings, saved["embeddings"])
    near.load_state(saved)
    assert torch.equal(near.embeddings, saved["embeddings"])
    with pytest.raises(HeadError, match="embedding of `.*` has cosine"):
        opened(embeddings=E.flip(1)).load_state(saved)


def test_one_new_class_is_told_from_all_texts_seen():
    head = opened(temperature=0.1)
    head.begin_task([0, 1])
    head.end_task()
    head.begin_task([3])
    f, y = batch([3])
    cosine = torch.nn.functional.cosine_similarity(f[:, None], E[None, [0, 1, 3]], dim=2)
    expected = torch.nn.functional.cross_entropy(cosine / 0.1, torch.full((len(f),), 2))
    assert torch.allclose(head.loss(f, y), expected, atol=1e-5) and float(expected) > 0
