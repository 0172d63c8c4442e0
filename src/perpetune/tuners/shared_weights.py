"""Weights that several modules own: what changes one changes the others, or is lost when the model is saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import ModelError
from .targets import ends_with


def refuse_shared(model: nn.Module, config: Any) -> None:
    """Refuse to tune a module that shares its weight with another: the change would be merged into both (or, where
    `modules_to_save` copies the weight, be lost when a model is saved that says that it is tied).

    Args:
        config: a `PeftConfig` whose targets are names of this model.

    Raises:
        ModelError: it is tuned; names both modules.
    """
    if getattr(config, "layer_replication", None):
        raise ModelError(
            "layer_replication makes layers that share their weights, so that no change of one can be merged or "
            "exported: save the deeper model first, and tune that"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, others in _owners(model).items():
        if _tunes(model, config, name, modules[name]):
            raise ModelError(
                f"`{name}` shares its weight with `{others[0]}`, so that a change of one cannot be merged or exported "
                f"without the other: leave `{name.rpartition('.')[2]}` out of the tuner's targets, or untie them "
                "(tie_word_embeddings: false in config.json, the weight stored under both names)"
            )


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Of each module with a weight that is another's, too: those others."""
    by_weight: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    shared = [owners for owners in by_weight.values() if len(owners) > 1]
    return {owner: [other for other in owners if other != owner] for owners in shared for owner in owners}


def _tunes(model: Any, config: Any, name: str, module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if any(ends_with(name, saved) for saved in getattr(config, "modules_to_save", None) or ()):
        return True
    targets = getattr(config, "target_modules", None)
    if targets == "all-linear":  # of which peft takes the last, which makes logits, out
        last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return isinstance(module, nn.Linear) and module is not last
    return targets is not None and bool(check_target_module_exists(config, name))
