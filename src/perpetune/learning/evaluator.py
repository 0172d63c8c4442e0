"""What a model predicts on every task so far; features are computed once for every state of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..consolidation import Consolidation, Session
from ..consolidation.states import PerTaskStates, Reading, by_likeliest_state, only
from ..core.progress import Progress
from ..heads import Head
from ..metrics.text import LIKELIHOOD, decided, graded, mean_probability
from ..models.backbone import Backbone, Examples
from ..runs.result import SCORE
from ..streams import Stream, Task

KEPT = 4000  # test examples of all tasks that are held as model inputs; of further tasks they are made when read
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
        self._kept = 0
        self._features: dict[tuple[str, str], tuple[int, Tensor]] = {}
        self._views: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self._embedded: dict[str, tuple[int, set[int]]] = {}
        self._responses: dict[str, tuple[int, Tensor]] = {}
        self.drift: dict[str, float] = {}

    def features(self, task: Task, split: str, classes: Sequence[int] = ()) -> Tensor:
        """Features of a split (N x width) under the model as it is now, for a choice among these classes."""
        key = (task.name, split)
        version, before = self._features.get(key, (-1, None))
        features = before
        if features is None or version != self.backbone.version or not self.backbone.holds(features, classes):
            examples = self.prepared(task, split)
            with self.progress.bar(f"features of {task.name}", len(examples)) as advance:
                features = self.backbone.outputs(examples, self.batch_size, advance, classes)
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
        """The model inputs of a split; those of test texts are kept, up to `KEPT` of them."""
        key = (task.name, split)
        if key in self._examples:
            return self._examples[key]
        examples = self.backbone.prepare(getattr(task, split))
        pixels = self.backbone.modality == "image" or any("picture" in e for e in examples)
        if split == "test" and not pixels and self._kept + len(examples) <= KEPT:  # pixels would fill the memory
            self._examples[key] = examples
            self._kept += len(examples)
        return examples

    def observed(self, task: Task, states: PerTaskStates | None) -> Tensor:
        """What heads gather statistics of: training samples of a task (N x width), under its own state where each task
        has one."""
        if states is None:
            return self.features(task, "train")
        examples = self.prepared(task, "train")
        return states.observed(Reading(len(examples), partial(self._read, states, task, examples)))

    def reading(self, states: PerTaskStates, task: Task) -> Reading:
        """The test examples of a task under each state of the model.

        These states do not change any more, so that each example is read once under each.
        """
        return Reading(len(task.test), partial(self._viewed, states, task))

    def _viewed(self, states: PerTaskStates, task: Task, view: int | None, rows: Tensor) -> Tensor:
        size = len(task.test)
        width = self.backbone.pooled_width if view is None else self.backbone.width
        empty = (torch.empty(size, width), torch.zeros(size, dtype=torch.bool))
        known, done = self._views.setdefault((task.name, view), empty)
        new = rows[~done[rows]]
        if len(new):
            known[new], done[new] = self._read(states, task, self.prepared(task, "test"), view, new), True
        return known[rows]

    def _read(self, states: PerTaskStates, task: Task, examples: Examples, view: int | None, rows: Tensor) -> Tensor:
        chosen = [examples[i] for i in rows.tolist()]
        with self.progress.bar(f"features of {task.name}", len(rows)) as advance:
            return under_state(self.backbone, states, view, chosen, self.batch_size, advance)

    def _note_drift(self, states: PerTaskStates, task: Task, own: int, before: int) -> None:
        """Of a task that is learned: whether its test inputs are read as they were before the last session.

        Args:
            own, before: the state that reads the task now, and did before.
        """
        some = torch.arange(min(PROBE, len(task.test)))
        then = self._viewed(states, task, before, some)
        now = self._read(states, task, self.prepared(task, "test"), own, some)
        self.drift[task.name] = self.backbone.change(now, then)

    def responses(self, task: Task) -> Tensor:
        """log p(response | prompt) and the number of its tokens of a task's test examples under the model as it is now
        (N x 2)."""
        version, found = self._responses.get(task.name, (-1, None))
        if found is None or version != self.backbone.version:
            examples = self.prepared(task, "test")
            with self.progress.bar(f"loss on {task.name}", len(examples)) as advance:
                found = self.backbone.responses(examples, self.batch_size, advance)
            self._responses[task.name] = (self.backbone.version, found)
        return found

    def _graded(self, task: Task, states: PerTaskStates | None, weights: Tensor | None) -> list[float]:
        """The scores of free texts: of generated answers to their test prompts, or the likelihood of their responses;
        each under the likeliest of the states that it is shown to."""
        examples = self.prepared(task, "test")

        def asked(read: Callable[[Examples], list[Any]]) -> list[Any]:
            if states is None or weights is None:
                return read(examples)
            return by_likeliest_state(states, weights, lambda rows: read([examples[i] for i in rows]))

        if task.metric != LIKELIHOOD:
            name, responses = str(task.metric), task.test["response"][:]
            examples = [{**e, "decided": partial(decided, name, r)} for e, r in zip(examples, responses, strict=True)]
            return graded(name, asked(lambda some: self.backbone.answers(some, self.batch_size)), responses)
        found = self.responses(task).tolist() if states is None else asked(self._log_p)
        return [mean_probability(log_p, tokens) for log_p, tokens in found]

    def _log_p(self, examples: Examples) -> list[Any]:
        return self.backbone.responses(examples, self.batch_size).tolist()

    def predictions(
        self,
        stream: Stream,
        session: Session | None,
        heads: Sequence[Head],
        consolidation: Consolidation,
        tasks: Sequence[Task] | None = None,
    ) -> dict[str, Tensor]:
        """Predicted classes, or scores of free texts, of every head on tasks of the stream; on those not learned yet,
        if it can name their classes.

        Args:
            session: the session just learned; None for the untouched model.
            tasks: those that are read; None takes all learned so far, or all, for the untouched model.

        Returns:
            `target/TASK` and `HEAD/SCENARIO/TASK`, each (n_j,) int32, -1 where a head names no class; of free texts
            `score/HEAD/SCENARIO/TASK`, (n_j,) fp32. Where the model has a state for every task: `route/TASK`, the
            likeliest task of each example, and `asked/TASK`, how many tasks it is shown to.
        """
        learned = session.learned if session is not None else 0
        seen = {c for task in stream.tasks[:learned] for c in task.candidates}
        every = stream.tasks if session is None else stream.tasks[:learned]
        asked = {task.name for task in (every if tasks is None else tasks)}
        upto = max([learned, *(i + 1 for i, task in enumerate(stream) if task.name in asked)])
        self.embed(heads, stream.labels, [task.candidates for task in stream.tasks[:upto]])
        learned_in = {t.name: s.index for s in consolidation.schedule(stream) for t in s.tasks}
        out: dict[str, Tensor] = {}
        for position, task in enumerate(stream):
            if task.name not in asked or not len(task.test):  # its data may be gone
                continue
            known = position < learned
            # b_j of the untouched model and a(j - 1, j) must choose among the same classes
            before = {c for t in stream.tasks[:position] for c in t.candidates} if session is None else seen
            able = [head for head in heads if known or head.knows(task.classes)]
            states = consolidation.states if session is not None else None
            if states and not known and (states.needs_task or not seen.issuperset(task.candidates)):
                continue  # no adapter knows these classes
            if not able:
                continue
            when = learned_in[task.name]
            own = consolidation.reads(when, session.index) if session is not None and known else None
            weights, reading = None, None
            if states and session is not None:
                reading = self.reading(states, task)
                if own is not None and task.metric is None:
                    self._note_drift(states, task, own, consolidation.reads(when, max(when, session.index - 1)))
                weights = states.weights(reading, own)
                if states.routes:
                    route = weights.argmax(1).to(torch.int32)
                    # a state that was reopened by a later task is still the task's own
                    out[f"route/{task.name}"] = route if own is None else route.masked_fill(route == own, when)
                    out[f"asked/{task.name}"] = (weights > -torch.inf).sum(1).to(torch.int32)
            if task.metric is not None:
                scored = torch.tensor(self._graded(task, states, weights))
                for head, scenario in product(able, readings(stream)):
                    out[f"{SCORE}{head.name}/{scenario}/{task.name}"] = scored
                continue
            if states and reading is not None and weights is not None:
                scores = partial(_state_scores, states, reading, weights, len(stream.labels))
            else:
                scores = partial(_scores, self.features(task, "test", choices(stream, task, before)))
            out[f"target/{task.name}"] = torch.tensor(task.test["label"][:], dtype=torch.int32)
            for head in able:
                for scenario in readings(stream):
                    allowed = sorted(task.candidates) if scenario == "task" else sorted({*before, *task.candidates})
                    chosen = best_class(scores(head, own if scenario == "task" else None), allowed)
                    out[f"{head.name}/{scenario}/{task.name}"] = chosen.to(torch.int32)
        return out


def under_state(
    backbone: Backbone,
    states: PerTaskStates,
    view: int | None,
    examples: Examples,
    size: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """What heads read of examples under the state of a task (N x width); view None: what routes them
    (N x pooled_width). size: examples a forward pass."""
    with states.view(view):
        if view is None:
            return backbone.pooled(examples, size, advance)
        return backbone.outputs(examples, size, advance, states.task_classes(view))


def read_by_state(backbone: Backbone, states: PerTaskStates, examples: Examples, size: int) -> Reading:
    """Examples under every state; what routes them is read once."""
    read = partial(under_state, backbone, states, size=size)
    routing = cache(lambda: read(None, examples))  # all at once, whichever are asked for

    def rows_of(view: int | None, rows: Tensor) -> Tensor:
        return routing()[rows] if view is None else read(view, [examples[i] for i in rows.tolist()])

    return Reading(len(examples), rows_of)


def answers_by_state(
    backbone: Backbone, states: PerTaskStates, weights: Tensor, examples: Examples, size: int, **how: Any
) -> list[str]:
    """Generated answers, each under the likeliest of the states that its prompt is shown to (weights: N x T)."""
    return by_likeliest_state(states, weights, lambda rows: backbone.answers([examples[i] for i in rows], size, **how))


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


def _state_scores(
    states: PerTaskStates, reading: Reading, weights: Tensor, classes: int, head: Head, own: int | None
) -> Tensor:
    """Scores by the states that each input is shown to, or, where its task is given, by that of its own."""
    given = weights if own is None else only(own, reading.count, own + 1)
    return states.scores(head, classes, reading, given)
