"""What a trainer of somebody else's must be, so that no rule is silently without effect."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..consolidation import Consolidation
from ..core.errors import ConfigError, ModelError, RuleError, TrainingError
from ..models.vision_language_model import reads_images
from ..recipes.recipe import Recipe
from .training_settings import check_optimizer


def trainer_of(args: Any) -> Any:
    """The trainer that is being made: it hands its callbacks everything but itself.

    Raises:
        ConfigError: none is.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and getattr(found, "args", None) is args:
            return found
        frame = frame.f_back
    raise ConfigError("Keep is a callback of transformers' Trainer and of its subclasses, such as TRL's SFTTrainer")


def check_trainer(trainer: Any) -> None:
    """
    Raises:
        ConfigError: a setting under which rules would not act, or act on something else.
    """
    args = trainer.args
    several = "Keep trains in one process on one device, where the rules see whole weights"
    sharded = {
        "DeepSpeed": getattr(trainer, "is_deepspeed_enabled", False) or getattr(args, "deepspeed", None),
        "FSDP": getattr(trainer, "is_fsdp_enabled", False) or getattr(args, "fsdp", None),
        "a parallelism_config": getattr(args, "parallelism_config", None),
        "a model sharded at load time": getattr(trainer, "is_distributed_loading_by_transformers", False),
        f"{args.world_size} processes": args.world_size > 1,
        f"{args.n_gpu} devices": args.n_gpu > 1,
    }
    for name, used in sharded.items():
        if used:
            raise ConfigError(f"{several}, and this trainer uses {name}: leave it out, or use pt.attach in a loop")
    reasons = {
        "torch_compile": "compiled code does not follow adapters and rules that are put on for a task",
        "auto_find_batch_size": "training would begin again behind the rules",
        "load_best_model_at_end": "it puts other weights in than those that the rules shaped last",
    }
    for name, reason in reasons.items():
        if getattr(args, name, False):
            raise ConfigError(f"`{name}` does not go with Keep: {reason}; leave it out")
    if getattr(trainer, "model_init", None) is not None:
        raise ConfigError("`model_init` makes another model when training begins: give the trainer the model itself")
    check_optimizer({"optim": getattr(args.optim, "value", args.optim)})


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: a recipe whose method is not in what a trainer trains.
    """
    consolidation = recipe.consolidation
    if not recipe.tuner.trains:
        raise ConfigError(f"recipe `{recipe.name}` trains nothing, so there is nothing to keep of a training")
    kind = type(consolidation)
    if kind.rows is not Consolidation.rows or kind.schedule is not Consolidation.schedule:
        raise ConfigError(
            f"recipe `{recipe.name}` chooses the rows that are trained on, and a trainer has its own: use Learner"
        )
    if getattr(getattr(recipe.tuner, "config", None), "is_prompt_learning", False):
        raise ConfigError(
            f"{type(recipe.tuner.config).__name__} stands beside the model, where the trainer would not see it: use "  # type: ignore[attr-defined]
            "Learner, or a recipe of adapters within the model"
        )


def check_kind(model: Any, tokenizer: Any) -> None:
    """
    Raises:
        ModelError: no language model with its tokenizer.
    """
    config = getattr(model, "config", None)
    speaks = any("CausalLM" in a or "ConditionalGeneration" in a or "LMHead" in a for a in _kinds(model))
    if config is None or not speaks or reads_images(config):
        raise ModelError(
            f"Keep takes language models that read text, and {type(model).__name__} is none: use Learner for it"
        )
    if tokenizer is None or not hasattr(tokenizer, "eos_token_id"):
        raise ModelError("Keep needs the tokenizer, to predict with what was kept: give it as processing_class")


def _kinds(model: Any) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]


def check_optimizer_holds(model: nn.Module, optimizer: Any) -> None:
    """
    Raises:
        RuleError: the optimizer does not hold what the recipe trains, so that no rule would act on it.
    """
    groups = getattr(optimizer, "param_groups", None)
    held = {id(p) for group in groups or () for p in group["params"]}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost or not trained:
        raise RuleError(
            f"the optimizer does not hold `{lost[0] if lost else 'anything'}` ({len(lost)} of {len(trained)} trained "
            "tensors), so no rule could act: let the trainer make its optimizer, and leave requires_grad as it is"
        )


def check_finite(parameters: Iterable[Tensor], task: str) -> None:
    """
    Raises:
        TrainingError: training left weights that are not finite.
    """
    if not bool(torch.stack([p.isfinite().all() for p in parameters]).all()):
        raise TrainingError(
            f"task `{task}`: training left weights that are not finite; nothing was committed: lower learning_rate, "
            "or look at the data"
        )
