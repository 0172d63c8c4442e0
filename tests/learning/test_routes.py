"""Routes of a run, found again with plain torch by the file that docs/how-to/serve.md shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import perpetune as pt
from perpetune.routers import ClassRouter, KMeansRouter, PooledRouter, RidgeRouter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "serve.md"
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def page():
    names = {}
    code = re.search(r'```python title="route.py"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, "route.py", "exec"), names)
    assert "perpetune" not in code
    return names


def plain_features(learner, model, tokenizer, texts):
    """The mean of the last hidden states, by transformers alone."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    mask = inputs["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    ("recipe", "kind"), [("color", "bert"), ("color_adapted", "bert"), ("routed", "bert"), ("routed", "llama")]
)
def test_a_run_is_routed_by_its_files(recipe, kind, page, word_stream, tiny_bert, tiny_lm, tmp_path):
    import peft
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    pose = {"pose": "instruction"} if kind == "llama" else {}
    stream = pt.load_stream(word_stream, train_limit=24, test_limit=8, **pose)
    path = tiny_lm("llama") if kind == "llama" else tiny_bert()
    learner = pt.Learner(path, recipe, tmp_path / "r", training=TRAINING)
    result = learner.learn(stream)
    folder = learner.export(tmp_path / "a", format="adapters")
    router = json.loads((folder / "routes.json").read_text(encoding="utf-8"))["router"]
    model = (AutoModelForCausalLM if kind == "llama" else AutoModel).from_pretrained(path)
    if recipe == "color_adapted":
        assert router["features"]["model"] == stream.tasks[0].name
        model = peft.PeftModel.from_pretrained(model, folder / router["features"]["model"]).eval()
    else:
        assert router["features"]["model"] == "base"
    tokenizer, names = AutoTokenizer.from_pretrained(path), list(result.tasks)
    stored = result.commits[-1].tensors("predictions.safetensors")
    seen = set()
    for task in stream:
        texts = task.test["prompt" if kind == "llama" else "text"][:]
        bare = [re.sub("[\ufdd0\ufdd1]", "", text) for text in texts]  # marks of the passage are the run's own
        found = page["route"](plain_features(learner, model, tokenizer, bare), folder)
        assert found == [names[i] for i in stored[f"route/{task.name}"].tolist()]
        seen |= set(found)
    assert len(seen) > 1


def synthetic(tasks, draw, n=60, width=8):
    """Features of two classes a task, (n x width) each."""
    for _ in range(tasks):
        centres = 2 * torch.randn(2, width, generator=draw, dtype=torch.float64)
        kinds = torch.arange(n) % 2
        yield centres[kinds] + torch.randn(n, width, generator=draw, dtype=torch.float64), kinds


@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize(
    "router",
    [
        KMeansRouter(3),
        KMeansRouter(2, "l1", normalise=False),
        RidgeRouter(),
        RidgeRouter(features=32),
        RidgeRouter(reading="sum"),
        ClassRouter(16),
        PooledRouter(16),
        RidgeRouter(together=True),
        ClassRouter(16, together=True),
        PooledRouter(16, together=True),
    ],
    ids=repr,
)
def test_every_router_has_a_plain_form(router, tasks, page, tmp_path):
    """To rounding of the scores; with 20 tasks the density looks closely at the nearest 16."""
    draw = torch.Generator().manual_seed(tasks)
    router.open(8, [f"class {c}" for c in range(2 * tasks)], seed=1)
    queries = []
    for task, (features, kinds) in enumerate(synthetic(tasks, draw)):
        router.observe(task, features[:50], 2 * task + kinds[:50], [f"{task}/{i}" for i in range(50)])
        queries.append(features[50:])
    settings, tensors = router.plain()
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "router.safetensors")
    adapters = [{"name": str(i)} for i in range(tasks)]
    told = {"adapters": adapters, "router": {**json.loads(json.dumps(settings)), "tensors": "router.safetensors"}}
    (tmp_path / "routes.json").write_text(json.dumps(told), encoding="utf-8")
    queries = torch.cat(queries)
    assert page["route"](queries, tmp_path) == [str(i) for i in router.route(queries).tolist()]
    if router.calibrated:
        log_p = page["scores"](queries, settings, tensors)
        assert torch.allclose(log_p, router.log_posterior(queries), atol=1e-8)


def test_few_samples_give_a_route_without_a_probability(page, tmp_path):
    draw = torch.Generator().manual_seed(0)
    for router in (RidgeRouter(), ClassRouter(16), PooledRouter(16)):
        router.open(8, ["a", "b", "c", "d"], seed=0)
        for task, (features, kinds) in enumerate(synthetic(2, draw, n=8)):
            router.observe(task, features, 2 * task + kinds, [f"{task}/{i}" for i in range(8)])
        settings, tensors = router.plain()
        queries = torch.randn(20, 8, generator=draw, dtype=torch.float64)
        assert not router.calibrated
        assert torch.equal(page["scores"](queries, settings, tensors).argmax(1), router.route(queries))
