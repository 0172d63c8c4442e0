"""Training settings where neither the user nor the recipe says anything: of encoders, and of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.processes import launched
from ..recipes.lora_family import LORA_TRAINING
from ..runs.config_check import BATCH, together
from ..runs.config_file import CONFIG, read_config

if TYPE_CHECKING:
    from .setup import Setup

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_steps": 0,
}
# A week of conversations is a few hundred rows: of the 72 of a week of `support-weeks` 32 a batch make 9 steps, 8 a
# batch 27; SmolLM2 needs some 30 to answer it. Rows that are evaluated together have logits over the whole vocabulary
# for up to 512 tokens each. The rate is that of recipes of the LoRA family, as O-LoRA and N-LoRA publish it.
LANGUAGE: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
}


def take_language_defaults(setup: Setup) -> None:
    """Give a setup the defaults of language models where its settings are open. A run that is there goes on with its
    own, which were others in its first versions."""
    settings = setup.recipe.training
    closed = {*setup.given, *(() if settings == LORA_TRAINING else settings)}
    values = LANGUAGE
    if (setup.path / CONFIG).is_file():
        values = dict(together(read_config(setup.path)).get("training") or {})
        if BATCH in values:
            values[BATCH] //= launched()
    own = {name: values[name] for name in LANGUAGE if name in values and name not in closed}
    setup.training = {**setup.training, **own}
