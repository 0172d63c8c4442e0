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
