"""The state of a learner: the base model plus its commits, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..consolidation import Consolidation
from ..heads import Head
from ..models.backbone import Backbone
from ..recipes.recipe import Recipe
from ..runs.commit import Commit, active
from .evaluator import Evaluator
from .general import General
from .setup import Setup


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
        general: what general prompts are compared with, where there are any.
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
        self.known = Known(labels, (), inputs, ())
        self.general: General | None = None

    def restore(self, commits: Sequence[Commit], without: str | None = None) -> LearnerState:
        """Bring the untouched model to the state after these commits. Heads and rules are as the newest one left them;
        `without` a task, the weights are as if it had left nothing."""
        self.consolidation.restore([c for c in active(commits) if c.manifest["task"] != without])
        if self.setup.loading.device_map is None:
            self.backbone.to(self.setup.device)
        if not commits:
            return self
        newest = commits[-1]
        states = head_states(newest)
        for name, head in self.named_heads() if states else ():
            head.load_state(states.get(name, {}))
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

    def files(self, predictions: dict[str, Tensor]) -> dict[str, Any]:
        """What a commit holds besides what the consolidation stores: heads, rules, predictions."""
        rules = {f"{i}.{k}": v for i, rule in enumerate(self.recipe.rules) for k, v in rule.state().items()}
        heads = {f"{name}.{k}": v for name, head in self.named_heads() for k, v in head.state().items()}
        return {
            "head.safetensors": heads,
            **({"rules.safetensors": rules} if rules else {}),
            "predictions.safetensors": predictions,
        }


def head_states(commit: Commit) -> dict[str, dict[str, Tensor]]:
    """What a commit holds of each head, by name; nothing before the first task."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in commit.tensors("head.safetensors").items() if commit.has("head.safetensors") else ():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = tensor
    return found
