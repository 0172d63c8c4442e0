"""The state of a learner: the base model plus its commits, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..consolidation import Consolidation
from ..heads import Head
from ..heads.increments import combined, increment
from ..models.backbone import Backbone
from ..recipes.recipe import Recipe
from ..runs.commit import Commit, active
from .evaluator import Evaluator
from .general import General
from .harness import Harness
from .setup import Setup

# Heads in a commit: whole states; or what was added since the commit before, and all that does not grow with the tasks.
HEAD, ADDED, SUMS = "head.safetensors", "head_added.safetensors", "head_sums.safetensors"


class Known(NamedTuple):
    """What a state can predict: all label texts, the classes learned so far, the input columns, the tasks learned."""

    labels: Sequence[str]
    classes: Sequence[int]
    inputs: Sequence[str]
    tasks: Sequence[str]


class LearnerState:
    """A recipe on a base model, as the commits of a run leave it. Every bit that follows is decided by these alone.

    Attributes:
        backbone: the model; recipe: a copy of the setup's, which holds state.
        trainer: the head whose loss shapes the features where the first head has none; None where it has.
        evaluator: predictions of this state; known: what it can predict.
        general: what a language model is compared with on prompts and tasks of nobody's stream, see `general_of`.
    """

    def __init__(self, setup: Setup, backbone: Backbone, labels: Sequence[str], inputs: Sequence[str] = ()) -> None:
        """The untouched model, with everything opened for these label texts (C).

        Raises:
            ConfigError, HeadError, ModelError: a piece of the recipe does not fit the model.
        """
        self.setup, self.backbone = setup, backbone
        self.recipe: Recipe = copy.deepcopy(setup.recipe)
        self.evaluator = Evaluator(backbone, setup.batch_size, setup.progress)
        first = self.heads[0]
        self.trainer: Head | None = None if first.trains or not self.recipe.tuner.trains else first.trainer()
        backbone.open_for(self.heads, labels, self.training_head)
        for head in self.all_heads():
            embeddings = None
            if head.needs_label_embeddings:
                embeddings = backbone.label_embeddings(head.label_prompts(labels))
            width = backbone.width
            if self.consolidation.states is not None and head is not self.trainer and not head.blocks:
                width = self.consolidation.states.read_width(width)
            head.open(width, labels, seed=setup.seed, label_embeddings=embeddings)
            if head.starts_from_own:
                own = backbone.own_head()
                head.start_from(own.weight, own.bias, own.labels)
            head.to(setup.device)
        self.consolidation.open(backbone, self.recipe.tuner, labels)
        self._committed: dict[str, dict[str, Tensor]] = {}  # states of heads, as the newest commit leaves them
        self._finished: dict[str, int] = {}  # tasks that heads keep something of, by then
        self._whole_heads = False
        self.known = Known(labels, (), inputs, ())
        self.general: tuple[General | Harness, ...] = ()

    def restore(self, commits: Sequence[Commit], without: str | None = None) -> LearnerState:
        """Bring the untouched model to the state after these commits. Heads and rules are as the newest one left them;
        `without` a task, the weights are as if it had left nothing."""
        self.consolidation.restore([c for c in active(commits) if c.manifest["task"] != without])
        if self.setup.loading.device_map is None:
            self.backbone.to(self.setup.device)
        if not commits:
            return self
        newest, heads = commits[-1], dict(self.named_heads())
        self._committed = states = head_states(commits, heads)
        self._whole_heads = any(commit.has(HEAD) and "reverts" not in commit.manifest for commit in commits[1:2])
        for name, head in heads.items() if states else ():
            head.load_state(states.get(name, {}))
            self._finished[name] = head.finished
        if newest.has("rules.safetensors"):
            stored = newest.tensors("rules.safetensors")
            for i, rule in enumerate(self.recipe.rules):
                rule.load_state({k.split(".", 1)[1]: v for k, v in stored.items() if k.startswith(f"{i}.")})
        self.learned(newest.manifest["classes"], newest.manifest["learned"])
        return self

    def learned(self, classes: Sequence[int], tasks: Sequence[str]) -> None:
        self.known = self.known._replace(classes=classes, tasks=tasks)

    @property
    def heads(self) -> tuple[Head, ...]:
        return self.recipe.heads

    @property
    def consolidation(self) -> Consolidation:
        return self.recipe.consolidation

    @property
    def training_head(self) -> Head:
        """The head whose loss is trained with."""
        return self.trainer or self.heads[0]

    def named_heads(self) -> Iterator[tuple[str, Head]]:
        """All heads, by the names under which a commit stores them."""
        yield from ((head.name, head) for head in self.heads)
        if self.trainer is not None:
            yield "trainer", self.trainer

    def all_heads(self) -> list[Head]:
        return [head for _, head in self.named_heads()]

    def files(self, predictions: dict[str, Tensor], whole: bool = False) -> dict[str, Any]:
        """What a commit holds besides what the consolidation stores: heads, rules, predictions.

        Args:
            whole: the state of heads, and not what was added to it since the last commit. A run that began with whole
                states, as earlier versions did, goes on with them.
        """
        rules = {f"{i}.{k}": v for i, rule in enumerate(self.recipe.rules) for k, v in rule.state().items()}
        whole = whole or self._whole_heads
        before, done = self._committed, {} if whole else self._finished
        states = {name: head.recent_state(done.get(name, 0)) for name, head in self.named_heads()}
        self._committed, self._finished = states, {name: head.finished for name, head in self.named_heads()}
        if whole:
            heads = {HEAD: _named(states)}
        else:
            parts = {name: increment(head, before.get(name, {}), states[name]) for name, head in self.named_heads()}
            heads = {ADDED: _named({n: added for n, (added, _) in parts.items()})}
            heads[SUMS] = _named({n: sums for n, (_, sums) in parts.items()})
        return {
            **{file: held for file, held in heads.items() if held or file == HEAD},
            **({"rules.safetensors": rules} if rules else {}),
            "predictions.safetensors": predictions,
        }


def head_states(commits: Sequence[Commit], heads: Mapping[str, Head]) -> dict[str, dict[str, Tensor]]:
    """The states of heads after the last of these commits, by name; nothing before the first task.

    Args:
        commits: of a run, from its first; heads: by the names under which they are stored.
    """
    last = next((i for i in reversed(range(len(commits))) if commits[i].has(HEAD)), None)
    start = _by_head(commits[last], HEAD) if last is not None else {}
    since = [commit for commit in commits[0 if last is None else last + 1 :] if commit.has(ADDED) or commit.has(SUMS)]
    if not since:
        return start
    added = [_by_head(commit, ADDED) for commit in since]
    sums = _by_head(since[-1], SUMS)
    return {
        name: combined(head, [start.get(name, {}), *(of.get(name, {}) for of in added)], sums.get(name, {}))
        for name, head in heads.items()
    }


def _named(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}


def _by_head(commit: Commit, file: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in commit.tensors(file).items() if commit.has(file) else ():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = tensor
    return found
