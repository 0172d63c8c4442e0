from test_boundaries import *
from test_boundaries import stream, drift, model
@pytest.mark.parametrize("recipe", ["routed", "color_oracle", "color_adapted", "lora", "joint"])
def test_other(model, drift, tmp_path, recipe):
    r = pt.learn_drift(learner(model, recipe, run=tmp_path/"r"), drift, detector())
    print(recipe, drift_summary(r)); o=pt.Learner.open(r.path)
    print(o.predict(["movie movie film the a"]) if recipe!="color_oracle" else o.predict(["movie movie film the a"], task="part-01"))
    if recipe in ("routed","color_adapted"): print(o.recipe.consolidation.router.tasks, r.routing().accuracy)
