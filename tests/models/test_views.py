from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import perpetune as pt
from perpetune.learning.export_head import with_head
from perpetune.learning.prediction import frozen_features
from perpetune.learning.state import LearnerState
from perpetune.models.layers import read_layers
from perpetune.models.loading import load_backbone
from perpetune.models.views import read_views, views
from perpetune.recipes import make_recipe


def picture(centre=(0.0, 0.0), size=33, width=33):
    """A blob, (1 x 3 x size x width); its centre in pixels from that of the picture: right, down."""
    across, down = torch.arange(width) - width // 2, torch.arange(size) - size // 2
    blob = torch.exp(-((across[None] - centre[0]) ** 2 + (down[:, None] - centre[1]) ** 2) / 18)
    return blob.expand(1, 3, size, width).contiguous()


def centre_of(seen):
    down, across = (torch.arange(side) - side // 2 for side in seen.shape[-2:])
    weights = seen[0, 0].clamp(min=0) / seen[0, 0].clamp(min=0).sum()
    return (weights.sum(0) * across).sum(), (weights.sum(1) * down).sum()


@pytest.mark.parametrize("count", [4, 8])
def test_views_are_turned_zoomed_and_moved_by_what_is_said(count):
    """What a view shows at (x, y) lies at zoom R(turn) (x, y) + shift of the picture: where a blob goes says the map.
    Every change comes as often either way; with 8 views every pair of changes comes in all four ways."""
    corners, size = [], 33
    for at in ((0.0, 0.0), (6.0, 0.0)):
        corners.append([centre_of(seen) for seen in views(picture(at, size), count)])
    signs = []
    for (x, y), (x_6, y_6) in zip(*corners, strict=True):
        zoom, turn = math.hypot(x_6 - x, y_6 - y) / 6, math.degrees(math.atan2(y_6 - y, x_6 - x))
        assert abs(turn) == pytest.approx(12, abs=0.5)
        assert min(abs(zoom - 1 / 1.12), abs(zoom - 1 / 0.88)) < 0.03
        # the centre moves by 6 % of the side, turned and zoomed as all else
        assert math.hypot(x, y) == pytest.approx(math.sqrt(2) * 0.06 * size * zoom, rel=0.02)
        back = torch.tensor(math.radians(-turn))
        right = (back.cos() * x - back.sin() * y) < 0
        down = (back.sin() * x + back.cos() * y) < 0
        signs.append((turn < 0, zoom < 1, bool(right), bool(down)))
    assert len(set(signs)) == count and all(sum(change) == count / 2 for change in zip(*signs, strict=True))
    pairs = [{(s[one], s[other]) for s in signs} for one in range(4) for other in range(one)]
    assert all(len(ways) == 4 for ways in pairs) == (count == 8)


@pytest.mark.parametrize("at", [(6.0, 0.0), (0.0, 6.0)])
def test_a_picture_that_is_not_square_is_turned_and_not_sheared(at):
    wide = [[centre_of(seen) for seen in views(picture(centre, 65, 129), 8)] for centre in ((0.0, 0.0), at)]
    for (x, y), (x_6, y_6) in zip(*wide, strict=True):
        turn = math.degrees(math.atan2(y_6 - y, x_6 - x) - math.atan2(at[1], at[0]))
        assert abs(turn) == pytest.approx(12, abs=0.5)


def test_what_comes_into_sight_continues_the_border():
    for seen in views(torch.ones(2, 3, 9, 9), 8):
        torch.testing.assert_close(seen, torch.ones(2, 3, 9, 9))


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_pooled_is_the_mean_over_the_picture_and_its_views(tiny_vit, layers):
    backbone = load_backbone(tiny_vit(layers=2), "image")
    read_layers(backbone, layers)
    examples = backbone.samples()
    once = backbone.pooled(examples, 8)
    pictures = torch.stack([e["pixel_values"] for e in examples])
    seen = [[{**e, "pixel_values": x} for e, x in zip(examples, batch, strict=True)] for batch in views(pictures, 4)]
    expected = torch.stack([once, *(backbone.pooled(batch, 8) for batch in seen)]).mean(0)
    features = backbone.features(examples, 8)
    read_views(backbone, 4)
    torch.testing.assert_close(backbone.pooled(examples, 8), expected)
    assert torch.equal(backbone.features(examples, 8), features)  # what heads read stays one picture
    read_views(backbone, 0)
    assert torch.equal(backbone.pooled(examples, 8), once)


def test_texts_are_read_once(tiny_bert):
    backbone = load_backbone(tiny_bert(), "text", max_length=16)
    before = backbone.pooled(backbone.samples(), 8)
    read_views(backbone, 8)
    assert not backbone.views and torch.equal(backbone.pooled(backbone.samples(), 8), before)


def test_models_that_take_patches_are_read_once(tiny_vit, monkeypatch):
    backbone = load_backbone(tiny_vit(), "image")
    patches = [{"pixel_values": torch.zeros(16, 48), "label": 0, "id": ""}] * 2
    monkeypatch.setattr(backbone, "samples", lambda: patches)
    read_views(backbone, 8)
    assert not backbone.views


def test_pictures_of_a_pair_of_encoders_are_seen_several_times(tiny_clip):
    backbone = load_backbone(tiny_clip(), "image")
    read_views(backbone, 4)
    backbone.open(["a", "b"], paired=False)
    found = backbone.pooled([{**e, "among": ()} for e in backbone.samples()], 8)
    assert found.shape == (2, backbone.width) and bool((F.normalize(found, dim=1).norm(dim=1) > 0).all())
    assert float(found.norm(dim=1).max()) < 1  # a mean of vectors of length 1 that are not the same


def test_no_export_is_said_to_predict_what_several_views_do(tiny_clip, tmp_path):
    """A pair of encoders needs nothing beside it, but on one picture it is another model."""
    recipe = {"name": "frozen_label_text", "tuner": {"type": "Frozen", "views": 4}}
    setup = pt.Learner(tiny_clip(), recipe, tmp_path / "run", heads=["contrastive"]).setup
    state = LearnerState(setup, setup.load_backbone("image"), ["a", "b"])
    assert state.backbone.all_views
    assert "reads several views of a picture" in with_head(state, state.backbone.model).told


@pytest.mark.parametrize("views", [0, 4])
def test_boundaries_are_found_on_pictures_as_they_are(tiny_vit, tmp_path, views):
    """So that all recipes of a comparison learn the same parts."""
    task = pt.load_stream("digits", train_limit=2, test_limit=4, tasks=["0-1"]).tasks[0]
    learner = pt.Learner(tiny_vit(), {"name": "frozen_best", "views": views}, tmp_path / "run")
    once = load_backbone(tiny_vit(), "image")
    expected = once.pooled(once.prepare(task.test), 8)
    assert torch.equal(frozen_features(learner.setup, task.test, "image", ["0", "1"]), expected)


@pytest.mark.parametrize("name", ["default", "frozen_best"])
def test_other_numbers_of_views_are_refused(name):
    with pytest.raises(pt.ConfigError, match="views=5 must be 0, 4 or 8"):
        make_recipe({"name": name, "views": 5})


def test_heads_of_a_model_that_is_not_trained_read_the_mean_as_well(tiny_vit, tmp_path):
    stream = pt.load_stream("digits", train_limit=40, test_limit=20, tasks=["0-1", "2-3"])
    recipe = {"name": "frozen_ncm", "tuner": {"type": "Frozen", "views": 4}}
    learner = pt.Learner(tiny_vit(), recipe, tmp_path / "run")
    learner.learn(stream)
    once = load_backbone(tiny_vit(), "image")
    read_views(once, 4)
    examples = once.prepare(stream.tasks[0].test)
    opened = pt.Learner.open(tmp_path / "run")
    found = opened.state.backbone.features(examples, 8)
    torch.testing.assert_close(found, once.pooled(examples, 8))
    assert not torch.equal(found, once.features(examples, 8))
    assert opened.predict(stream.tasks[0].test["image"][:4]) == learner.predict(stream.tasks[0].test["image"][:4])
    told = with_head(opened.state, opened.state.backbone.model)  # a plain classifier would read one picture
    assert "reads several views of a picture" in told.told and told.readout is None and not told.beside
