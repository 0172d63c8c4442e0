from __future__ import annotations

import json
import math

import pytest

import perpetune as pt
from benchmarks import routing


@pytest.fixture(scope="module")
def model(tiny_bert) -> str:
    return str(tiny_bert(width=8, layers=1))


def test_measures_everything_and_writes_records(model, tmp_path, capsys):
    file = tmp_path / "routing.json"
    options = ["--model", model, "--adapters", "5", "--routes", "3", "--repeats", "1", "--json", str(file)]
    records = routing.main(options)
    assert json.loads(file.read_text()) == records
    by_name = {record["name"]: record for record in records}
    assert len(by_name) == len(records)
    assert all(value > 0 for r in records for key, value in r.items() if key in ("ms", "ms_per_input", "mb", "ratio"))
    mixed, small = by_name["batch of 12 over 3 routes"], by_name["3 batches of 4, routed"]
    ratio = by_name["batch of 12 over 3 routes / 3 batches of 4, routed"]
    assert math.isclose(ratio["ratio"], mixed["ms"] / small["ms"]) and ratio["target"] == 1.5
    assert math.isclose(by_name["5 adapters"]["mb"], 5 * by_name["one adapter"]["mb"])
    assert by_name["one adapter"]["mb"] == 2 * (8 * routing.pt.make_recipe("color").tuner.config.r * 2) * 4 / 1e6
    assert "5 adapters" in capsys.readouterr().out


def test_the_run_is_one_that_opens_and_answers(model, tmp_path):
    stream = routing.make_run(model, tmp_path, 3)
    opened = pt.Learner.open(tmp_path, model=model)
    texts = [text for task in stream for text in task.train["text"]]
    sent = opened.recipe.consolidation
    with sent.view(None):
        features = opened.backbone.features(opened.backbone.prepare(stream.tasks[1].train), 8)
    assert sent.router.route(features).tolist() == [1] * routing.TEXTS
    own = [set(stream.label_texts(task.classes)) for task in stream for _ in range(routing.TEXTS)]
    assert all(label in classes for label, classes in zip(opened.predict(texts), own, strict=True))


@pytest.mark.parametrize(
    ("option", "says"), [(("--routes", "300"), "--routes must be between"), (("--repeats", "0"), "--repeats must be")]
)
def test_sizes_that_cannot_be_are_refused(option, says, capsys):
    with pytest.raises(SystemExit):
        routing.main([*option])
    assert says in capsys.readouterr().err
