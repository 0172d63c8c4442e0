"""What a model predicts on every task so far; features are computed once for every state of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from ..consolidation import Consolidation, Step
from ..core.progress import Progress
from ..heads import Head
from ..models.backbone import Backbone, Examples
from ..streams import Stream, Task
from .routed_scores import routed_scores

PROBE = 64  # test examples on which it is seen that the features of an earlier task have not changed


class Evaluator:
    """Features and predictions of whole splits.

    Args:
        batch_size: examples a forward pass.

    Attributes:
        drift: of every task's test inputs, the relative change of their features when the model last changed.
    """

    def __init__(self, backbone: Backbone, batch_size: int, progress: Progress) -> None:
        self.backbone, self.batch_size, self.progress = backbone, batch_size, progress
        self._examples: dict[tuple[str, str], Examples] = {}
        self._features: dict[tuple[str, str], tuple[int, Tensor]] = {}
        self._views: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self._embedded: dict[str, tuple[int, set[int]]] = {}
        self.drift: dict[str, float] = {}

    def features(self, task: Task, split: str, classes: Sequence[int] = ()) -> Tensor:
        """Features of a split (N x width) under the model as it is now, for a choice among these classes."""
        key = (task.name, split)
        version, before = self._features.get(key, (-1, None))
        features = before
        if features is None or version != self.backbone.version or not self.backbone.holds(features, classes):
            examples = self.prepared(task, split)
            with self.progress.bar(f"features of {task.name}", len(examples)) as advance:
                features = self.backbone.about(classes)(examples, self.batch_size, advance)
            if split == "test":  # read again after every task; training data is not
                self.drift[task.name] = 0.0 if before is None else self.backbone.change(features, before)
                self._features[key] = (self.backbone.version, features)
        return features

    def embed(self, heads: Sequence[Head], labels: Sequence[str], groups: Sequence[Sequence[int]]) -> None:
        """Show heads that follow the texts of labels what these are under the model as it is now.

        Args:
            labels: of all classes.
            groups: classes that are read together, so that a group has the same bits whatever follows it.
        """
        for head in heads:
            if not head.follows_texts:
                continue
            version, done = self._embedded.get(head.name, (-1, set()))
            if version != self.backbone.version:
                done = set()
            for group in groups:
                new = [c for c in group if c not in done]
                if new:
                    texts = head.label_prompts([labels[c] for c in new])
                    head.embed(new, self.backbone.label_embeddings(texts, self.batch_size))
                    done.update(new)
            self._embedded[head.name] = (self.backbone.version, done)

    def prepared(self, task: Task, split: str) -> Examples:
        """The model inputs of a split; those of test texts are kept."""
        key = (task.name, split)
        if key in self._examples:
            return self._examples[key]
        examples = self.backbone.prepare(getattr(task, split))
        pixels = self.backbone.modality == "image" or any("picture" in e for e in examples)
        if split == "test" and not pixels:  # which would fill the memory
            self._examples[key] = examples
        return examples

    def viewed(self, consolidation: Consolidation, task: Task, view: int | None, rows: Tensor) -> Tensor:
        """Features of some test examples of a task (len(rows) x width) under one of the model's states; where `view` is
        None, what their routes are found by (len(rows) x pooled_width).

        These states do not change any more, so that each example is read once under each.
        """
        size = len(task.test)
        width = self.backbone.pooled_width if view is None else self.backbone.width
        empty = (torch.empty(size, width), torch.zeros(size, dtype=torch.bool))
        known, done = self._views.setdefault((task.name, view), empty)
        new = rows[~done[rows]]
        if len(new):
            known[new], done[new] = self._view(consolidation, task, view, new), True
        return known[rows]

    def _view(self, consolidation: Consolidation, task: Task, view: int | None, rows: Tensor) -> Tensor:
        examples = self.prepared(task, "test")
        read = self.backbone.pooled if view is None else self.backbone.about(consolidation.task_classes(view))
        with consolidation.view(view), self.progress.bar(f"features of {task.name}", len(rows)) as advance:
            return read([examples[i] for i in rows.tolist()], self.batch_size, advance)

    def _routed(
        self, consolidation: Consolidation, stream: Stream, task: Task, own: int | None, before: int | None
    ) -> tuple[Tensor, Callable[[Head, int | None], Tensor]]:
        """The tasks that a task's test examples are shown to (see `candidates_of`), and what a head makes of them.

        Args:
            own, before: the state that reads the task now, and did before the last step, if it is learned.
        """
        every = torch.arange(len(task.test))
        if own is not None and before is not None:
            some = every[:PROBE]
            then = self.viewed(consolidation, task, before, some)
            self.drift[task.name] = self.backbone.change(self._view(consolidation, task, own, some), then)
        told = consolidation.needs_task  # and then no features say anything of the route
        seen = torch.empty(len(every), 0) if told else self.viewed(consolidation, task, None, every)
        weights = consolidation.candidates_of(seen, own)

        def scores(head: Head, given: int | None) -> Tensor:
            shown = weights
            if given is not None:
                shown = torch.full((len(every), given + 1), -torch.inf)
                shown[:, given] = 0
            read = partial(self.viewed, consolidation, task)
            return routed_scores(head, len(stream.labels), shown, consolidation, read)

        return weights, scores

    def predictions(
        self,
        stream: Stream,
        step: Step | None,
        heads: Sequence[Head],
        consolidation: Consolidation,
        tasks: Sequence[Task] | None = None,
    ) -> dict[str, Tensor]:
        """Predicted classes of every head on tasks of the stream; on those not learned yet, if it can name them.

        Args:
            step: the step just learned; None for the untouched model.
            tasks: those that are read; None takes all learned so far, or all, for the untouched model.

        Returns:
            `target/TASK` and `HEAD/SCENARIO/TASK`, each (n_j,) int32, -1 where a head names no class. Where the model
            has a state for every task: `route/TASK`, the likeliest task of each example, and `asked/TASK`, how many
            tasks it is shown to.
        """
        learned = step.learned if step is not None else 0
        seen = {c for task in stream.tasks[:learned] for c in task.candidates}
        every = stream.tasks if step is None else stream.tasks[:learned]
        asked = {task.name for task in (every if tasks is None else tasks)}
        upto = max([learned, *(i + 1 for i, task in enumerate(stream) if task.name in asked)])
        self.embed(heads, stream.labels, [task.candidates for task in stream.tasks[:upto]])
        learned_in = {t.name: s.index for s in consolidation.schedule(stream) for t in s.tasks}
        out: dict[str, Tensor] = {}
        for position, task in enumerate(stream):
            if task.name not in asked:
                continue
            known = position < learned
            # b_j of the untouched model and a(j - 1, j) must choose among the same classes
            before = {c for t in stream.tasks[:position] for c in t.candidates} if step is None else seen
            able = [head for head in heads if known or head.knows(task.classes)]
            routed = consolidation.routed and step is not None
            if routed and not known and (consolidation.needs_task or not seen.issuperset(task.candidates)):
                continue  # no adapter knows these classes
            if not able:
                continue
            when = learned_in[task.name]
            own = consolidation.reads(when, step.index) if step is not None and known else None
            if routed and step is not None:
                last = consolidation.reads(when, max(when, step.index - 1)) if known else None
                weights, scores = self._routed(consolidation, stream, task, own, last)
                route = weights.argmax(1).to(torch.int32)
                # a state that was reopened by a later task is still the task's own
                out[f"route/{task.name}"] = route if own is None else route.masked_fill(route == own, when)
                out[f"asked/{task.name}"] = (weights > -torch.inf).sum(1).to(torch.int32)
            else:
                scores = partial(_scores, self.features(task, "test", choices(stream, task, before)))
            out[f"target/{task.name}"] = torch.tensor(task.test["label"][:], dtype=torch.int32)
            for head in able:
                for scenario in readings(stream):
                    allowed = sorted(task.candidates) if scenario == "task" else sorted({*before, *task.candidates})
                    chosen = best_class(scores(head, own if scenario == "task" else None), allowed)
                    out[f"{head.name}/{scenario}/{task.name}"] = chosen.to(torch.int32)
        return out


def readings(stream: Stream) -> tuple[str, ...]:
    """In which scenarios a run on this stream is read: class-incremental runs are read with the task given as well."""
    return {"class": ("class", "task"), "domain": ("domain",), "task": ("task",)}[stream.scenario]


def choices(stream: Stream, task: Task, seen: Collection[int]) -> list[int]:
    """The classes among which an example of a task is ever to be placed, once others have been seen."""
    return sorted(task.candidates if readings(stream) == ("task",) else {*seen, *task.candidates})


def best_class(scores: Tensor, allowed: Sequence[int]) -> Tensor:
    """The allowed class of the highest score, (N x C) -> (N,), CPU; -1 where all of them have -inf."""
    best = scores[:, list(allowed)].cpu().max(1)
    return torch.where(best.values == -torch.inf, -1, torch.tensor(allowed)[best.indices])


def _scores(features: Tensor, head: Head, own: int | None) -> Tensor:
    return head.scores(features, own)
