"""What decides a run, checked at the door: model, recipe, training settings, seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.environment import versions
from ..core.errors import ConfigError, RunError
from ..core.progress import Progress
from ..models.backbone import Backbone
from ..models.language_model import LanguageBackbone
from ..models.loading import load_model
from ..recipes.recipe import Recipe
from ..streams import Stream, Task
from .compatibility import suited
from .trainer_choice import AUTO, TrainerName
from .training_settings import resolve_training


@dataclass
class Setup:
    """Everything about a run that is not in its commits.

    Attributes:
        model: hub id or folder of the base model; None for recipes without a network.
        recipe: untouched; whoever trains with it takes a copy, since rules, heads and consolidations hold state.
        heads_given: whether the user chose the heads.
        path: the run directory.
        training: complete training settings, see `resolve_training`.
        loading: pooling, max_length, trust_remote_code, see `load_backbone`.
        evaluate_every, seed, device, progress: see `Learner`; general: its prompts.
        trainer, response_prefix: see `Learner`; None until `settle` has chosen them.
    """

    model: str | None
    recipe: Recipe
    heads_given: bool
    path: Path
    training: dict[str, Any]
    loading: dict[str, Any]
    evaluate_every: int
    seed: int
    device: torch.device
    progress: Progress
    general: tuple[Any, ...] = ()
    trainer: TrainerName | None = None
    response_prefix: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.evaluate_every, int) or self.evaluate_every < 0:
            raise ConfigError(f"evaluate_every is a number of tasks, or 0, not {self.evaluate_every!r}")

    @property
    def batch_size(self) -> int:
        """Examples in a forward pass without gradients."""
        return int(self.training["per_device_eval_batch_size"])

    def load_backbone(self, modality: Any) -> Backbone:
        """The base model, on the device.

        Raises:
            ConfigError: the recipe needs a model, and none is given.
            ModelError: it cannot be loaded.
        """
        own = self.recipe.tuner.own_backbone(modality)
        if own is not None:
            return own
        if self.model is None:
            raise ConfigError(f"recipe `{self.recipe.name}` needs a model: give a hub id or a folder (--model)")
        backbone = load_model(self.model, modality, **self.loading).to(self.device)
        if isinstance(backbone, LanguageBackbone) and self.response_prefix is not None:
            backbone.tokens.prefix = None if self.response_prefix == AUTO else self.response_prefix
        return backbone

    def load_base(self, modality: Any, expected: str) -> Backbone:
        """The base model that a run was made with.

        Args:
            expected: its fingerprint.

        Raises:
            RunError: the weights are others now.
        """
        backbone = self.load_backbone(modality)
        if backbone.fingerprint != expected:
            raise RunError(
                f"{self.path} was made with another base model than `{self.model}` is now: give the one that it "
                "was made with (--model)"
            )
        return backbone

    def fit_heads(self, backbone: Backbone, captions: bool = False) -> None:
        """Put heads that can read this model in place of the recipe's own; see `suited`."""
        self.recipe = suited(self.recipe, backbone, self.heads_given, captions)

    def training_of(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Training settings of a session: those of the run, and of its task where it has one alone."""
        return task_settings(self.training, tasks[0]) if len(tasks) == 1 else self.training

    def config(self, stream: Stream, backbone: Backbone) -> dict[str, Any]:
        """What decides the result of the run, as run.yaml holds it."""
        return {
            "model_name": self.model,
            "model": {
                "fingerprint": backbone.fingerprint,
                "modality": backbone.modality,
                "pooling": backbone.pooling,
                "max_length": backbone.max_length,
                "trust_remote_code": self.loading["trust_remote_code"],
                **({} if self.response_prefix in (None, AUTO) else {"response_prefix": self.response_prefix}),
            },
            **({"trainer": self.trainer} if backbone.modality == "language" and self.trainer else {}),
            "stream": {
                "name": stream.name,
                "scenario": stream.scenario,
                "inputs": stream.inputs,
                "tasks": [task.name for task in stream],
                "labels": stream.labels,
                "source": stream.source,
            },
            "recipe": self.recipe.to_dict(),
            "training": self.training,
            "seed": self.seed,
            "versions": versions(),
        }


def task_settings(training: dict[str, Any], task: Task) -> dict[str, Any]:
    """Training settings of a task, over those of the run.

    Raises:
        ConfigError: see `resolve_training`; names the task.
    """
    try:
        return resolve_training(training, dict(task.training))
    except ConfigError as error:
        raise ConfigError(f"training of task `{task.name}`: {error}") from error
