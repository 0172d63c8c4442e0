"""A run that an earlier version began goes on under the name of its recipe, which has had settings since."""

from __future__ import annotations

import pytest

import perpetune as pt
from perpetune import Learner


def test_the_run_keeps_what_it_began_with(tiny_bert, word_stream, tmp_path):
    begun = pt.make_recipe("routed").to_dict()
    for later in ("many_tasks", "together"):
        assert begun["consolidation"]["router"].pop(later) is True
    stream = pt.load_stream(word_stream, tasks=["films", "news"], train_limit=4, test_limit=2)
    settings = {"training": {"max_steps": 1}, "heads": begun["heads"]}
    model, run = tiny_bert(layers=1), tmp_path / "run"
    Learner(model, begun, run, **settings).learn(stream.select(["films"]))

    named = Learner(model, "routed", run, **settings)
    assert named.setup.recipe.to_dict() == begun
    assert named.learn(stream).tasks == ("films", "news")
    given = {**begun, "consolidation": pt.make_recipe("routed").to_dict()["consolidation"]}
    for other in (given, "routed_layers"):
        with pytest.raises(pt.RunError, match="made with another configuration: recipe"):
            Learner(model, other, run, **settings).learn(stream)
    new = Learner(model, "routed", tmp_path / "new", **settings)
    assert new.setup.recipe.to_dict() == pt.make_recipe("routed").to_dict()


@pytest.mark.parametrize(("name", "piece"), [("default", "consolidation"), ("frozen_best", "tuner")])
def test_a_run_that_read_its_pictures_once_goes_on_so(name, piece, tiny_vit, tmp_path):
    named = {"name": name, "features": 32}
    begun = pt.make_recipe(named).to_dict()
    assert begun[piece].pop("views") == 8
    stream = pt.load_stream("digits", train_limit=16, test_limit=4, tasks=["0-1", "2-3"])
    settings = {"training": {"max_steps": 1}, "heads": begun["heads"]}
    model, run = tiny_vit(layers=1), tmp_path / "run"
    Learner(model, begun, run, **settings).learn(stream.select(["0-1"]))

    with pytest.raises(pt.RunError, match="made with another configuration: recipe"):
        Learner(model, {**named, "views": 8}, run, **settings).learn(stream)
    learner = Learner(model, named, run, **settings)
    assert learner.learn(stream).tasks == ("0-1", "2-3") and learner.backbone.views == 0
    opened = Learner.open(run)
    assert opened.backbone.views == 0 and opened.setup.recipe.to_dict() == begun
    assert Learner(model, named, tmp_path / "new", **settings).setup.recipe.to_dict() == pt.make_recipe(named).to_dict()
