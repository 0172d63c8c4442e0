"""What decides a run, checked at the door: model, recipe, training settings, seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.environment import versions
from ..core.errors import ConfigError, RunError
from ..core.processes import launched
from ..core.progress import Progress
from ..models.backbone import Backbone
from ..models.fingerprint import loaded_from
from ..models.in_memory import InMemory
from ..models.language_model import LanguageBackbone
from ..models.loading import load_model
from ..models.precision import Loading, check_base, dequantised, precision, quantised
from ..recipes.recipe import Recipe
from ..runs.config_file import CONFIG, read_config
from ..streams import Stream, Task
from .compatibility import suited
from .trainer_choice import AUTO, TrainerName
from .training_settings import resolve_training

HALF = ("bfloat16", "float16")


@dataclass
class Setup:
    """Everything about a run that is not in its commits.

    Attributes:
        model: hub id, folder or GGUF file of the base model, or itself; None for recipes without a network.
        recipe: untouched; whoever trains with it takes a copy, since rules, heads and consolidations hold state.
        heads_given: whether the user chose the heads.
        path: the run directory.
        training: complete training settings, see `resolve_training`; given: names of those that the user gave.
        loading: how the model is loaded.
        evaluate_every, seed, device, progress, lm_eval: see `Learner`; general: its prompts.
        trainer, response_prefix: see `Learner`; None until `settle` has chosen them.
    """

    model: str | InMemory | None
    recipe: Recipe
    heads_given: bool
    path: Path
    training: dict[str, Any]
    loading: Loading
    evaluate_every: int
    seed: int
    device: torch.device
    progress: Progress
    general: tuple[Any, ...] = ()
    lm_eval: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
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
        loading, keeps = self.loading_of(modality), self.recipe.consolidation.keeps_base(self.recipe.tuner)
        asked = loading.dtype if loading.dtype in HALF else None
        check_base(keeps, loading.quantization is not None, asked, self.recipe.name)
        with loaded_from(None if isinstance(self.model, InMemory) else self.model):
            backbone = load_model(self.model, modality, loading)
        self.put_prefix(backbone)
        found = precision(backbone.model)
        check_base(keeps, quantised(backbone.model), found if found in HALF else None, self.recipe.name)
        return backbone if loading.device_map is not None else backbone.to(self.device)

    def put_prefix(self, backbone: Backbone) -> None:
        """Tell a language model what stands between its prompts and their responses, once that is chosen."""
        if isinstance(backbone, LanguageBackbone) and self.response_prefix is not None:
            backbone.tokens.prefix = None if self.response_prefix == AUTO else self.response_prefix

    def loading_of(self, modality: str) -> Loading:
        """How the model is loaded, with the precision where the user leaves it open: as a run that is there was made;
        fp32 for encoders, and under a recipe that changes the weights themselves; else the checkpoint's own."""
        loading = self.loading
        if loading.dtype is not None or isinstance(self.model, InMemory):
            return loading
        if (self.path / CONFIG).exists():
            return replace(loading, dtype=Loading.of_run(read_config(self.path)["model"])["dtype"])
        auto = modality == "language" and self.recipe.consolidation.keeps_base(self.recipe.tuner)
        return loading if auto else replace(loading, dtype="float32")

    def load_whole(self, modality: Any) -> Backbone:
        """The base model in fp32, for what is merged into it.

        Raises:
            ModelError: it is a quantised one that cannot be dequantised.
        """
        assert self.model is not None
        whole = replace(self.loading, dtype=None if isinstance(self.model, InMemory) else "float32", quantization=None)
        backbone = load_model(self.model, modality, whole)
        backbone.model = dequantised(backbone.model).float()
        return backbone.to(self.device)

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
                f"{self.path} was made with another base model than `{backbone.name}` is now: give the one that it "
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
            "model_name": None if isinstance(self.model, InMemory) else self.model,
            **({"in_memory": True} if isinstance(self.model, InMemory) else {}),
            "model": {
                "fingerprint": backbone.fingerprint,
                "modality": backbone.modality,
                "pooling": backbone.pooling,
                "max_length": backbone.max_length,
                "trust_remote_code": self.loading.trust_remote_code,
                **({} if self.response_prefix in (None, AUTO) else {"response_prefix": self.response_prefix}),
                **self.loading.written(backbone.model),
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
            **({"processes": launched()} if launched() > 1 else {}),
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
