"""The questions that the papers leave open: what runs of a comparison, or a few made here, say of each.

    python -m benchmarks.questions collisions runs/questions/collisions
    python -m benchmarks.questions angles --model runs/omniglot-vit --stream PATH/TO/omniglot

docs/results/what_holds.md has the command of every table. `figures`, `collisions`, `masking`, `representation`
and `cost` look at runs of `perpetune compare`; `angles`, `sweep` and `beta` train. Tables are Markdown: means
over seeds, ± their standard deviation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from torch import Tensor, nn

import perpetune as pt
from perpetune.consolidation.delta_merge import stored_delta
from perpetune.core.tensors import relative_change
from perpetune.deltas.seeded_mask import SeededMask, tensor_id
from perpetune.heads import make_head
from perpetune.metrics.accuracy import AccuracyMatrix, summary
from perpetune.metrics.geometry import pooled_collision_rate
from perpetune.models.backbone import Backbone
from perpetune.models.loading import load_backbone
from perpetune.rules.second_moments import InputMemory
from perpetune.rules.sketches import restore
from perpetune.runs.geometry import updates
from perpetune.runs.result import Result

from .command import Benchmark, Option, WrongOption

TASKS = ("balinese", "early_aramaic", "greek", "latin", "tagalog")
SEEN = ("japanese_katakana", "korean", "sanskrit")  # what the ViT was pre-trained on
TRAINING = {"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 0.002}
TOLERANCES = (1e-4, 1e-3, 1e-2, 1e-1)
KEPT = (0.3, 0.2, 0.1, 0.05)  # masking 70 to 95 %
BETAS = (0.0, 0.1, 0.5, "1/(t+1)")
HEADS: list[Any] = ["linear", "ridge"]
BATCH, ENERGY = 64, 0.99
NAMES = {"final_accuracy": "final", "forgetting": "f", "plasticity": "learned"}
Record = dict[str, Any]


@dataclass
class ChangeL1(pt.Rule):
    """N-LoRA's idea for tuners whose change is no matrix: strength * ||w - w_0||_1, g <- g + strength sign(w - w_0).

    w_0 are the trained weights when the task begins, so that a task changes few entries of an adapter, prefix or
    prompt.
    """

    strength: float = 1e-3
    _weights: list[nn.Parameter] = field(init=False, repr=False, compare=False, default_factory=list)
    _start: list[Tensor] = field(init=False, repr=False, compare=False, default_factory=list)

    def begin_task(self, task: pt.TaskContext) -> None:
        self._weights = [p for p in task.model.parameters() if p.requires_grad]
        if not self._weights:
            raise pt.RuleError("ChangeL1 finds nothing that is trained: use a tuner that trains")
        self._start = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def on_gradient(self) -> None:
        for w, w_0 in zip(self._weights, self._start, strict=True):
            if w.grad is not None:
                w.grad.add_((w - w_0).sign_(), alpha=self.strength)


# ---- runs of a comparison ----


def results(options: argparse.Namespace) -> Iterator[Result]:
    """The finished runs below some folders, as `perpetune compare` lays them: RECIPE/seed-N/HEAD."""
    found = [run.parent for folder in options.runs for run in sorted(folder.glob("*/seed-*/*/run.yaml"))]
    if not found:
        raise WrongOption("no runs are there: give the folder that `perpetune compare` wrote to")
    for result in map(Result, found):
        finished = len(result.tasks) == len(result.config["stream"]["tasks"])
        if finished and (not options.only or result.config["recipe"]["name"] in options.only):
            yield result


def accuracies(result: Result) -> Record:
    """Final accuracy, forgetting and plasticity in points: class-incremental, by head, and `linear` told the task."""
    found: Record = {"recipe": result.config["recipe"]["name"], "seed": result.config["seed"]}
    for head, scenario in result.readings:
        told = summary(result.matrix(head, scenario))
        where = head if scenario != "task" else f"{head}, told"
        for name, short in NAMES.items():
            value = told[name]
            found[f"{short} ({where})"] = None if value is None else 100 * value
    return found


def figures(options: argparse.Namespace) -> list[Record]:
    """What every run ends with, and how far it moved the features of earlier tasks' test inputs."""
    moved = "change of features on earlier tasks' test inputs"
    rows = []
    for result in results(options):
        drifts = [g["value"] for g in result.guarantees if g["name"] == moved]
        rows.append({**accuracies(result), "moved": max(drifts, default=None)})
    return rows


def collisions(options: argparse.Namespace) -> list[Record]:
    """The geometry of a run's LoRA updates beside what it forgets."""
    rows = []
    for result in results(options):
        found = result.geometry(TOLERANCES[0])
        layers = updates(result)
        rates = {f"met > {t:g}": pooled_collision_rate(layers, t) for t in TOLERANCES[1:]}
        names = {"subspace_overlap": "OO", "awom": "AWOM", "nuclear_norm": "nuclear", "above_share": "above 1 %"}
        rest = {short: found[name] for name, short in names.items()}
        rates = {f"met > {TOLERANCES[0]:g}": found["average_collision_rate"], **rates}
        rows.append({**accuracies(result), **rates, **rest})
    return rows


def masking(options: argparse.Namespace) -> list[Record]:
    """Cosines of two tasks' deltas before and after masks by seed, beside keep times the cosine before.

    The runs are of `soup`, which keeps whole deltas; the masks are those of `sotu` with seed 0.
    """
    rows = []
    for result in results(options):
        deltas = [stored_delta(commit) for commit in result.active]
        names = sorted(deltas[0].parts)
        whole = [torch.cat([delta.dense(n).flatten() for n in names]) for delta in deltas]
        pairs = list(itertools.combinations(range(len(deltas)), 2))
        before = [float(torch.cosine_similarity(whole[i], whole[j], dim=0)) for i, j in pairs]
        recipe = {"recipe": result.config["recipe"]["name"], "seed": result.config["seed"]}
        for keep in KEPT:
            masks = [_mask(keep, delta.task_key, {n: deltas[0].parts[n].size for n in names}) for delta in deltas]
            masked = [d * m for d, m in zip(whole, masks, strict=True)]
            after = [float(torch.cosine_similarity(masked[i], masked[j], dim=0)) for i, j in pairs]
            hits = torch.stack(masks).sum(0)
            rows.append(
                {
                    **recipe,
                    "recipe": f"keep {keep:g}",
                    "cosine before": statistics.fmean(before),
                    "largest before": max(before),
                    "cosine after": statistics.fmean(after),
                    "keep x cosine": keep * statistics.fmean(before),
                    "largest error": max(abs(a - keep * b) for a, b in zip(after, before, strict=True)),
                    "in 2 or more": float((hits > 1).float().mean()),
                    "kept and met": float((hits > 1).sum() / (hits > 0).sum()),
                }
            )
    return rows


def _mask(keep: float, task_key: int, sizes: Mapping[str, int]) -> Tensor:
    """The entries that a task keeps of all tensors, one after the other: 1 or 0."""
    mask = SeededMask.of("bernoulli", keep, seed=0, task_key=task_key)
    out = torch.zeros(sum(sizes.values()))
    offset = 0
    for name, size in sizes.items():
        for start, _, positions in mask.chunks(tensor_id(name), size):
            out[offset + start + torch.from_numpy(np.asarray(positions))] = 1
        offset += size
    return out


def representation(options: argparse.Namespace) -> list[Record]:
    """Ridge and lda on alphabets that a run never learned, read off its features and off those of the base."""
    stream, rows = _stream(options), []
    base = {"recipe": "base", "seed": 0, **_readings(load_backbone(options.model, "image"), stream, options.held_out)}
    rows = [base]
    for result in results(options):
        named = {"recipe": result.config["recipe"]["name"], "seed": result.config["seed"]}
        backbone = pt.Learner.open(result.path, model=options.model, device="cpu").backbone
        rows.append({**named, **_readings(backbone, stream, options.held_out)})
    return rows


def _readings(backbone: Backbone, stream: pt.Stream, names: Sequence[str]) -> Record:
    """Accuracy of heads of sums on all classes of these tasks together, on test pictures."""
    part = stream.select(names)
    splits = ("train", "test")
    rows = {split: datasets.concatenate_datasets([getattr(task, split) for task in part]) for split in splits}
    X = {split: backbone.features(backbone.prepare(table), BATCH) for split, table in rows.items()}
    y = {split: torch.tensor(table["label"]) for split, table in rows.items()}
    found: Record = {}
    for head in map(make_head, ("ncm", HEADS[1], "lda")):
        head.open(backbone.width, part.labels, seed=0)
        head.begin_task(sorted({c for task in part for c in task.classes}))
        head.observe(X["train"], y["train"], rows["train"]["id"])
        head.end_task()
        found[head.name] = 100 * float((head.scores(X["test"]).argmax(1) == y["test"]).double().mean())
    return found


def cost(options: argparse.Namespace) -> list[Record]:
    """Seconds of training and of all else, bytes on disk and steps of a task, from the journals."""
    rows = []
    for result in results(options):
        tasks = result.per_task

        def median(name: str, tasks: Sequence[Record] = tasks) -> float:
            return statistics.median(task[name] for task in tasks)

        record = {"recipe": result.config["recipe"]["name"], "seed": result.config["seed"]}
        steps = sum(task["steps"] for task in tasks)
        rows.append(
            {
                **record,
                "ms a step": 1e3 * sum(task["train_seconds"] for task in tasks) / steps if steps else None,
                "s a task, training": median("train_seconds"),
                "s a task, the rest": median("evaluate_seconds"),
                "kB a task": median("disk_bytes") / 1e3,
            }
        )
    return rows


# ---- runs made here ----


def _stream(options: argparse.Namespace) -> pt.Stream:
    if options.stream is None or options.model is None:
        raise WrongOption("this question trains or reads pictures: give --model and --stream")
    stream = pt.load_stream(options.stream, validation_share=options.validation)
    return stream.on_validation() if options.validation else stream


def angles(options: argparse.Namespace) -> list[Record]:
    """The projection rule as an observer: what each task's inputs span in every linear layer, now and later.

    M_j(t) spans the share ENERGY of what task j's training pictures put into a layer when t tasks are learned; means
    are over layers. `near`: mean cos^2 of the principal angles between M_j(j) and M_t(t) of later tasks t, with the
    smaller space as the reference. `same`: the same between M_j(j) and M_j(T). `held`: the share of the energy of task
    j's inputs at the end that lies in M_j(j), what a projection on M_j(j) would still protect.
    """
    stream, rows = _stream(options).select(options.tasks), []
    recipes = {"lora": {"name": "lora", "target": "all-linear"}, "sequential": "sequential"}
    for (name, recipe), seed in itertools.product(recipes.items(), options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            spans: list[list[dict[str, InputMemory]]] = []
            for t in range(1, len(stream) + 1):
                learner = pt.Learner(
                    options.model, recipe, folder, heads=HEADS, training=TRAINING, seed=seed, device="cpu"
                )
                result = learner.learn(stream.select(options.tasks[:t]))
                now = [_moments(learner.backbone, task.train) for task in stream.tasks[:t]]
                spans.append(now)
            values = {head: result.matrix(head, "class").values for head in ("linear", "ridge")}
        last = len(stream) - 1
        for j in range(last):
            own, end = spans[j][j], spans[last][j]
            later = [_cosines(own, spans[t][t]) for t in range(j + 1, len(stream))]
            held = [float(end[n].stored(own[n].basis(ENERGY).mT) / end[n].total) for n in own]
            lost = {head: 100 * float(np.nanmax(v[j:last, j]) - v[last, j]) for head, v in values.items()}
            rows.append(
                {
                    "recipe": f"{name}, task {j + 1}",
                    "seed": seed,
                    "near": statistics.fmean(later),
                    "same": _cosines(own, end),
                    "held": statistics.fmean(held),
                    "directions": statistics.fmean(m.basis(ENERGY).shape[1] / m.width for m in own.values()),
                    **{f"lost ({head})": value for head, value in lost.items()},
                }
            )
            print(rows[-1], flush=True)
    for name in recipes:
        mine = [row for row in rows if row["recipe"].startswith(name)]
        for what, head in itertools.product(("near", "same", "held"), ("linear", "ridge")):
            r = _rank_correlation([m[what] for m in mine], [m[f"lost ({head})"] for m in mine])
            print(f"{name}: rank correlation of `{what}` with what is lost ({head}): {r:.2f} (n = {len(mine)})")
    return rows


def _moments(backbone: Backbone, table: datasets.Dataset) -> dict[str, InputMemory]:
    """By the first layer that reads it, every input of the model's linear layers over these rows."""
    examples = backbone.prepare(table)
    rule = pt.SubspaceProjection(ENERGY)
    trained = {p: p.requires_grad for p in backbone.model.parameters()}
    for p in trained:
        p.requires_grad_(True)  # the rule looks at what is trained
    rule.observe(
        backbone.model,
        lambda: (backbone.batch(examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)),
    )
    for p, before in trained.items():
        p.requires_grad_(before)
    state = rule.state()
    first = {int(number): key.removeprefix("reads.") for key, number in reversed(state.items()) if "reads." in key}
    return {name: restore({"C": state[f"input.{i}.C"]}) for i, name in first.items()}


def _cosines(one: Mapping[str, InputMemory], other: Mapping[str, InputMemory]) -> float:
    """Mean cos^2 of the principal angles between two spaces, and over layers: 1 where one lies in the other."""
    found = []
    for name in one:
        M, N = one[name].basis(ENERGY), other[name].basis(ENERGY)
        found.append(float((M.mT @ N).square().sum()) / min(M.shape[1], N.shape[1]))
    return statistics.fmean(found)


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def sweep(options: argparse.Namespace) -> list[Record]:
    """The recipes of a configuration in a plain loop, with its training settings, seeds and tasks: see `_course`."""
    if options.config is None:
        raise WrongOption("`sweep` trains the recipes of a file: give --config")
    settings = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    stream, rows = _stream(options).select(options.tasks), []
    for recipe, seed in itertools.product(settings["recipes"], options.seeds):
        made = pt.make_recipe(recipe)
        if options.only and made.name not in options.only:
            continue
        rows.append({"recipe": made.name, "seed": seed, **_course(options.model, made, stream, seed)})
        print(rows[-1], flush=True)
    return rows


def beta(options: argparse.Namespace) -> list[Record]:
    """PEGP's soft projection: every later task is trained twice from the same start, with the rule to p and without to
    q; it ends at (1 - beta) p + beta q, t counting tasks from 0. The recipe is `pegp_adapter`.

    The released code also pulls q's features to those of p, which is left out.
    """
    stream, rows = _stream(options).select(options.tasks), []
    for value, seed in itertools.product(BETAS, options.seeds):
        found = _course(options.model, pt.make_recipe("pegp_adapter"), stream, seed, value)
        rows.append({"recipe": f"beta {value}", "seed": seed, **found})
        print(rows[-1], flush=True)
    return rows


def _course(model: str, recipe: pt.Recipe, stream: pt.Stream, seed: int, beta: float | str = 0.0) -> Record:
    """One task after another, TRAINING each; what is forgotten and learned, and how changes lie to each other.

    Nothing is written down, so that this costs a quarter of a run. The tuner goes on from task to task, or is merged
    where the recipe says so. `moved`: how far features of test pictures are from where they were when their task was
    learned, relative, the task that moved most. `changed`, `met`: share of the trained numbers that a task changes by
    more than 1 % of the largest change of their tensor in any task, and that two tasks change so.
    """
    torch.manual_seed(seed)
    recipe = pt.Recipe.from_dict(recipe.to_dict())  # rules with nothing in their memory
    backbone, fresh = load_backbone(model, "image"), recipe.consolidation.branch == "fresh"
    heads = [make_head(head) for head in HEADS]  # the first is trained
    for head in heads:
        head.open(backbone.width, stream.labels, seed=seed)
    train, test = ([backbone.prepare(getattr(t, split)) for t in stream] for split in ("train", "test"))
    truth = [torch.tensor(task.test["label"]) for task in stream]
    matrices = {name: np.full((len(stream), len(stream)), np.nan) for name in ("linear", "ridge", "told")}
    then: list[Tensor] = []
    changes: list[list[Tensor]] = []
    for t, task in enumerate(stream):
        if fresh or not t:
            backbone.model = recipe.tuner.attach(backbone.model)
        weights = [p for p in backbone.model.parameters() if p.requires_grad]
        start = _copies(weights)
        share = 1 / (t + 1) if isinstance(beta, str) else beta
        for head in heads:
            head.begin_task(task.classes)
        q = None
        if t and share:  # the head of the first training stays, as it reads what is kept
            _train(backbone, weights, train[t], _trained(heads[0], task, stream, seed), [], t, seed)
            q = _copies(weights)
            _put(weights, start)
        _train(backbone, weights, train[t], heads[0], recipe.rules, t, seed)
        if q is not None:
            _put(weights, [(1 - share) * p + share * other for p, other in zip(_copies(weights), q, strict=True)])
        changes.append([w - before for w, before in zip(_copies(weights), start, strict=True)])
        for rule in recipe.rules:
            rule.end_task(pt.TaskContext(backbone.model, t, _batches(backbone, train[t])))
        if fresh:
            backbone.model = backbone.model.merge_and_unload()
        heads[1].observe(backbone.features(train[t], BATCH), torch.tensor(task.train["label"]), task.train["id"])
        for head in heads:
            head.end_task()
        now = [backbone.features(examples, BATCH) for examples in test[: t + 1]]
        then.append(now[-1])
        for j, X in enumerate(now):
            scores = {"linear": heads[0].scores(X), "ridge": heads[1].scores(X), "told": heads[0].scores(X, task=j)}
            for name, found in scores.items():
                matrices[name][t, j] = float((found.argmax(1) == truth[j]).double().mean())
    record: Record = {}
    sizes, none = np.array([len(y) for y in truth]), np.full(len(stream), np.nan)
    for name, values in matrices.items():
        told = summary(AccuracyMatrix(values, sizes, none, tuple(task.name for task in stream)))
        where = "linear, told" if name == "told" else name
        for long, short in NAMES.items():
            record[f"{short} ({where})"] = 100 * (told[long] or 0.0)
    record["moved"] = max(relative_change(a, b) for a, b in zip(now[:-1], then, strict=False))
    return record | _meetings(changes)


def _meetings(changes: Sequence[Sequence[Tensor]]) -> Record:
    """Of every task the change of every tensor that was trained."""
    largest = [max(float(change.abs().max()) for change in layer) or 1.0 for layer in zip(*changes, strict=True)]
    layers = [
        [change.reshape(1, -1) / top for change in layer]
        for layer, top in zip(zip(*changes, strict=True), largest, strict=True)
    ]
    above = sum(int((change.abs() > 0.01).sum()) for layer in layers for change in layer)
    l1 = statistics.fmean(sum(float(c.abs().sum()) for c in task) for task in changes)
    entries = sum(change.numel() for layer in layers for change in layer)
    return {"changed": above / entries, "met": pooled_collision_rate(layers, 0.01), "l1 of a change": l1}


def _copies(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.detach().clone() for w in weights]


@torch.no_grad()
def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(weights), list(values))


def _trained(like: pt.Head, task: pt.Task, stream: pt.Stream, seed: int) -> pt.Head:
    """A head of its own for a training that is thrown away."""
    head = make_head(HEADS[0])
    head.open(like.width, stream.labels, seed=seed)
    head.begin_task(task.classes)
    return head


def _batches(backbone: Backbone, examples: Sequence[Any]) -> Callable[[], Iterator[dict[str, Tensor]]]:
    return lambda: (backbone.batch(list(examples[i : i + BATCH])) for i in range(0, len(examples), BATCH))


def _train(
    backbone: Backbone,
    weights: Sequence[nn.Parameter],
    examples: Sequence[Any],
    head: Any,
    rules: Sequence[pt.Rule],
    index: int,
    seed: int,
) -> None:
    """TRAINING of these weights and the head on one task."""
    size, epochs, rate = (TRAINING[k] for k in ("per_device_train_batch_size", "num_train_epochs", "learning_rate"))
    steps = epochs * -(-len(examples) // size)
    trained = [*weights, *(p for p in head.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    attached = pt.attach(backbone.model, optimizer, rules, index=index, batches=_batches(backbone, examples))
    order = torch.Generator().manual_seed(1000 * seed + index)
    backbone.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(examples), generator=order).split(size):
            batch = backbone.collate([examples[i] for i in chosen.tolist()])
            labels = batch.pop("labels")
            optimizer.zero_grad()
            head.loss(backbone(**batch), labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    attached.remove()
    backbone.eval()


# ---- the table ----


def table(rows: Sequence[Record]) -> str:
    """Markdown: a line for each recipe, with means over seeds."""
    columns = [c for c in rows[0] if c not in ("recipe", "seed")]
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row["recipe"], []).append(row)
    lines = [["", "seeds", *columns], ["---", "---:", *("---:" for _ in columns)]]
    for name, group in groups.items():
        lines.append([name, str(len(group)), *(_cell(column, group) for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(column: str, rows: Sequence[Record]) -> str:
    """Mean and spread; points, whose names have brackets, with one digit."""
    values = [row.get(column) for row in rows]
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "–"
    mean = statistics.fmean(known)
    form = ".1f" if abs(mean) >= 1 or "(" in column else ".3f" if abs(mean) >= 0.001 or mean == 0 else ".1e"
    spread = "" if len(known) < 2 else f" ± {statistics.stdev(known):{form}}"
    return f"{mean:{form}}{spread}"


QUESTIONS: dict[str, Callable[[argparse.Namespace], list[Record]]] = {
    f.__name__: f for f in (figures, collisions, masking, representation, cost, angles, sweep, beta)
}
OPTIONS = (
    Option("question", None, "what to answer", choices=tuple(QUESTIONS)),
    Option("runs", [], "folders that `perpetune compare` wrote to", nargs="*", type=Path),
    Option("--model", None, "folder of the base model"),
    Option("--stream", None, "folder of omniglot"),
    Option("--tasks", list(TASKS), "tasks to learn, in this order", nargs="+"),
    Option("--validation", 0.0, "measure on this share of the training pictures, to choose a setting by"),
    Option("--held-out", list(SEEN), "of `representation`: tasks to read", nargs="+"),
    Option("--config", None, "of `sweep`: a file with recipes", type=Path),
    Option("--only", [], "recipes to look at; all if none are named", nargs="+"),
    Option("--seeds", [0, 1, 2], "of runs made here", nargs="+", type=int),
)
main = Benchmark(
    "questions", __doc__, OPTIONS, lambda options: QUESTIONS[options.question](options), lambda rows: print(table(rows))
).main


if __name__ == "__main__":
    main()
