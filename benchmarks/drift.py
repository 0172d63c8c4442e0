"""What becomes of a model's outputs on old inputs while it learns something new, tuner by tuner.

    python -m benchmarks.drift --stream PATH/TO/cl-benchmark
    python -m benchmarks.drift --small --dtype float64

Task 1: 6 texts of agnews, 100 steps. Task 2: 64 texts of dbpedia with a new head, 300 steps of AdamW with decay 0.01,
the momentum of task 1 carried over where parameters live on. With --small, a BERT of two layers and width 48, random
tokens, 2 and 16 texts. Everything that the old inputs span is protected (energy 1). `drift` is
|f(X) - f_then(X)| / |f_then(X)| over the last hidden states of all old tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune import attach, make_recipe
from perpetune.rules import TaskContext

from .command import Benchmark, Option, WrongOption, bundled_model

RECIPES = ("pegp_adapter", "pegp_lora", "pegp_lora_fresh", "pegp_prompt", "pegp_prefix", "pegp_bias", "pegp_ia3", "gpm")
FORMS = ("none", "gradient", "update", "both")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """inputs: keyword arguments of the model, a batch of N; labels (N,)."""

    inputs: Batch
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """One course: the drift of old outputs, the loss on the new task at the end, and before its tuner has moved."""

    recipe: str
    protected: str
    dtype: str
    drift: float
    loss: float
    promises_kept: bool | None


def last_hidden(model: nn.Module, inputs: Batch) -> Tensor:
    """(tokens x d) of all tokens that are not padding."""
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def course(base: nn.Module, recipe: str, form: str, old: Task, new: Task, steps: tuple[int, int], lr: float) -> Row:
    """Learn both tasks with the recipe's tuner and its rule in one of FORMS."""
    torch.manual_seed(0)
    made = make_recipe({"name": recipe, "energy": 1.0})
    protected: Any = made.rules[0]
    rules = [] if form == "none" else [replace(protected, on=form)]
    model = made.tuner.attach(copy.deepcopy(base))
    momentum: dict[nn.Parameter, Any] = {}
    loss = float("nan")
    then = Tensor()
    for index, (task, number) in enumerate(zip((old, new), steps, strict=True)):
        if index:
            if protected.branch == "fresh":
                model, momentum = made.tuner.attach(model.merge_and_unload()), {}  # type: ignore[operator]
            model.eval()
            with torch.no_grad():
                then = last_hidden(model, old.inputs)
        width, dtype = base.config.hidden_size, next(base.parameters()).dtype  # type: ignore[union-attr]
        head = nn.Linear(width, int(task.labels.max()) + 1).to(dtype)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([*params, *head.parameters()], lr=lr, weight_decay=0.01)
        optimizer.state.update({p: momentum[p] for p in params if p in momentum})
        inputs = [task.inputs]
        attached = attach(model, optimizer, rules, index=index, batches=lambda inputs=inputs: inputs)
        for first in range(number):
            chosen = torch.arange(first * 8, first * 8 + 8) % len(task.labels)
            batch = {k: v[chosen] for k, v in task.inputs.items()}
            mask = batch["attention_mask"].unsqueeze(-1)
            features = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            value = F.cross_entropy(head(features), task.labels[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            loss = value.item()
        attached.remove()
        momentum = dict(optimizer.state)
        holds = [m.holds for rule in rules for m in rule.guarantee()] if index else []
        for rule in rules if not index else ():
            rule.end_task(TaskContext(model, index, lambda inputs=inputs: inputs))
    with torch.no_grad():
        now = last_hidden(model, old.inputs)
    drift = ((now - then).double().norm() / then.double().norm()).item()
    kept = None if all(h is None for h in holds) else all(h is not False for h in holds)
    return Row(recipe, form, str(next(base.parameters()).dtype).removeprefix("torch."), drift, loss, kept)


def small(dtype: torch.dtype) -> nn.Module:
    """A random BERT, wide enough that two short texts leave half of its directions free."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).to(dtype)


def random_task(count: int, classes: int, seed: int) -> Task:
    """`count` texts of 8 random tokens, the first of them half padding, which must not count."""
    ids = torch.randint(60, (count, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return Task({"input_ids": ids, "attention_mask": mask}, torch.arange(count) % classes)


def texts(model: str, streams: Path, task: str, count: int) -> Task:
    """Some texts of a task of `cl-benchmark`, spread over its classes."""
    from transformers import AutoTokenizer

    from perpetune import load_stream

    rows = load_stream(streams, tasks=[task], train_limit=count).tasks[0].train
    names = sorted(set(rows["label"]))
    encoded = AutoTokenizer.from_pretrained(model)(
        list(rows["text"]), truncation=True, max_length=24, padding=True, return_tensors="pt"
    )
    return Task(dict(encoded), torch.tensor([names.index(y) for y in rows["label"]]))


def real(name: str, streams: Path, dtype: torch.dtype) -> tuple[nn.Module, Task, Task]:
    """An encoder without dropout, the old texts and the new ones."""
    from transformers import AutoModel

    base = AutoModel.from_pretrained(name, add_pooling_layer=False, dtype=dtype)
    for dropout in (m for m in base.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    return base, texts(name, streams, "agnews", 6), texts(name, streams, "dbpedia", 64)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| recipe | no rule | gradient projected | update projected | both | loss of task 2 (update) | without a rule |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in dict.fromkeys(r.recipe for r in rows):
        by = {r.protected: r for r in rows if r.recipe == name}
        drifts = [f"{by[form].drift:.1e}" if form in by else "" for form in FORMS]
        losses = [f"{by[form].loss:.3f}" if form in by else "" for form in ("update", "none")]
        lines.append(f"| {name} | {' | '.join(drifts)} | {' | '.join(losses)} |")
    return "\n".join(lines)


def measured(options: argparse.Namespace) -> list[Row]:
    dtype = getattr(torch, options.dtype)
    if options.small:
        base, old, new = small(dtype), random_task(2, 2, 1), random_task(16, 4, 2)
    elif options.stream is None:
        raise WrongOption("--stream says where the texts are; or take --small")
    else:
        base, old, new = real(options.model or bundled_model(), options.stream, dtype)
    rows = []
    for recipe in options.recipes:
        for form in options.forms:
            rows.append(course(base, recipe, form, old, new, tuple(options.steps), options.learning_rate))
            print(rows[-1], flush=True)
    return rows


OPTIONS = (
    Option("--model", None, "an encoder (default: the bundled MiniLM)"),
    Option("--small", False, "a small random model and random tokens instead", action="store_true"),
    Option("--stream", None, "folder of cl-benchmark", type=Path),
    Option("--recipes", list(RECIPES), "recipes to measure", nargs="+"),
    Option("--forms", list(FORMS), "what is projected", nargs="+", choices=FORMS),
    Option("--steps", (100, 300), "of task 1 and of task 2", type=int, nargs=2),
    Option("--learning-rate", 1e-3, "of both tasks"),
    Option("--dtype", "float32", "of the model", choices=("float32", "float64")),
)
main = Benchmark("drift", __doc__, OPTIONS, measured, lambda rows: print(table(rows))).main


if __name__ == "__main__":
    main()
