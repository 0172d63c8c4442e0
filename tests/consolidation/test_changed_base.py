"""A tuner that consolidations cannot take up is refused before anything is evaluated or trained."""

from __future__ import annotations

import peft
import pytest

import perpetune as pt

INTO = ["pissa", "pissa_niter_2", "olora"]


@pytest.mark.parametrize("init", INTO)
@pytest.mark.parametrize("consolidation", [pt.Merge, pt.Stack, pt.PerTask, pt.DeltaMerge], ids=lambda c: c.__name__)
def test_such_an_initialisation_is_refused_where_every_task_begins_anew(init, consolidation, stream, model, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=init)
    learner = pt.Learner(model, pt.Recipe(config, [], consolidation()), tmp_path / "run")
    with pytest.raises(pt.ConfigError, match="set init_lora_weights to true"):
        learner.learn(stream)


def test_a_tuner_without_a_sum_or_product_is_refused_before_anything_is_evaluated(stream, model, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], use_dora=True)
    for consolidation in (pt.Merge(), pt.DeltaMerge()):
        path = tmp_path / type(consolidation).__name__
        with pytest.raises(pt.ConfigError, match="use Continue"):
            pt.Learner(model, pt.Recipe(config, [], consolidation), path).learn(stream)
        assert not list((path / "commits").iterdir())
